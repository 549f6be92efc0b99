"""`python -m vgg_jax` is `vgg-jax`."""

import sys

from vgg_jax.cli import main

sys.exit(main())
