"""Weights of VGGs: from files, ours or another library's, and into files."""

from vgg_jax.weights.io import Weights, load, load_file, read, save

__all__ = ["Weights", "load", "load_file", "read", "save"]
