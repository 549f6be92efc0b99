"""Weights of VGGs: read from runs and files of several libraries, written to files."""

from vgg_jax.weights.reader import load, load_file, read
from vgg_jax.weights.weights import Weights, from_loaded
from vgg_jax.weights.writer import save

__all__ = ["Weights", "from_loaded", "load", "load_file", "read", "save"]
