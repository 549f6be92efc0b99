"""VGG (Simonyan & Zisserman, arXiv 1409.1556) in JAX/Flax."""

from vgg_jax.configs import CONFIGS, IMAGENET, Conv, Statistics, TrainConfig, VGGConfig
from vgg_jax.errors import InputError
from vgg_jax.inference import compile_inference
from vgg_jax.layers import compiler_options
from vgg_jax.model import VGG, init_from, vgg11, vgg11_lrn, vgg13, vgg16, vgg16_c, vgg19
from vgg_jax.presets import preset

__all__ = [
    "CONFIGS",
    "IMAGENET",
    "VGG",
    "Conv",
    "InputError",
    "Statistics",
    "TrainConfig",
    "VGGConfig",
    "compile_inference",
    "compiler_options",
    "init_from",
    "load",
    "preset",
    "vgg11",
    "vgg11_lrn",
    "vgg13",
    "vgg16",
    "vgg16_c",
    "vgg19",
]


def load(path, net=None):
    """A network: `(model, variables, metadata)`, of a run's folder or of a file of weights, ours or another library's.

    See `vgg_jax.checkpoint.load` and `vgg_jax.weights.load_file`. `net` says which net a file holds where its shapes do not: "A-LRN".
    """
    from vgg_jax.weights import load

    return load(path, net)
