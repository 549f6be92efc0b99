"""ReLU and pooling by 2x2 windows; of both maxima the gradients keep less than XLA's own. Shapes are (N, H, W, C)."""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax


@jax.custom_vjp
def relu(x: Array) -> Array:
    """max(x, 0). What came in need not be kept for the gradient: what went out, which the next layer keeps, tells the same."""
    return lax.platform_dependent(
        x,
        cpu=lambda x: jnp.maximum(_wide(x), 0).astype(x.dtype),
        default=lambda x: jnp.maximum(x, 0),
    )


def _wide(x: Array) -> Array:
    """At least float32: the maximum of bfloat16 numbers takes a CPU ten times as long (8x224x224x64, pooled: 17 ms, 1.8)."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _relu(x: Array) -> tuple[Array, Array]:
    y = relu(x)
    return y, y


def _relu_gradient(y: Array, g: Array) -> tuple[Array]:
    # Without the barrier XLA asks what came in all the same: on a GPU 3.8 of 11.9 GB and 3 % of the time of a step (net D, batch 256,
    # bfloat16). On a CPU, where the bias is added again for each reader, nothing is kept twice, and the barrier takes 12 % more.
    y = lax.platform_dependent(y, cpu=lambda y: y, default=lax.optimization_barrier)
    return (jnp.where(y > 0, g, 0),)


relu.defvjp(_relu, _relu_gradient)


def max_pool(x: Array, ceil: bool = False, fuse_relu: bool = False) -> Array:
    """(N, H, W, C) -> (N, H // 2, W // 2, C): the maximum of each 2x2 window, with `fuse_relu` of its ReLU.

    Of an odd side the last row or column is left out, or with `ceil`, as in Caffe, pooled by itself. Its gradient keeps a byte for each
    window, which says where the maxima are, and neither the map nor its ReLU. No select-and-scatter: that is 3 to 5 times slower on a
    CPU, and on a GPU refused in XLA's deterministic mode. Equal maxima share their gradient; PyTorch gives it to the first.
    """
    if ceil:
        x = jnp.pad(
            x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)), constant_values=-jnp.inf
        )
    return _max_of_windows(crop_to_even(x), fuse_relu)


def crop_to_even(x: Array) -> Array:
    """Without the last row or column of an odd side."""
    return x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]


def _pixels(x: Array) -> list[Array]:
    """The four pixels of all 2x2 windows. As a reduction over them their maximum takes a CPU 2 to 7 times as long."""
    return [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_of_windows(x: Array, fuse_relu: bool) -> Array:
    y = functools.reduce(jnp.maximum, map(_wide, _pixels(x)))
    return (jnp.maximum(y, 0) if fuse_relu else y).astype(x.dtype)


def max_pool_fwd(x: Array, fuse_relu: bool) -> tuple[Array, Array]:
    """The maxima, (N, H // 2, W // 2, C), and a byte for each: a bit is set where that pixel is it, and a ReLU lets it pass."""
    y = _max_of_windows(x, fuse_relu)
    passes = (y > 0) | (not fuse_relu)
    bits = [
        ((pixel == y) & passes).astype(jnp.uint8) << place for place, pixel in enumerate(_pixels(x))
    ]
    return lax.optimization_barrier((y, functools.reduce(jnp.bitwise_or, bits)))


def max_pool_bwd(fuse_relu: bool, bits: Array, g: Array) -> tuple[Array]:
    """(N, h, w, C) -> (N, 2 h, 2 w, C), the gradient of `max_pool_fwd`."""
    bits = lax.stop_gradient(bits)  # for second derivatives: jax has none of whole numbers
    share = g / jnp.maximum(lax.population_count(bits), 1).astype(g.dtype)
    place = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
    here = bits[:, :, None, :, None] >> place & 1
    n, h, w, c = g.shape
    return (jnp.where(here == 1, share[:, :, None, :, None], 0).reshape(n, 2 * h, 2 * w, c),)


_max_of_windows.defvjp(max_pool_fwd, max_pool_bwd)


def avg_pool(x: Array) -> Array:
    """(N, H, W, C) -> (N, H // 2, W // 2, C): the mean of each 2x2 window; of an odd side the last row or column is left out."""
    n, h, w, c = x.shape
    return crop_to_even(x).reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


def pool_mask(there: Array, ceil: bool = False) -> Array:
    """bool (N, H, W, 1) -> (N, H // 2, W // 2, 1): where an image, that fills an array only where it is `there`, has a value once pooled.

    That is where all of a 2x2 window is the image's, or with `ceil` any of it.
    """
    if ceil:
        there = jnp.pad(there, ((0, 0), (0, there.shape[1] % 2), (0, there.shape[2] % 2), (0, 0)))
    share = avg_pool(there.astype(jnp.float32))
    return share > 0 if ceil else share == 1
