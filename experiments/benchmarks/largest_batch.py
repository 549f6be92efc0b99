"""The largest batch whose training step the device here has memory for, to a sixteenth of it; each try is a process of its own.

    python -m experiments.benchmarks.largest_batch --first 256 --net D --image-size 224 --fc 4096 --dtype bfloat16 [--microbatch 64]

All but --first are `bench_step.py`'s flags. Prints its JSON line for the largest batch that was taken, with "refused", the smallest that
was not. On a Linux CPU set the memory first: (ulimit -v 6000000; python -m experiments.benchmarks.largest_batch …). It takes half a minute a try;
on a GPU it has not been run to its end (results/gpu.json).
"""

import argparse
import json
import subprocess
import sys

from experiments.script import run

NO_MEMORY = ("RESOURCE_EXHAUSTED", "bad_alloc", "Out of memory", "Cannot allocate memory")


def step(batch: int, flags: list[str]) -> dict | None:
    """What `bench_step.py` prints for it, or None where the memory is too little."""
    command = [
        sys.executable,
        "-m",
        "experiments.benchmarks.bench_step",
        "--batch",
        str(batch),
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode in (-9, -6) or any(words in done.stderr for words in NO_MEMORY):
        return None
    print(done.stderr, end="", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=int, default=64)
    parser.add_argument("--microbatch", type=int)
    args, flags = parser.parse_known_args()
    unit = args.microbatch or 1
    flags += [] if args.microbatch is None else ["--microbatch", str(args.microbatch)]
    found, batch, refused = None, args.first, None
    while (
        refused is None
        or found is None
        or refused - found["batch"] > max(unit, found["batch"] // 16)
    ):
        if batch < unit:
            sys.exit(
                f"not even a batch of {refused} fits: set a smaller --first, or a smaller --microbatch"
            )
        done = step(batch, flags)
        found, refused = (done, refused) if done else (found, batch)
        low, high = (found["batch"] if found else 0), refused or 4 * batch
        batch = (low + high) // 2 // unit * unit
    print(json.dumps({**found, "refused": refused}))


if __name__ == "__main__":
    run(main)
