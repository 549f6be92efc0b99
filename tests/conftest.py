"""Strict by default: warnings are errors (pyproject.toml), shapes broadcast only where the code says so; and two CPU devices."""

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from tests.helpers.tiny import DEEP, SHALLOW
from vgg_jax import CONFIGS
from vgg_jax.configs.train import CHOICES

# For what tests compile by the way, without `compiler_options`: a quarter of the time.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # a shell starts so what runs in its background, and the tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Many tests compile the same programs, a run and the one that goes on with it for example; and so do processes that they start. Small ones
# too, which jax would compile again: a fifth of the time of tests/test_train.py.
CACHE = tempfile.TemporaryDirectory()
for name, value in (
    ("jax_compilation_cache_dir", CACHE.name),
    ("jax_persistent_cache_min_compile_time_secs", 0),
):
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)

DATA = Path(
    os.environ.get("VGG_JAX_DATA", "no data")
)  # a folder of photos and weights that are not part of the project


def pytest_report_header() -> str:
    return f"real data: {DATA if DATA.is_dir() else 'none (VGG_JAX_DATA); weights are tried on random colours instead of photos'}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets that are not part of the project."""
    if not DATA.is_dir():
        pytest.skip(f"no real data: {DATA} does not exist and VGG_JAX_DATA is not set")
    return DATA


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """{"tfrecord": a data_dir with the data set "numbers", "array_record": one, too}"""
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
    """The nets "shallow" and "deep", for what trains: `pytestmark = pytest.mark.usefixtures("small_nets")`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "shallow", SHALLOW)
        patch.setitem(CONFIGS, "deep", DEEP)
        patch.setitem(CHOICES, "net", tuple(CONFIGS))
        yield
