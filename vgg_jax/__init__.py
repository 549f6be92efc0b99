"""VGG (Simonyan & Zisserman, arXiv 1409.1556) in JAX/Flax."""

import importlib
from typing import TYPE_CHECKING, Any

from vgg_jax.configs.colours import IMAGENET, ColourStatistics
from vgg_jax.configs.models import CONFIGS, Conv, VGGConfig
from vgg_jax.configs.presets import preset
from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError

if TYPE_CHECKING:
    from vgg_jax.inference import compile_inference
    from vgg_jax.model import (
        VGG,
        copy_matching_layers,
        vgg11,
        vgg11_lrn,
        vgg13,
        vgg16,
        vgg16_c,
        vgg19,
    )
    from vgg_jax.runtime.compiler import compiler_options

__all__ = [
    "CONFIGS",
    "IMAGENET",
    "VGG",
    "Conv",
    "InputError",
    "ColourStatistics",
    "TrainConfig",
    "VGGConfig",
    "compile_inference",
    "compiler_options",
    "copy_matching_layers",
    "load",
    "preset",
    "vgg11",
    "vgg11_lrn",
    "vgg13",
    "vgg16",
    "vgg16_c",
    "vgg19",
]

# What needs jax is imported when it is asked for: `vgg-jax --help` answers in a tenth of a second.
_LATER = {
    "compile_inference": "vgg_jax.inference",
    "compiler_options": "vgg_jax.runtime.compiler",
    **dict.fromkeys(
        ("VGG", "copy_matching_layers", "vgg11", "vgg11_lrn", "vgg13", "vgg16", "vgg16_c", "vgg19"),
        "vgg_jax.model",
    ),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(path, net=None):
    """A network: `(model, variables, metadata)`, of a run's folder or of a file of weights, ours or another library's.

    See `vgg_jax.runs.checkpoint.load_best` and `vgg_jax.weights.load_file`. `net` says which net a file holds where its shapes do not: "A-LRN".
    """
    from vgg_jax.weights import load

    return load(path, net)
