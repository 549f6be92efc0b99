"""A small net, and what the tests do with it."""

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax import CONFIGS, Conv, VGGConfig

# A with an eighth of its widths and less: the same layers, one tenth of the time.
TINY = VGGConfig(tuple(tuple(c._replace(width=8 * i) for c in stage) for i, stage in enumerate(CONFIGS["A"].stages, 1)), fc=(24, 16))

# Two stages, of one layer and of two: what a training loop needs of a net, compiled in a few seconds.
SHALLOW = VGGConfig(((Conv(8),), (Conv(16),)), fc=(24, 16))
DEEP = VGGConfig(((Conv(8), Conv(8)), (Conv(16), Conv(16))), fc=(24, 16))


def init(model, seed=0):
    """Kernels by He, drawn by NumPy: a program that draws them takes seconds to compile."""
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        values = (
            rng.normal(0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape)
            if name == "kernel"
            else np.full(leaf.shape, name in ("scale", "var"))
        )
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.lazy_init, jax.random.key(0), images))


def images(*shape, seed=0):
    return jnp.float32(np.random.default_rng(seed).normal(size=(*shape, 3)))
