"""Paths; and a run in an emulator of Google's store, a data set in TensorFlow's in-memory store."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.runs import TIME_FIELDS
from tests.helpers.tiny_data import encode, indices, noise
from vgg_jax import InputError, load
from vgg_jax.paths import is_remote, local_copy, to_path
from vgg_jax.weights import read

ROOT = Path(__file__).parents[1]
REMOTE_RUN = "gs://bucket/runs/one"
FLAGS = shlex.split("digits --net shallow --image-size 16 --scale 16 --fc 24 16 --epochs 6")


@pytest.fixture(scope="module")
def gcs_environment():
    """The environment that reaches the emulator: epath by gcsfs, tensorstore by its own client.

    TensorFlow can reach only Google's own server, so epath must not use it.
    """
    for name in ("gcp_storage_emulator", "gcsfs"):
        pytest.importorskip(name, reason=f"needs {name}: pip install gcp-storage-emulator gcsfs")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.programs.gcs_emulator", str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            assert server.stdout.readline() == "up\n"
            yield os.environ | {
                "STORAGE_EMULATOR_HOST": url,
                "TENSORSTORE_GCS_HTTP_URL": url,
                "EPATH_USE_TF": "false",
                "PYTHONPATH": str(ROOT),
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "JAX_NUM_CPU_DEVICES": "1",
            }
        finally:
            server.kill()


def run_program(environment, *command):
    """Runs `python -m` with the arguments."""
    return subprocess.run(
        [sys.executable, "-m", *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def read_records(environment, workdir):
    """The lines of metrics.jsonl without the times."""
    process = run_program(environment, "tests.programs.print_file", f"{workdir}/metrics.jsonl")
    assert process.returncode == 0, process.stderr
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIME_FIELDS}
        for line in process.stdout.splitlines()
    ]


@pytest.mark.slow
@pytest.mark.integration
def test_run_in_store_equals_local_run(gcs_environment, tmp_path):
    """It is stopped, resumed, loaded and evaluated, and equals a local run to the bit."""
    train = ["tests.programs.train_tiny", *FLAGS, "--workdir"]
    local_run = str(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-m", *train, REMOTE_RUN],
        env=gcs_environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if "epoch   1" in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert 1 <= len(read_records(gcs_environment, REMOTE_RUN)) < 6

    resumed = run_program(gcs_environment, *train, REMOTE_RUN)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(rf"{REMOTE_RUN}: \w.* at epoch [2-6],", resumed.stdout)
    assert run_program(gcs_environment, *train, local_run).returncode == 0
    remote_records = read_records(gcs_environment, REMOTE_RUN)
    assert len(remote_records) == 6
    assert remote_records == read_records(gcs_environment, local_run)

    evaluations = []
    for workdir in (REMOTE_RUN, local_run):
        process = run_program(gcs_environment, "tests.programs.evaluate_run", workdir)
        assert process.returncode == 0, process.stderr
        evaluations.append(process.stdout.splitlines()[:2])
    assert evaluations[0] == evaluations[1]


@pytest.mark.slow
@pytest.mark.integration
def test_evaluate_missing_run_in_store(gcs_environment):
    process = run_program(gcs_environment, "vgg_jax", "evaluate", "gs://bucket/nothing")
    assert process.returncode == 2
    assert "gs://bucket/nothing" in process.stderr.splitlines()[-1]


def test_image_folder_in_store():
    """The labels, the names and the order are those of the same folder on a disk."""
    import tensorflow as tf

    from vgg_jax import IMAGENET, TrainConfig
    from vgg_jax.data import open_train_val, train_batches

    root = "ram://photos"
    for split, count in (("train", 5), ("val", 2)):
        for label in ("ants", "bees"):
            tf.io.gfile.makedirs(f"{root}/{split}/{label}")
            for i in range(count):
                with tf.io.gfile.GFile(f"{root}/{split}/{label}/{i}.png", "wb") as file:
                    file.write(encode(noise(20, 24, i)))
    with tf.io.gfile.GFile(f"{root}/train/ants/notes.jpg", "w") as file:
        file.write("no image")
    message = (
        rf"1 of 11 files under '{root}/train' are not images, .*: '{root}/train/ants/notes.jpg'"
    )
    with pytest.raises(InputError, match=message):
        open_train_val(root, validation_fraction=0.1, seed=0)
    train, validation = open_train_val(root, validation_fraction=0.1, seed=0, skip_bad=True)
    assert train.classes == ("ants", "bees")
    assert (train.size, validation.size) == (10, 4)
    assert train.file_name(9) == f"{root}/train/bees/4.png"
    assert indices(train) == list(range(10))
    config = TrainConfig(data=root, image_size=32, scale=(32,), batch_size=4)
    batch = next(iter(train_batches(train, config, IMAGENET)))
    assert batch["image"].shape == (4, 32, 32, 3) and batch["mask"].all()
    with pytest.raises(InputError, match="no folder 'ram://nothing'"):
        open_train_val("ram://nothing", validation_fraction=0.1, seed=0)


def test_is_remote():
    paths = ("runs/a", Path("/a"), "gs://b/a", "C:\\a")
    assert [is_remote(path) for path in paths] == [False, False, True, False]


@pytest.mark.parametrize("path", [b"runs/a", None, 3, ["a"]])
def test_no_path(path):
    for function in (load, read, to_path, is_remote):
        with pytest.raises(InputError, match=r"the path is .*: expected a string, or a path"):
            function(path)


def test_path_with_nul():
    with pytest.raises(
        InputError, match=r"null byte.*: expected a file of weights, or a run's fol"
    ):
        load("a\0b")


def test_to_path(tmp_path):
    assert str(to_path("gs://b/a") / "c") == "gs://b/a/c"
    assert to_path(tmp_path) == tmp_path
    with pytest.raises(InputError, match=r"ftp://b/a is in an unknown store: expected gs://"):
        to_path("ftp://b/a")


def test_local_copy_of_local_file(tmp_path):
    with local_copy(tmp_path / "a") as path:
        assert path == tmp_path / "a"
