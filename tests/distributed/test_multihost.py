"""Several processes over loopback: the same run as one process, also when stopped or killed."""

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers.events import read_images, read_scalars
from tools.soak import result
from vgg_jax.distributed import multihost
from vgg_jax.errors import InputError
from vgg_jax.runtime.compiler import has_onednn_bfloat16

pytestmark = pytest.mark.usefixtures("small_nets")

ROOT = Path(__file__).parents[2]
FLAGS = shlex.split(
    "--net shallow --fc 1024 64 --image-size 32 --scale 32 40 --batch-norm --dropout-rate 0.5 "
    "--colour-shift 0.1 --batch-size 16 --microbatch 8 --schedule plateau --patience 1 "
    "--learning-rate 0.001"
)
# Not the cache of the other tests: processes are killed here while they write to it.
CACHE = tempfile.TemporaryDirectory()
TIMEOUT = 120  # seconds that a test waits for a process
RESUMED = re.compile(r" at epoch (\d+), batch 1 ")  # in the line of a run that resumes


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """37 images for training, 17 for validation: the numbers of processes divide neither."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, counts in (("train", (19, 18)), ("val", (9, 8))):
        for count, label in zip(counts, ("blue", "red"), strict=True):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 200, (40, 44 + i, 3))
                pixels[..., 0 if label == "red" else 2] += 55
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / label / f"{i}.jpg")
    return root


def start(count, photos, workdir, *flags, devices=1, last_process_flags=(), last_process_env=None):
    """Starts `vgg-jax train` in `count` processes with `devices` devices each."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": CACHE.name,
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    command = [sys.executable, "-m", "tests.programs.train_tiny", str(photos)]
    command += ["--workdir", str(workdir), *FLAGS, *flags]
    processes = []
    for index in range(count):
        cluster = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        is_last = index == count - 1
        processes.append(
            subprocess.Popen(
                [*command, *(last_process_flags if is_last else ())],
                env=environment
                | (cluster if count > 1 else {})
                | ((last_process_env if is_last else None) or {}),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def wait_all(processes):
    """Waits, and returns each process's exit code, stdout and stderr."""
    try:
        return [(process.wait(TIMEOUT), *process.communicate()) for process in processes]
    finally:
        for process in processes:
            process.kill()


def train(count, photos, workdir, *flags, devices=1):
    """Trains a run to its end, and returns its workdir."""
    outputs = wait_all(start(count, photos, workdir, *flags, devices=devices))
    assert [code for code, _, _ in outputs] == [0] * count, outputs
    assert all(stdout == "" for _, stdout, _ in outputs[1:])  # only the main process prints
    return workdir


def count_epochs(workdir):
    metrics = workdir / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def wait_for_epochs(processes, workdir, count):
    """Waits until the run has finished `count` epochs."""
    deadline = time.monotonic() + TIMEOUT
    while count_epochs(workdir) < count:
        is_alive = all(process.poll() is None for process in processes)
        assert is_alive and time.monotonic() < deadline, wait_all(processes)
        time.sleep(0.05)


def assert_same_run(workdir, expected, rtol=1e-4):
    """Compares the records and all saved arrays: counts exactly, floats up to rounding."""
    arrays, (records, *_) = result(workdir)
    expected_arrays, (expected_records, *_) = result(expected)
    assert len(records) == len(expected_records)
    for record, expected_record in zip(records, expected_records, strict=True):
        assert record["learning_rate"] == expected_record["learning_rate"]
        for split in ("train", "validation"):
            metrics, expected_metrics = record[split], expected_record[split]
            loss, expected_loss = metrics.pop("loss"), expected_metrics.pop("loss")
            assert loss == pytest.approx(expected_loss, rel=rtol)
            assert metrics == expected_metrics

    def assert_close(path, array, expected_array):
        atol = 10 * rtol * max(np.abs(expected_array).max(), 1e-3)
        np.testing.assert_allclose(
            array, expected_array, rtol=0, atol=atol, err_msg=jax.tree_util.keystr(path)
        )

    jax.tree_util.tree_map_with_path(assert_close, arrays, expected_arrays)


@pytest.fixture(scope="module")
def one_process_run(photos, tmp_path_factory):
    """A run of four epochs, twelve steps, by one process with one device."""
    return train(1, photos, tmp_path_factory.mktemp("runs") / "one", "--epochs", "4")


@pytest.mark.integration
def test_two_processes_match_one(one_process_run, photos, tmp_path):
    workdir = train(2, photos, tmp_path / "two", "--epochs", "4", "--fsdp")
    assert_same_run(workdir, one_process_run)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize(
    ("count", "devices", "flags"),
    [
        (1, 8, ["--mesh", "data=4,model=2", "--fsdp"]),
        # Both processes feed the same images.
        (2, 1, ["--mesh", "model=2", "--cache"]),
        (4, 1, ["--mesh", "data=2,model=2"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_mesh_matches_one_device(count, devices, flags, one_process_run, photos, tmp_path):
    workdir = train(count, photos, tmp_path / "run", "--epochs", "4", *flags, devices=devices)
    assert_same_run(workdir, one_process_run)


@pytest.mark.slow
@pytest.mark.integration
def test_signal_to_one_process_stops_all(photos, tmp_path):
    """Two processes are stopped. One resumes to the end of an undisturbed run."""
    workdir = tmp_path / "run"
    processes = start(2, photos, workdir, "--epochs", "12", "--fsdp")
    wait_for_epochs(processes, workdir, 1)
    processes[1].send_signal(signal.SIGTERM)
    signal_time = time.monotonic()
    outputs = wait_all(processes)
    assert [code for code, _, _ in outputs] == [75, 75], outputs
    assert time.monotonic() - signal_time < 30
    assert re.search(r"stopped in epoch \d+ and saved in", outputs[0][1])
    train(1, photos, workdir, "--epochs", "12")
    undisturbed = train(1, photos, tmp_path / "undisturbed", "--epochs", "12")
    # Rounding grows over the steps.
    assert_same_run(workdir, undisturbed, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize(("victim", "resuming_count"), [(0, 2), (1, 1)])
def test_killed_process_ends_peer(victim, resuming_count, photos, tmp_path):
    """The peer ends at once, not after jax's own minute. The run resumes from the last save."""
    workdir = tmp_path / "run"
    processes = start(2, photos, workdir, "--epochs", "1000")
    wait_for_epochs(processes, workdir, 1)
    processes[victim].kill()
    kill_time = time.monotonic()
    code, _, stderr = wait_all(processes)[1 - victim]
    assert time.monotonic() - kill_time < 30
    # Either this package or jax notices first.
    assert (code == 76 and "another process of this run has ended" in stderr) or (
        code == -signal.SIGABRT and "another task died" in stderr
    )
    epochs = count_epochs(workdir)
    processes = start(resuming_count, photos, workdir, "--epochs", "1000")
    timer = threading.Timer(TIMEOUT, lambda: [process.kill() for process in processes])
    timer.start()
    try:
        match = next(filter(None, map(RESUMED.search, processes[0].stdout)))
    finally:
        timer.cancel()
        for process in processes:
            process.kill()
            process.communicate()
    assert int(match[1]) in (epochs, epochs + 1, epochs + 2)


@pytest.mark.slow
@pytest.mark.integration
def test_different_settings_are_rejected(photos, tmp_path):
    flags = ["--weight-decay", "0.1"]
    processes = start(2, photos, tmp_path / "run", "--epochs", "1", last_process_flags=flags)
    for code, _, stderr in wait_all(processes):
        assert code == 2 and stderr.count("\n") == 1
        assert re.search(r"in process \d weight_decay is 0\.\d+; expected", stderr)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.skipif(not has_onednn_bfloat16(), reason="needs oneDNN's bfloat16 convolution")
def test_different_convolutions_are_rejected(photos, tmp_path):
    """In bfloat16, the processes would compile different programs."""
    flags, last = ("--epochs", "1", "--dtype", "bfloat16"), {"VGG_JAX_BFLOAT16": "float32"}
    processes = start(2, photos, tmp_path / "run", *flags, last_process_env=last)
    for code, _, stderr in wait_all(processes):
        assert code == 2 and stderr.count("\n") == 1
        assert re.search(r"in process \d bfloat16 is .*VGG_JAX_BFLOAT16.*expected the", stderr)


@pytest.mark.slow
@pytest.mark.integration
def test_input_error_of_main_process_ends_all(photos, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    outputs = wait_all(start(2, photos, tmp_path / "run", "--epochs", "1"))
    assert [code for code, _, _ in outputs] == [2, 2], outputs
    assert all("run.json cannot be read" in stderr for _, _, stderr in outputs)


JAX = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}
OPEN_MPI_5 = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
OPEN_MPI = OPEN_MPI_5 | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (JAX, "JAX_COORDINATOR_ADDRESS=10.0.0.1:1234"),
        (JAX | SLURM, "JAX_COORDINATOR_ADDRESS=10.0.0.1:1234"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, None),
        (SLURM, "SLURM"),
        # One task, or the shell that salloc opens.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        (OPEN_MPI, "Open MPI"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        # A notebook in a cluster.
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ],
)
def test_detect_cluster(environment, expected):
    assert multihost.detect_cluster(environment) == expected


@pytest.mark.parametrize(
    ("mode", "environment"),
    [
        ("on", {}),
        ("auto", JAX | {"JAX_NUM_PROCESSES": "two"}),
        ("perhaps", {}),
        ("auto", OPEN_MPI_5),
    ],
)
def test_initialize_rejects(mode, environment):
    with pytest.raises(InputError, match="expected"):
        multihost.initialize(mode, environment)


def test_initialize_without_cluster():
    assert multihost.initialize("auto", {}) is None
    assert multihost.initialize("off", JAX) is None


@pytest.mark.parametrize("error", [multihost.DataError("no image"), InputError("no folder")])
def test_run_on_main_and_broadcast_raises(error, monkeypatch):
    """Two processes are simulated, of which this one is the main one."""

    def fail():
        raise error

    monkeypatch.setattr(multihost, "broadcast_from_main", lambda array: array)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert multihost.run_on_main_and_broadcast(lambda: {"é": 1}) == {"é": 1}
    with pytest.raises(InputError, match=str(error)) as raised:
        multihost.run_on_main_and_broadcast(fail)
    assert type(raised.value) is type(error)


@pytest.mark.integration
def test_watchdog_ends_stuck_process():
    process = subprocess.run(
        [sys.executable, "-m", "tests.programs.hang"],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=ROOT,
    )
    assert (process.returncode, process.stdout) == (76, "running\n")
    assert "process 0 did no step in 0 s" in process.stderr and process.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.integration
def test_main_process_alone_writes_events_and_trace(photos, tmp_path):
    """Three steps an epoch, and all processes measure the layers."""
    flags = ("--epochs", "1", "--tensorboard", "--profile", "2:3")
    folder = train(2, photos, tmp_path, *flags) / "tensorboard"
    assert len(list(folder.glob("events.*"))) == 1
    scalars = read_scalars(folder)
    assert scalars["validation/loss"].keys() == {3}
    assert scalars["gradient_norm/conv1_1"][1] > 0
    assert len(list(folder.glob("plugins/profile/*/perfetto_trace.json.gz"))) == 1
    [(step, _)] = read_images(folder, "crops")
    assert step == 1
