"""Runs `vgg-jax train` up to the end of its first step, for check_start.

python -m experiments.benchmarks.first_step START_TIME FLAGS…
"""

import os
import sys
import time

import jax

from vgg_jax import cli
from vgg_jax.training import loop
from vgg_jax.training.trainer import Trainer


class FirstStepTrainer(Trainer):
    """Prints the seconds since START_TIME after the first step, and ends the process."""

    def train_step(self, state, batch):
        jax.block_until_ready(super().train_step(state, batch))
        print("first step after", time.time() - float(sys.argv[1]), flush=True)
        os._exit(0)


if __name__ == "__main__":
    loop.Trainer = FirstStepTrainer
    sys.exit(cli.main(["train", *sys.argv[2:]]))
