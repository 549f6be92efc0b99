"""`vgg-jax train` with the nets of the tests, for tests that need a process.

python -m tests.programs.train_tiny DATA --net shallow …
"""

import sys

from tests.helpers.tiny import DEEP, SHALLOW
from vgg_jax import CONFIGS, cli


def register_nets() -> None:
    """Adds the nets "shallow" and "deep" to those of the command line."""
    CONFIGS.update(shallow=SHALLOW, deep=DEEP)


def main() -> int:
    register_nets()
    sys.argv.insert(1, "train")
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
