"""`vgg-jax train` with the tests' small nets, for processes of their own: python -m tests.programs.train_tiny DATA --net shallow …"""

import sys

from tests.helpers.tiny import DEEP, SHALLOW
from vgg_jax import CONFIGS
from vgg_jax.configs.train import CHOICES

CONFIGS |= {"shallow": SHALLOW, "deep": DEEP}
CHOICES["net"] = tuple(CONFIGS)

from vgg_jax.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    sys.exit(main())
