"""The cache of compiled programs."""

import os
import platform
import warnings


def enable_compilation_cache() -> None:
    """Lets the next start find what this one compiles, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    # jaxlib 0.10 writes an error of two kilobytes for each program that it finds, over a preference of LLVM's. What fails is raised.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Of programs with oneDNN's convolutions, in bfloat16: jaxlib 0.12 cannot write those.
    warnings.filterwarnings(
        "ignore", r"(?s)Error writing persistent compilation cache entry.*std::bad_alloc"
    )
    import jax

    if not jax.config.values["jax_compilation_cache_dir"]:
        # A folder for each machine, since a home may be shared by several and a program for one processor need not run on another.
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        jax.config.update(
            "jax_compilation_cache_dir",
            os.path.join(os.path.expanduser(cache), "vgg_jax", platform.node()),
        )
