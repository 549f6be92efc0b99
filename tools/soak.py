"""Checks that faults do not change a training run: kills, signals, full disks, damaged files.

    python -m tools.soak --minutes 60 --seed 0 > soak.json

A run trains a tiny net on the digits for 100 epochs: 10,200 steps, 100 evaluations, and a save
every two seconds and after each epoch. One run is undisturbed. Its resident memory, the memory
that malloc has allocated, and its open files are logged. Each other run suffers one kind of fault
at random moments, from the first import on. The same command restarts it until it ends. Then its
checkpoints and records are compared with those of the undisturbed run, to the bit. A step that was
lost, or done twice, would show.

The result is one JSON document. For each kind of fault it has the number of trials, of runs, and of
runs that differ from the undisturbed one. `slowest_end_s` is the longest time from a signal to the
end of the process.
"""

import argparse
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.script import HelpFormatter
from tests.helpers.runs import TIME_FIELDS
from tests.programs.soak_train import RESOURCE_LOG
from tests.programs.train_tiny import register_nets
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.model import build_model
from vgg_jax.runs.checkpoint import CheckpointStore
from vgg_jax.runs.metadata import load_run
from vgg_jax.training.checkpointer import abstract_state, model_variables
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import init_state

BATCH_SIZE, EPOCHS, TRAIN_SIZE = 16, 100, 1617
FLAGS = shlex.split(
    "digits --net shallow --image-size 16 --scale 16 18 --fc 24 16 --dropout-rate 0.5 "
    f"--colour-shift 0.1 --batch-size {BATCH_SIZE} --microbatch 8 --epochs {EPOCHS} "
    "--schedule step --drop-epochs 50 --save-seconds 2"
)


class Fault(NamedTuple):
    """A kind of fault."""

    name: str
    signal: signal.Signals
    damages_checkpoint: bool = False
    fills_disk: bool = False


FAULTS = (
    Fault("kill -9", signal.SIGKILL),
    Fault("SIGTERM", signal.SIGTERM),
    Fault("SIGINT", signal.SIGINT),
    Fault("kill -9, and the newest checkpoint damaged", signal.SIGKILL, damages_checkpoint=True),
    Fault("disk full, then kill -9", signal.SIGKILL, fills_disk=True),
)
# 75 is a stop that can be resumed. A signal may come before Python handles it.
EXIT_CODES = {0, 75, 130, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT}
DISK_FULL = 74


def result(workdir: Path) -> tuple[Any, Any]:
    """Loads the lasting result of a run.

    Args:
        workdir: The folder of a run that ended.

    Returns:
        `(arrays, values)`: the arrays of the last and the best checkpoint, and the rest. The rest
        is `(records, history, batch, best_progress)`, without the times.

    Raises:
        ValueError: The last or the best checkpoint is missing.
    """
    run = load_run(workdir)
    model = build_model(run.config, len(run.classes))
    state = init_state(model, make_optimizer(run.config), 0, make_mesh(1, jax.devices()[:1]))
    with (
        CheckpointStore(workdir / "last", read_only=True) as last,
        CheckpointStore(workdir / "best", read_only=True) as best,
    ):
        last_restored = last.restore(abstract_state(state))
        best_restored = best.restore(model_variables(state))
    if last_restored is None or best_restored is None:
        raise ValueError(f"{workdir} has no last or no best checkpoint: expected a run that ended")
    (last_arrays, progress), (best_arrays, best_progress) = last_restored, best_restored
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in (*records, *progress["history"]):
        for name in TIME_FIELDS:
            record.pop(name)
    values = (records, progress["history"], progress["batch"], best_progress)
    return (last_arrays, best_arrays), values


def is_equal(workdir: Path, other: Path) -> bool:
    """Tells if two runs have the same result, to the bit."""
    (arrays, values), (other_arrays, other_values) = result(workdir), result(other)
    return values == other_values and all(
        jax.tree.leaves(jax.tree.map(np.array_equal, arrays, other_arrays))
    )


def start(
    workdir: Path,
    cache: Path,
    log: Path,
    preexec: Callable[[], None] | None = None,
    resource_log: Path | None = None,
) -> subprocess.Popen:
    """Starts or resumes a run in a process.

    Args:
        workdir: The folder of the run.
        cache: The folder of compiled programs.
        log: The file for its output.
        preexec: Called in the process before it starts.
        resource_log: The file for the memory and files that it uses.
    """
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    if resource_log:
        environment[RESOURCE_LOG] = str(resource_log)
    command = [sys.executable, "-m", "tests.programs.soak_train", *FLAGS, "--workdir", str(workdir)]
    # `limit_file_size` would limit the log, too.
    with Path(os.devnull if preexec else log).open("a") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, preexec_fn=preexec
        )


