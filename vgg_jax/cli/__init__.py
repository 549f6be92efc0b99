"""The command line `vgg-jax`."""

from vgg_jax.cli.commands import main

__all__ = ["main"]
