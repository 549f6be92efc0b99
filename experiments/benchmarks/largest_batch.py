"""Finds the largest training batch that fits into the device's memory, to a sixteenth of it.

    python -m experiments.benchmarks.largest_batch --first 256 --net D --image-size 224 --fc 4096 \\
        --dtype bfloat16 [--microbatch 64]
    (ulimit -v 6000000; python -m experiments.benchmarks.largest_batch …)    # on a Linux CPU

Half a minute for each try; each is a process of its own. All flags but --first go to
`bench_step.py`. Prints that script's JSON line for the largest batch that fits, with "refused": the
smallest batch that does not. On a GPU it has not been run to its end (results/gpu.json).
"""

import argparse
import json
import subprocess
import sys
from typing import Any

from experiments.script import HelpFormatter, run

OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "bad_alloc", "Out of memory", "Cannot allocate memory")
KILLED = (-9, -6)  # SIGKILL by the kernel, SIGABRT by an allocation that failed


def try_batch(batch: int, flags: list[str]) -> dict[str, Any] | None:
    """Returns the JSON object of `bench_step.py`, or None if the memory is too small."""
    script = [sys.executable, "-m", "experiments.benchmarks.bench_step"]
    process = subprocess.run(
        [*script, "--batch", str(batch), *flags], capture_output=True, text=True
    )
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    if process.returncode in KILLED or any(words in process.stderr for words in OUT_OF_MEMORY):
        return None
    print(process.stderr, end="", file=sys.stderr)
    sys.exit(2)


def search(first: int, unit: int, flags: list[str]) -> dict[str, Any]:
    """Bisects between the largest batch that fits and the smallest that does not.

    Args:
        first: The batch to try first.
        unit: Every other batch is a multiple of it.
        flags: Flags of `bench_step.py`.
    """
    result, refused, batch = None, None, first
    while True:
        if batch < unit:
            sys.exit(
                f"not even a batch of {refused} fits: "
                "set a smaller --first, or a smaller --microbatch"
            )
        latest = try_batch(batch, flags)
        if latest is None:
            refused = batch
        else:
            result = latest
        accepted = result["batch"] if result else 0
        if accepted and refused and refused - accepted <= max(unit, accepted // 16):
            return {**result, "refused": refused}
        batch = (accepted + (refused or 4 * batch)) // 2 // unit * unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--first", type=int, default=64, help="the batch to try first")
    parser.add_argument("--microbatch", type=int, help="images at a time")
    args, flags = parser.parse_known_args()
    if args.microbatch is not None:
        flags += ["--microbatch", str(args.microbatch)]
    print(json.dumps(search(args.first, args.microbatch or 1, flags)))


if __name__ == "__main__":
    run(main)
