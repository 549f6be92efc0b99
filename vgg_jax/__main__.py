"""Runs the command line: `python -m vgg_jax` is the same as `vgg-jax`."""

import sys

from vgg_jax.cli import main

sys.exit(main())
