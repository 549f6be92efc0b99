"""Several processes over loopback beside one: the same run, however it is divided, stopped, killed and gone on with."""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.soak import result
from vgg_jax.distributed import multihost
from vgg_jax.errors import InputError

pytestmark = pytest.mark.usefixtures("small_nets")

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--net", "shallow", "--fc", "1024", "64", "--image-size", "32", "--scale", "32", "40", "--batch-norm", "--dropout-rate", "0.5",
    "--colour-shift", "0.1", "--batch-size", "16", "--microbatch", "8", "--schedule", "plateau", "--patience", "1",
    "--learning-rate", "0.001",
]  # fmt: skip
CACHE = (
    tempfile.TemporaryDirectory()
)  # not pytest's own: processes are killed here while they write to it
LIMIT = 120  # seconds that a test waits for a process


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """37 for training, 17 for validation: no number of processes divides either."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, counts in (("train", (19, 18)), ("val", (9, 8))):
        for count, label in zip(counts, ("blue", "red"), strict=True):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 200, (40, 44 + i, 3))
                pixels[..., 0 if label == "red" else 2] += 55
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / label / f"{i}.jpg")
    return root


def started(
    count: int,
    photos: Path,
    workdir: Path,
    *flags: str,
    devices: int = 1,
    own: dict[int, list[str]] | None = None,
) -> list:
    """`vgg-jax train` in so many processes, each with so many devices; `own` are more flags of single ones."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = []
    for number in range(count):
        several = {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(number),
        }
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(ROOT),
            "JAX_COMPILATION_CACHE_DIR": CACHE.name,
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        environment |= several if count > 1 else {}
        command = [
            sys.executable,
            "-m",
            "tests.programs.train_tiny",
            str(photos),
            "--workdir",
            str(workdir),
            *FLAGS,
            *flags,
            *(own or {}).get(number, ()),
        ]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        found.append(subprocess.Popen(command, env=environment, cwd=ROOT, **pipes))
    return found


def ended(group: list) -> list[tuple[int, str, str]]:
    """The exit code, stdout and stderr of each."""
    try:
        return [(process.wait(LIMIT), *process.communicate()) for process in group]
    finally:
        for process in group:
            process.kill()


def trained(count: int, photos: Path, workdir: Path, *flags: str, devices: int = 1) -> Path:
    found = ended(started(count, photos, workdir, *flags, devices=devices))
    assert [code for code, _, _ in found] == [0] * count, found
    assert all(out == "" for _, out, _ in found[1:])  # the first one alone prints
    return workdir


def check_same(one: Path, other: Path, rtol: float = 1e-4) -> None:
    """Equal to rounding: the records, but for what counts whole numbers exactly, and every array that is saved."""
    (arrays, (records, *_)), (others, (other_records, *_)) = result(one), result(other)
    assert len(records) == len(other_records)
    for mine, theirs in zip(records, other_records, strict=True):
        assert mine["learning_rate"] == theirs["learning_rate"]
        for split in ("train", "validation"):
            assert {name: mine[split][name] for name in mine[split] if name != "loss"} == {
                name: theirs[split][name] for name in theirs[split] if name != "loss"
            }
            assert mine[split]["loss"] == pytest.approx(theirs[split]["loss"], rel=rtol)
    flat, other_flat = (dict(leaves(tree)) for tree in (arrays, others))
    assert flat.keys() == other_flat.keys()
    for name, array in flat.items():
        np.testing.assert_allclose(
            other_flat[name],
            array,
            rtol=0,
            atol=10 * rtol * max(np.abs(array).max(), 1e-3),
            err_msg=name,
        )


