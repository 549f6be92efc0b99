"""Trains again and again while it is killed, stopped, starved and refused, and compares each run with a quiet one, to the bit.

    python -m tools.soak --minutes 60 --seed 0 > soak.json

A run is 100 epochs of a tiny net on the digits: 10,200 steps, 100 evaluations, saved every two seconds and behind each epoch. The quiet one
is watched: its resident memory, what of it malloc has given out and not got back, and its open files. The others go through one fault at
random moments, from the first import on, and are started again by the same command until they are done. Prints one JSON document: for each
fault how often it struck, how many runs came of that, how many of those ended otherwise than the quiet one (a step that is lost, or done
twice, would show), and the longest time from a signal to the process's end.
"""

import argparse
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tests.helpers.tiny import SHALLOW
from vgg_jax import CONFIGS
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.model import build_model
from vgg_jax.runs.checkpoint import CheckpointStore
from vgg_jax.runs.metadata import load_run
from vgg_jax.training.checkpointer import abstract_state, model_variables
from vgg_jax.training.optimizer import sgd
from vgg_jax.training.step import init_state

CLOCK = ("time", "seconds", "images_per_second", "input_wait_seconds")
BATCH, EPOCHS = 16, 100
SEEN = "VGG_JAX_SOAK_SEEN"  # the file that a watched process writes
# As the command line would, had it this net.
COMMAND = """
import sys
from tools.soak import watch, with_small_net
with_small_net()
watch()
from vgg_jax.cli import main
sys.exit(main())
"""


def with_small_net() -> None:
    CONFIGS["shallow"] = SHALLOW


def result(workdir: Path) -> tuple[Any, Any]:
    """All that lasts of a run: the arrays of its last and its best checkpoint; its records but for the clock, and the rest of both."""
    run = load_run(workdir)
    state = init_state(
        build_model(run.config, len(run.classes)),
        sgd(run.config),
        0,
        make_mesh(1, jax.devices()[:1]),
    )
    with (
        CheckpointStore(workdir / "last", read_only=True) as last,
        CheckpointStore(workdir / "best", read_only=True) as best,
    ):
        found, net = last.restore(abstract_state(state)), best.restore(model_variables(state))
    assert found is not None and net is not None
    (restored, progress), (variables, known) = found, net
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for record in (*records, *progress["history"]):
        for name in CLOCK:
            record.pop(name)
    return (restored, variables), (records, progress["history"], progress["batch"], known)


def equal(one: Path, other: Path) -> bool:
    (arrays, said), (same_arrays, same_said) = result(one), result(other)
    return said == same_said and all(
        jax.tree.leaves(jax.tree.map(np.array_equal, arrays, same_arrays))
    )


def started(
    workdir: Path,
    cache: Path,
    log: Path,
    preexec: Callable[[], None] | None = None,
    seen: Path | None = None,
) -> subprocess.Popen:
    argv = [
        "train",
        "digits",
        "--net",
        "shallow",
        "--image-size",
        "16",
        "--scale",
        "16",
        "18",
        "--fc",
        "24",
        "16",
        "--dropout-rate",
        "0.5",
    ]
    argv += [
        "--colour-shift",
        "0.1",
        "--batch-size",
        str(BATCH),
        "--microbatch",
        "8",
        "--epochs",
        str(EPOCHS),
    ]
    argv += [
        "--schedule",
        "step",
        "--drop-epochs",
        "50",
        "--save-seconds",
        "2",
        "--workdir",
        str(workdir),
    ]
    environment = (
        os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)} | ({SEEN: str(seen)} if seen else {})
    )
    with (
        Path(os.devnull).open("a") if preexec else log.open("a") as file
    ):  # the limit on the size of files is the log's, too
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *argv],
            stdout=file,
            stderr=file,
            env=environment,
            preexec_fn=preexec,
        )


class MallInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns, of all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def watch() -> None:
    """If asked for by the environment, writes a line five times a second: resident MB, MB given out by malloc, open files."""
    if SEEN not in os.environ:
        return
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallInfo

    def write() -> None:
        with Path(os.environ[SEEN]).open("w") as file:
            while True:
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
                    "SC_PAGE_SIZE"
                )
                info = libc.mallinfo2()
                print(
                    resident / 1e6,
                    (info.uordblks + info.hblkhd) / 1e6,
                    len(os.listdir("/proc/self/fd")),
                    file=file,
                    flush=True,
                )
                time.sleep(0.2)

    threading.Thread(target=write, daemon=True).start()


def watched(seen: Path) -> dict[str, Any]:
    """What `watch` wrote, at a tenth, three, five, seven and nine tenths of the process's life."""
    lines = [line.split() for line in seen.read_text().splitlines()]
    places = [lines[int(len(lines) * share)] for share in (0.1, 0.3, 0.5, 0.7, 0.9)]
    resident, given_out, files = zip(*places, strict=True)
    return {
        "resident_mb": [round(float(each)) for each in resident],
        "given_out_mb": [round(float(each), 1) for each in given_out],
        "open_files": [int(each) for each in files],
    }


def full_disk() -> None:
    """No file grows beyond 20 kB: writing a checkpoint fails, as on a full disk, in the middle."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def damage(workdir: Path, rng: random.Random) -> bool:
    """Of the newest checkpoint, if there is one before it, one file is cut, emptied, removed, or has a bit changed."""
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


FAULTS = (
    "kill -9",
    "SIGTERM",
    "SIGINT",
    "kill -9, and the newest checkpoint damaged",
    "disk full, then kill -9",
)
ENDS = {
    0,
    75,
    -signal.SIGKILL,
    -signal.SIGTERM,
    -signal.SIGINT,
    130,
}  # a signal may come before Python listens


def disturbed(
    fault: str, workdir: Path, cache: Path, log: Path, longest: float, rng: random.Random
) -> tuple[int, float]:
    """How often the fault struck until the run was done, and the longest time that a signal took to end the process."""
    struck, slowest = 0, 0.0
    while True:
        process = started(
            workdir,
            cache,
            log,
            full_disk if fault.startswith("disk") and rng.random() < 0.5 else None,
        )
        try:
            code = process.wait(rng.uniform(0.5, longest))
        except subprocess.TimeoutExpired:
            sent = time.monotonic()
            process.send_signal(
                {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}.get(fault, signal.SIGKILL)
            )
            code = process.wait(60)
            slowest = max(slowest, time.monotonic() - sent)
            struck += damage(workdir, rng) if "damaged" in fault else 1
        if code not in ENDS and not (code == 74 and fault.startswith("disk")):
            raise RuntimeError(f"{fault}: the run ended with {code}, see {log}")
        if code == 0:
            return struck, slowest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with_small_net()
    rng, end = random.Random(args.seed), time.monotonic() + 60 * args.minutes
    folder = Path(tempfile.mkdtemp())
    cache, log = folder / "cache", folder / "log"
    started(folder / "warm-up", cache, log).wait()
    begun = time.monotonic()
    started(folder / "quiet", cache, log, seen=folder / "seen").wait()
    seconds, quiet = time.monotonic() - begun, watched(folder / "seen")
    assert equal(folder / "quiet", folder / "warm-up")
    found = {
        fault: {"struck": 0, "runs": 0, "runs_that_differ": 0, "slowest_end_s": 0.0}
        for fault in FAULTS
    }
    while time.monotonic() < end:
        for fault in FAULTS:
            struck, slowest = disturbed(fault, folder / "run", cache, log, seconds / 2, rng)
            row = found[fault]
            row["struck"] += struck
            row["runs"] += 1
            row["runs_that_differ"] += not equal(folder / "run", folder / "quiet")
            row["slowest_end_s"] = round(max(row["slowest_end_s"], slowest), 1)
            shutil.rmtree(folder / "run")
            print(fault, row, file=sys.stderr, flush=True)
    steps = EPOCHS * -(-1617 // BATCH)
    print(
        json.dumps(
            {
                "steps": steps,
                "evaluations": EPOCHS,
                "quiet_seconds": round(seconds),
                "quiet": quiet,
                "faults": found,
            },
            indent=1,
        )
    )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
