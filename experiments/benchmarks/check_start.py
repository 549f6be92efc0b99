"""How long `vgg-jax train` takes from its start to the end of the first step, with nothing compiled before and then with it.

    python -m experiments.benchmarks.check_start digits
    python -m experiments.benchmarks.check_start PHOTOS --net D --batch-size 8

Takes what `vgg-jax train` takes, and prints one JSON line: the seconds of the first and of the second run, and those of `vgg-jax --help`.
On two cores 17.1 and 9.9 s for the digits (results/start.json).
"""

import json
import os
import sys
import tempfile
import time

from experiments.script import run, stdout_of

FIRST_STEP = """
import os, sys, time
import jax
from vgg_jax import cli
from vgg_jax.training import loop

compiled = loop.compile_steps

def compile_steps(*arguments, **options):
    train_step, eval_step = compiled(*arguments, **options)

    def first(state, batch):
        jax.block_until_ready(train_step(state, batch))
        print("first step after", time.time() - float(sys.argv[1]), flush=True)
        os._exit(0)

    first.lower = train_step.lower  # by which it is compiled
    return first, eval_step

loop.compile_steps = compile_steps
sys.exit(cli.main(["train", *sys.argv[2:]]))
"""


def seconds_to_first_step(flags: list[str], cache: str) -> float:
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-c", FIRST_STEP, str(time.time()), *flags, "--workdir", workdir]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
        output = stdout_of(command, env=environment)
    return float(output.split("first step after ")[1].split()[0])


def main() -> None:
    flags = sys.argv[1:]
    if not flags or flags[0] in ("-h", "--help"):
        sys.exit(__doc__)
    started = time.perf_counter()
    stdout_of([sys.executable, "-m", "vgg_jax", "--help"])
    helped = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as cache:
        first, second = (seconds_to_first_step(flags, cache) for _ in range(2))
    print(
        json.dumps(
            {
                "train": flags,
                "first_seconds": round(first, 2),
                "second_seconds": round(second, 2),
                "help_seconds": round(helped, 3),
            }
        )
    )


if __name__ == "__main__":
    run(main)