def summarize_resources(resource_log: Path) -> dict[str, Any]:
    """Summarizes a resource log at five moments: 10, 30, 50, 70 and 90 % of the process's life."""
    lines = [line.split() for line in resource_log.read_text().splitlines()]
    samples = [lines[int(len(lines) * fraction)] for fraction in (0.1, 0.3, 0.5, 0.7, 0.9)]
    resident, allocated, files = zip(*samples, strict=True)
    return {
        "resident_mb": [round(float(value)) for value in resident],
        "given_out_mb": [round(float(value), 1) for value in allocated],
        "open_files": [int(value) for value in files],
    }


def limit_file_size() -> None:
    """Limits this process's files to 20 kB, so that saving fails midway, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def damage_newest_checkpoint(workdir: Path, rng: random.Random) -> bool:
    """Cuts, empties, removes or changes a random file of the newest checkpoint.

    Args:
        workdir: The folder of a run.
        rng: The source of the choices.

    Returns:
        True if a file was damaged. A checkpoint without a previous one is left alone.
    """
    steps = sorted(
        (path for path in (workdir / "last").glob("*") if path.name.isdigit()),
        key=lambda path: int(path.name),
    )
    files = [path for path in steps[-1].rglob("*") if path.is_file()] if len(steps) > 1 else []
    if not files:
        return False
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    match rng.randrange(4):
        case 0:
            file.write_bytes(content[: len(content) // 2])
        case 1:
            file.write_bytes(b"")
        case 2:
            file.unlink()
        case 3 if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
        case _:
            return False
    return True


def run_with_fault(
    fault: Fault, workdir: Path, cache: Path, log: Path, max_wait: float, rng: random.Random
) -> tuple[int, float]:
    """Trains a run to its end, and injects a fault again and again.

    Args:
        fault: The kind of fault.
        workdir: The folder of the run.
        cache: The folder of compiled programs.
        log: The file for the output.
        max_wait: The longest time in seconds until the next fault.
        rng: The source of the moments.

    Returns:
        The number of faults, and the longest time in seconds from a signal to the process's end.

    Raises:
        RuntimeError: A process ended with an unexpected exit code.
    """
    num_faults, slowest_end = 0, 0.0
    while True:
        preexec = limit_file_size if fault.fills_disk and rng.random() < 0.5 else None
        process = start(workdir, cache, log, preexec)
        try:
            code = process.wait(rng.uniform(0.5, max_wait))
        except subprocess.TimeoutExpired:
            signal_time = time.monotonic()
            process.send_signal(fault.signal)
            code = process.wait(60)
            slowest_end = max(slowest_end, time.monotonic() - signal_time)
            if not fault.damages_checkpoint or damage_newest_checkpoint(workdir, rng):
                num_faults += 1
        if code not in EXIT_CODES and not (code == DISK_FULL and fault.fills_disk):
            raise RuntimeError(f"{fault.name}: the run ended with {code}, see {log}")
        if code == 0:
            return num_faults, slowest_end


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    register_nets()
    rng, deadline = random.Random(args.seed), time.monotonic() + 60 * args.minutes
    folder = Path(tempfile.mkdtemp())
    cache, log = folder / "cache", folder / "log"
    start(folder / "warm-up", cache, log).wait()
    start_time = time.monotonic()
    start(folder / "undisturbed", cache, log, resource_log=folder / "resources").wait()
    undisturbed_seconds = time.monotonic() - start_time
    undisturbed = summarize_resources(folder / "resources")
    if not is_equal(folder / "undisturbed", folder / "warm-up"):
        raise RuntimeError(f"two undisturbed runs in {folder} differ: expected them to be equal")
    results = {
        fault.name: {"trials": 0, "runs": 0, "runs_that_differ": 0, "slowest_end_s": 0.0}
        for fault in FAULTS
    }
    while time.monotonic() < deadline:
        for fault in FAULTS:
            workdir = folder / "run"
            num_faults, slowest_end = run_with_fault(
                fault, workdir, cache, log, undisturbed_seconds / 2, rng
            )
            row = results[fault.name]
            row["trials"] += num_faults
            row["runs"] += 1
            row["runs_that_differ"] += not is_equal(workdir, folder / "undisturbed")
            row["slowest_end_s"] = round(max(row["slowest_end_s"], slowest_end), 1)
            shutil.rmtree(workdir)
            print(fault.name, row, file=sys.stderr, flush=True)
    document = {
        "steps": EPOCHS * -(-TRAIN_SIZE // BATCH_SIZE),
        "evaluations": EPOCHS,
        "undisturbed_seconds": round(undisturbed_seconds),
        "undisturbed": undisturbed,
        "faults": results,
    }
    print(json.dumps(document, indent=1))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
