"""Small nets, their variables and images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax import CONFIGS, Conv, VGGConfig

# Net A with an eighth of its features or fewer: the same layers, but fast.
TINY = VGGConfig(
    tuple(
        tuple(conv._replace(features=8 * i) for conv in stage)
        for i, stage in enumerate(CONFIGS["A"].stages, 1)
    ),
    fc=(24, 16),
)

# The smallest nets that exercise a training loop. They have two stages and compile in seconds.
SHALLOW = VGGConfig(((Conv(8),), (Conv(16),)), fc=(24, 16))
DEEP = VGGConfig(((Conv(8), Conv(8)), (Conv(16), Conv(16))), fc=(24, 16))


def narrow(name):
    """A published configuration with few channels."""
    config = CONFIGS[name]
    stages = tuple(
        tuple(conv._replace(features=4 * i) for conv in stage)
        for i, stage in enumerate(config.stages, 1)
    )
    return dataclasses.replace(config, stages=stages, fc=(12, 8))


def init(model, seed=0):
    """Variables of a model, drawn by NumPy: jax would compile for seconds.

    Convolutions are initialised by He's rule, fully connected layers with a deviation of 0.01.
    """
    shape = (1, model.image_size, model.image_size, model.in_channels)
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    shapes = jax.eval_shape(model.lazy_init, jax.random.key(0), image)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            is_conv = leaf.ndim == 4
            deviation = np.sqrt(2 / np.prod(leaf.shape[:-1])) if is_conv else 0.01
            return jnp.float32(rng.normal(0, deviation, leaf.shape))
        return jnp.ones(leaf.shape) if name in ("scale", "var") else jnp.zeros(leaf.shape)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def images(*shape, channels=3, seed=0):
    """Normal random float32 images (*shape, channels)."""
    return jnp.float32(np.random.default_rng(seed).normal(size=(*shape, channels)))