def leaves(tree):
    import jax

    return [
        (jax.tree_util.keystr(path), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


@pytest.fixture(scope="module")
def alone(photos, tmp_path_factory):
    """Four epochs, twelve steps, by one process with one device."""
    return trained(1, photos, tmp_path_factory.mktemp("run") / "alone", "--epochs", "4")


def test_two_processes_do_what_one_does(alone, photos, tmp_path):
    check_same(alone, trained(2, photos, tmp_path / "two", "--epochs", "4", "--fsdp"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "devices", "flags"),
    [
        (1, 8, ["--mesh", "data=4,model=2", "--fsdp"]),
        (2, 1, ["--mesh", "model=2", "--cache"]),  # both feed the same images
        (4, 1, ["--mesh", "data=2,model=2"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_every_mesh_does_what_one_device_does(count, devices, flags, alone, photos, tmp_path):
    check_same(
        alone, trained(count, photos, tmp_path / "run", "--epochs", "4", *flags, devices=devices)
    )


def in_training(group: list, workdir: Path) -> None:
    """Waits until an epoch is done."""
    limit = time.monotonic() + LIMIT
    while not (workdir / "metrics.jsonl").exists() or not (workdir / "metrics.jsonl").read_text():
        assert time.monotonic() < limit and all(process.poll() is None for process in group), ended(
            group
        )
        time.sleep(0.05)


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step_and_any_number_goes_on(photos, tmp_path):
    """Two processes, stopped by a SIGTERM to the second; then four, then one, to the end that one undisturbed process comes to."""
    workdir = tmp_path / "run"
    for count, flags in ((2, ["--fsdp"]), (4, ["--mesh", "data=2,model=2"])):
        done = len((workdir / "metrics.jsonl").read_text().splitlines()) if workdir.exists() else 0
        group = started(count, photos, workdir, "--epochs", "30", *flags)
        limit = time.monotonic() + LIMIT
        while (
            len(
                (workdir / "metrics.jsonl").read_text().splitlines()
                if (workdir / "metrics.jsonl").exists()
                else ()
            )
            <= done
        ):
            assert time.monotonic() < limit and all(process.poll() is None for process in group), (
                ended(group)
            )
            time.sleep(0.05)
        group[1].send_signal(signal.SIGTERM)
        sent = time.monotonic()
        found = ended(group)
        assert [code for code, _, _ in found] == [75] * count, found
        assert time.monotonic() - sent < 30
        assert re.search(r"stopped in epoch \d+ and saved in", found[0][1])
    trained(1, photos, workdir, "--epochs", "30")
    check_same(
        trained(1, photos, tmp_path / "alone", "--epochs", "30"), workdir, rtol=1e-2
    )  # of ninety steps


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "then"), [(0, 2), (1, 1)])
def test_where_one_is_killed_the_other_says_so_and_the_run_goes_on(victim, then, photos, tmp_path):
    """At once, not after jax's own minute; what is gone on from is the last save."""
    group = started(2, photos, tmp_path / "run", "--epochs", "1000")
    in_training(group, tmp_path / "run")
    group[victim].kill()
    struck = time.monotonic()
    code, _, error = ended(group)[1 - victim]
    assert time.monotonic() - struck < 30
    assert (code == 76 and "another process of this run has ended" in error) or (
        code == -signal.SIGABRT and "another task died" in error
    )
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    group = started(then, photos, tmp_path / "run", "--epochs", "1000")
    limit = threading.Timer(LIMIT, lambda: [process.kill() for process in group])
    limit.start()
    try:
        out = next(line for line in group[0].stdout if "going on" in line)
    finally:
        limit.cancel()
        for process in group:
            process.kill()
            process.communicate()
    assert int(re.search(r"going on at epoch (\d+), batch 1 ", out)[1]) in (
        done,
        done + 1,
        done + 2,
    )


@pytest.mark.slow
def test_what_differs_between_processes_is_said_by_each(photos, tmp_path):
    found = ended(
        started(2, photos, tmp_path / "run", "--epochs", "1", own={1: ["--weight-decay", "0.1"]})
    )
    for code, _, error in found:
        assert code == 2 and error.count("\n") == 1
        assert re.search(r"in process \d weight_decay is 0\.\d+; expected", error)


@pytest.mark.slow
def test_what_the_first_finds_wrong_ends_all(photos, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{")
    found = ended(started(2, photos, tmp_path / "run", "--epochs", "1"))
    assert [code for code, _, _ in found] == [2, 2], found
    assert all("run.json cannot be read" in error for _, _, error in found)


HAND = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
}
SLURM["SLURM_STEP_NUM_TASKS"] = "2"
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_COMM_WORLD_SIZE": "2",
}


OPEN_MPI_5 = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (HAND, "JAX_COORDINATOR_ADDRESS=10.0.0.1:1234"),
        (HAND | SLURM, "JAX_COORDINATOR_ADDRESS=10.0.0.1:1234"),
        ({"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234"}, None),
        (SLURM, "SLURM"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # one task, or a shell that salloc gave
        (OPEN_MPI, "Open MPI"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a notebook in a cluster
    ],
)
def test_engines_are_found_by_what_they_set(environment, expected):
    assert multihost.detect_cluster(environment) == expected


@pytest.mark.parametrize(
    ("mode", "environment"),
    [
        ("on", {}),
        ("auto", HAND | {"JAX_NUM_PROCESSES": "two"}),
        ("perhaps", {}),
        ("auto", OPEN_MPI_5),
    ],
)
def test_what_cannot_be_joined_is_said(mode, environment):
    with pytest.raises(InputError, match="expected"):
        multihost.initialize(mode, environment)


def test_nothing_is_joined_where_nothing_is_found():
    assert multihost.initialize("auto", {}) is multihost.initialize("off", HAND) is None


def test_a_stuck_process_ends_itself():
    program = """
import time, jax
jax.process_count = lambda: 2
from vgg_jax.distributed.multihost import Alarm
with Alarm(0.5) as alarm:
    for _ in range(8):
        time.sleep(0.1)
        alarm.heartbeat()
    print("on", flush=True)
    time.sleep(60)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, cwd=ROOT
    )
    assert (found.returncode, found.stdout) == (76, "on\n")
    assert "process 0 did no step in 0 s" in found.stderr and found.stderr.count("\n") == 1
