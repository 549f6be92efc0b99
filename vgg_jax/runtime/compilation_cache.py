"""The persistent cache of compiled programs."""

import os
import platform
import warnings


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that the next start need not compile them again.

    The folder is $JAX_COMPILATION_CACHE_DIR, or one in the user's cache folder.
    """
    # For each program in the cache, jaxlib 0.10 logs a long error about a preference of LLVM's.
    # Real failures are raised, so nothing is lost.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # jaxlib 0.12 cannot write programs that contain oneDNN's bfloat16 convolutions.
    warnings.filterwarnings(
        "ignore", r"(?s)Error writing persistent compilation cache entry.*std::bad_alloc"
    )
    import jax  # not at the top: `vgg-jax --help` should not wait for it

    if not jax.config.values["jax_compilation_cache_dir"]:
        # Machines may share a home, and a program for one processor may not run on another. So
        # each machine has its own folder.
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        jax.config.update(
            "jax_compilation_cache_dir",
            os.path.join(os.path.expanduser(cache), "vgg_jax", platform.node()),
        )
