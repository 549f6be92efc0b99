"""Settings and fixtures of all tests.

The tests are strict: warnings are errors (pyproject.toml), and shapes do not broadcast by accident.
There are two CPU devices.
"""

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.helpers.tiny import DEEP, SHALLOW
from vgg_jax import CONFIGS

# Most programs that tests compile without `compiler_options` run once, so LLVM's passes do not pay.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")

# A shell ignores SIGINT for its background jobs, and some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests compile the same programs, and so do all workers and the processes that they start. The
# cache keeps small programs too (docs/performance.md#tests). Workers inherit the folder's name.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    CACHE = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = CACHE.name
# jaxlib 0.10 logs an error for each program that it reads there (runtime/compilation_cache.py).
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)

# Which way is faster depends on what else runs, so only tests/ops/test_bfloat16.py measures it.
os.environ["VGG_JAX_BFLOAT16"] = "onednn"

# Photos and weights that are not part of the project. Without them this is no folder.
DATA = Path(os.environ.get("VGG_JAX_DATA", os.devnull))


def pytest_collection_finish() -> None:
    """Excludes the imported modules from garbage collection, which costs time."""
    gc.freeze()


def pytest_report_header() -> str:
    if DATA.is_dir():
        return f"real data: {DATA}"
    return "real data: none (VGG_JAX_DATA); weights are tried on random colours instead of photos"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets, which are not part of the project."""
    if not DATA.is_dir():
        pytest.skip("needs real data: set VGG_JAX_DATA to their folder")
    return DATA


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A data_dir with the data set "numbers", by file format: "tfrecord" and "array_record"."""
    import tensorflow_datasets as tfds

    from tests.helpers.tiny_data import Numbers

    folders = {}
    for file_format in ("tfrecord", "array_record"):
        folders[file_format] = str(tmp_path_factory.mktemp(file_format))
        config = tfds.download.DownloadConfig(num_shards=4, try_download_gcs=False)
        Numbers(data_dir=folders[file_format], file_format=file_format).download_and_prepare(
            download_config=config
        )
    return folders


@pytest.fixture(scope="module")
def small_nets() -> Iterator[None]:
    """Registers the nets "shallow" and "deep" for a module.

    Use: `pytestmark = pytest.mark.usefixtures("small_nets")`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "shallow", SHALLOW)
        patch.setitem(CONFIGS, "deep", DEEP)
        yield
