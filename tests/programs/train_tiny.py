"""Runs `vgg-jax train` with the tests' small nets.

python -m tests.programs.train_tiny DATA --net shallow …
"""

import sys

from tests.helpers.tiny import DEEP, SHALLOW
from vgg_jax import CONFIGS

CONFIGS |= {"shallow": SHALLOW, "deep": DEEP}

from vgg_jax.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    sys.exit(main())
