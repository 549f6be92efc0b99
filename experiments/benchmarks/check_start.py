"""Measures the time from the start of `vgg-jax train` to the end of its first step.

    python -m experiments.benchmarks.check_start digits
    python -m experiments.benchmarks.check_start PHOTOS --net D --batch-size 8

It takes the flags of `vgg-jax train` and runs the command twice: with an empty compilation cache,
and with the programs of the first run. It prints one JSON line: the seconds of both runs, and
those of `vgg-jax --help`. On two cores the digits took 17.1 and 9.9 s (results/start.json).
"""

import json
import os
import sys
import tempfile
import time

from experiments.script import run, stdout_of


def seconds_to_first_step(flags: list[str], cache: str) -> float:
    program = [sys.executable, "-m", "experiments.benchmarks.first_step"]
    with tempfile.TemporaryDirectory() as workdir:
        command = [*program, str(time.time()), *flags, "--workdir", workdir]
        output = stdout_of(command, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache})
    return float(output.split("first step after ")[1].split()[0])


def main() -> None:
    flags = sys.argv[1:]
    if flags in (["-h"], ["--help"]):
        print(__doc__)
        return
    if not flags:
        sys.exit(__doc__)
    start = time.perf_counter()
    stdout_of([sys.executable, "-m", "vgg_jax", "--help"])
    help_seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as cache:
        first, second = (seconds_to_first_step(flags, cache) for _ in range(2))
    result = {
        "train": flags,
        "first_seconds": round(first, 2),
        "second_seconds": round(second, 2),
        "help_seconds": round(help_seconds, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
