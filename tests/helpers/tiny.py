"""A small net, and what the tests do with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax import CONFIGS, Conv, VGGConfig

# A with an eighth of its widths and less: the same layers, one tenth of the time.
TINY = VGGConfig(
    tuple(
        tuple(c._replace(features=8 * i) for c in stage)
        for i, stage in enumerate(CONFIGS["A"].stages, 1)
    ),
    fc=(24, 16),
)

# Two stages, of one layer and of two: what a training loop needs of a net, compiled in a few seconds.
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
    """Drawn by NumPy, since a program that draws takes seconds to compile: by He, the FC layers' kernels with a deviation of 0.01."""
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return jnp.float32(
                rng.normal(
                    0, np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim == 4 else 0.01, leaf.shape
                )
            )
        return jnp.ones(leaf.shape) if name in ("scale", "var") else jnp.zeros(leaf.shape)

    return jax.tree_util.tree_map_with_path(
        draw, jax.eval_shape(model.lazy_init, jax.random.key(0), images)
    )


def images(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=(*shape, 3)))
