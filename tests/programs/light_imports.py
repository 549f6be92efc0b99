"""Prints which of jax, flax and tensorflow the modules import that `vgg-jax --help` needs."""

import importlib
import sys

from vgg_jax.cli import main

for name in (
    "vgg_jax.cli.parser",
    "vgg_jax.configs.colours",
    "vgg_jax.configs.evaluation",
    "vgg_jax.configs.export",
    "vgg_jax.configs.models",
    "vgg_jax.configs.presets",
    "vgg_jax.configs.train",
    "vgg_jax.errors",
    "vgg_jax.paths",
    "vgg_jax.runtime.compilation_cache",
    "vgg_jax.runtime.memory",
    "vgg_jax.runtime.signals",
    "vgg_jax.weights.fetch",
    "vgg_jax.weights.pretrained",
):
    importlib.import_module(name)
try:
    main(["train", "--help"])
except SystemExit as error:
    print(error.code, sorted({"jax", "flax", "tensorflow"} & sys.modules.keys()))
