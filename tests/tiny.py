"""A small net, and what the tests do with it."""

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax import CONFIGS, Conv, VGGConfig, compiler_options

# A with an eighth of its widths and less: the same layers, one tenth of the time.
TINY = VGGConfig(tuple(tuple(c._replace(width=8 * i) for c in stage) for i, stage in enumerate(CONFIGS["A"].stages, 1)), fc=(24, 16))

# Two stages, of one layer and of two: what a training loop needs of a net, compiled in a few seconds.
SHALLOW = VGGConfig(((Conv(8),), (Conv(16),)), fc=(24, 16))
DEEP = VGGConfig(((Conv(8), Conv(8)), (Conv(16), Conv(16))), fc=(24, 16))


def init(model, key=0):
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    return jax.jit(lambda key: model.lazy_init(key, images), compiler_options=compiler_options())(jax.random.key(key))


def images(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=(*shape, 3)))
