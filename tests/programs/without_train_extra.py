"""Runs `summary A` and `train` as if the packages of vgg-jax[train] were missing."""

import sys

HIDDEN = ("tensorflow", "tensorflow_datasets", "sklearn", "tqdm", "PIL", "optax", "orbax")
sys.modules |= dict.fromkeys(HIDDEN)

from vgg_jax.cli import main  # noqa: E402

if main(["summary", "A"]) != 0:
    raise SystemExit("summary failed")
sys.exit(main(["train"]))
