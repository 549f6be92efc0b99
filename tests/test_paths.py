"""A run in an object store, by an emulator of Google's, and a data set in TensorFlow's in-memory file system."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_data import encode, indices, noise
from vgg_jax import InputError
from vgg_jax.paths import is_remote, local_copy, to_path

ROOT = Path(__file__).parents[1]
FLAGS = [
    "digits",
    "--net",
    "shallow",
    "--image-size",
    "16",
    "--scale",
    "16",
    "--fc",
    "24",
    "16",
    "--epochs",
    "6",
]
SERVER = """
import sys, time
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").start()
print("up", flush=True)
time.sleep(600)
"""
EVALUATE = """
import sys, json
from tests.programs import train_tiny as processes
from vgg_jax import load, cli
model, variables, metadata = load(sys.argv[1])
print(json.dumps([metadata["epoch"], metadata["validation"]["accuracy"], float(abs(variables["params"]["fc6"]["kernel"]).sum())]))
sys.exit(cli.main(["evaluate", sys.argv[1], "--protocol", "center", "--out", sys.argv[1] + "/evaluated"]))
"""


@pytest.fixture(scope="module")
def store():
    """The environment that reaches the emulator: epath by gcsfs, tensorstore by itself. TensorFlow asks Google alone, so it stays out."""
    for name in ("gcp_storage_emulator", "gcsfs"):
        pytest.importorskip(name, reason=f"needs {name}: pip install gcp-storage-emulator gcsfs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as server:
        try:
            assert server.stdout.readline() == "up\n"
            reach = {
                "STORAGE_EMULATOR_HOST": url,
                "TENSORSTORE_GCS_HTTP_URL": url,
                "EPATH_USE_TF": "false",
                "PYTHONPATH": str(ROOT),
            }
            yield os.environ | reach | {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_NUM_CPU_DEVICES": "1"}
        finally:
            server.kill()


def records(store: dict[str, str], workdir: str) -> list[dict]:
    program = "import sys; from vgg_jax.paths import path_of; p = path_of(sys.argv[1]); print(p.read_text() if p.exists() else '', end='')"
    found = subprocess.run(
        [sys.executable, "-c", program, f"{workdir}/metrics.jsonl"],
        env=store,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    clock = ("time", "seconds", "images_per_second", "input_wait_seconds")
    return [
        {name: value for name, value in json.loads(line).items() if name not in clock}
        for line in found.stdout.splitlines()
    ]


@pytest.mark.slow
def test_a_run_in_a_store_is_stopped_gone_on_with_loaded_and_evaluated(store, tmp_path):
    """It is the run of this machine's disk, to the bit."""
    command = [sys.executable, "-m", "tests.programs.train_tiny", *FLAGS, "--workdir"]
    with subprocess.Popen(
        [*command, "gs://bucket/runs/one"], env=store, cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if "epoch   1" in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert 1 <= len(records(store, "gs://bucket/runs/one")) < 6
    on = subprocess.run(
        [*command, "gs://bucket/runs/one"],
        env=store,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (on.returncode, "gs://bucket/runs/one: going on at epoch" in on.stdout) == (0, True), (
        on.stderr
    )
    subprocess.run([*command, str(tmp_path / "run")], env=store, cwd=ROOT, check=True, timeout=120)
    assert records(store, "gs://bucket/runs/one") == records(store, str(tmp_path / "run"))
    found = []
    for workdir in ("gs://bucket/runs/one", str(tmp_path / "run")):
        ran = subprocess.run(
            [sys.executable, "-c", EVALUATE, workdir],
            env=store,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ran.returncode == 0, ran.stderr
        found.append([*ran.stdout.splitlines()[:2]])
    assert found[0] == found[1]


@pytest.mark.slow
def test_nothing_in_a_store_is_said(store):
    ran = subprocess.run(
        [sys.executable, "-m", "vgg_jax", "evaluate", "gs://bucket/nothing"],
        env=store,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 2
    assert "gs://bucket/nothing" in ran.stderr.splitlines()[-1]


def test_an_image_folder_in_a_store():
    """TensorFlow's own in-memory store; the labels, the names and the order are those of the same folder on a disk."""
    import tensorflow as tf

    from vgg_jax import IMAGENET, TrainConfig
    from vgg_jax.data import open_train_val, train_batches

    for split, count in (("train", 5), ("val", 2)):
        for label in ("ants", "bees"):
            tf.io.gfile.makedirs(f"ram://photos/{split}/{label}")
            for i in range(count):
                with tf.io.gfile.GFile(f"ram://photos/{split}/{label}/{i}.png", "wb") as file:
                    file.write(encode(noise(20, 24, i)))
    with tf.io.gfile.GFile("ram://photos/train/ants/notes.txt", "w") as file:
        file.write("no image")
    with pytest.raises(
        InputError,
        match=r"1 of 11 files under 'ram://photos/train' are not images, .*: 'ram://photos/train/ants/notes.txt'",
    ):
        open_train_val("ram://photos", validation_fraction=0.1, seed=0)
    train, validation = open_train_val(
        "ram://photos", validation_fraction=0.1, seed=0, skip_bad=True
    )
    assert (train.classes, train.size, validation.size, train.file_name(9)) == (
        ("ants", "bees"),
        10,
        4,
        "ram://photos/train/bees/4.png",
    )
    assert indices(train) == list(range(10))
    config = TrainConfig(data="ram://photos", image_size=32, scale=(32,), batch_size=4)
    batch = next(iter(train_batches(train, config, IMAGENET)))
    assert batch["image"].shape == (4, 32, 32, 3) and batch["mask"].all()
    with pytest.raises(InputError, match="no folder 'ram://nothing'"):
        open_train_val("ram://nothing", validation_fraction=0.1, seed=0)


def test_what_is_of_this_machine_and_what_is_not(tmp_path):
    assert [is_remote(path) for path in ("runs/a", Path("/a"), "gs://b/a", "C:\\a")] == [
        False,
        False,
        True,
        False,
    ]
    assert str(to_path("gs://b/a") / "c") == "gs://b/a/c"
    assert to_path(tmp_path) == tmp_path
    with pytest.raises(
        InputError, match=r"ftp://b/a is in a store that is not known: expected gs://"
    ):
        to_path("ftp://b/a")
    with local_copy(tmp_path / "a") as same:
        assert same == tmp_path / "a"
