"""The cache folder of vgg_jax, and the persistent cache of compiled programs in it."""

import logging
import os
import platform
import tempfile
import warnings
from pathlib import Path

logger = logging.getLogger(__name__)

# Programs that compile faster are not kept: by this package's choice, and by jax's default.
_MIN_COMPILE_SECONDS, _JAX_MIN_COMPILE_SECONDS = 0.1, 1.0


def cache_folder() -> Path:
    """Returns $VGG_JAX_CACHE, or the folder `vgg_jax` in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    folder = os.environ.get("VGG_JAX_CACHE") or os.path.join(user_cache, "vgg_jax")
    return Path(os.path.expanduser(folder))


def programs_folder() -> str:
    """Returns jax's folder of compiled programs; if none is set, that of this machine.

    Machines may share a home, and a program for one processor may not run on another. So each
    machine has its own folder.
    """
    import jax  # not at the top: `vgg-jax --help` should not wait for it

    set_folder: str | None = jax.config.values["jax_compilation_cache_dir"]
    return set_folder or str(cache_folder() / platform.node())


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the next start need not compile them again.

    The folder is $JAX_COMPILATION_CACHE_DIR, or one in `cache_folder`. If it cannot be written to,
    a warning says so, and nothing is kept.
    """
    # For each program in the cache, jaxlib 0.10 logs a long error about a preference of LLVM's.
    # Real failures are raised, so nothing is lost.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # jaxlib 0.12 cannot write programs that contain oneDNN's bfloat16 convolutions.
    warnings.filterwarnings(
        "ignore", r"(?s)Error writing persistent compilation cache entry.*std::bad_alloc"
    )
    import jax

    folder = programs_folder()
    jax.config.update("jax_compilation_cache_dir", folder)
    setting = "jax_persistent_cache_min_compile_time_secs"
    if jax.config.values[setting] == _JAX_MIN_COMPILE_SECONDS:  # the user's choice stays
        # docs/performance.md#first-answer
        jax.config.update(setting, _MIN_COMPILE_SECONDS)
    try:
        if "://" not in folder:
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        logger.warning(
            f"compiled programs cannot be kept in {folder} ({error.strerror}), so each start "
            "compiles them; name another folder by VGG_JAX_CACHE or JAX_COMPILATION_CACHE_DIR"
        )
        jax.config.update("jax_enable_compilation_cache", False)
