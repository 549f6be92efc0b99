"""Sums over the positions of feature maps, as batch normalisation needs them.

XLA's reduction over (N, H, W) is slow on a CPU (docs/performance.md#batch-normalisation). There, a
few images at a time are multiplied while they are in cache, and a matrix product with ones adds
them. Activations have the shape (N, H, W, C).
"""

import jax.numpy as jnp
from jax import Array, lax

from vgg_jax.ops.bilinear import bilinear_conv
from vgg_jax.ops.explicit_sharding import explicit_spec

# Bytes of the images that are multiplied and added at a time.
_CHUNK_BYTES = 2**20


def position_dot(a: Array, b: Array) -> Array:
    """Sums a · b over all positions.

    Args:
        a: Array (N, H, W, C).
        b: Array of the same shape and type.

    Returns:
        The sums (C,).
    """
    if _is_left_to_xla(a, b):
        return _sum_of_products(a, b)
    return _position_dot(a, b)


def position_sum(x: Array) -> Array:
    """Sums over all positions.

    Args:
        x: Array (N, H, W, C).

    Returns:
        The sums (C,).
    """
    if _is_left_to_xla(x):
        return x.sum((0, 1, 2))
    return lax.platform_dependent(x, cpu=_sum_by_product, default=lambda x: x.sum((0, 1, 2)))


def _sum_by_product(x: Array) -> Array:
    return (jnp.ones((1, x.size // x.shape[-1]), x.dtype) @ x.reshape(-1, x.shape[-1]))[0]


def channel_scale(x: Array, factor: Array) -> Array:
    """Multiplies each channel by a factor, with a fast gradient of the factors.

    Args:
        x: Array (N, H, W, C).
        factor: Factors (C,).

    Returns:
        The product (N, H, W, C).
    """
    if _is_left_to_xla(x, factor):
        return _scale(x, factor)
    return _channel_scale(x, factor)


def _is_left_to_xla(*arrays: Array) -> bool:
    """Tells if an array has a sharding over explicit axes, or a symbolic size from jax.export."""
    return any(
        any(explicit_spec(array)) or not all(isinstance(size, int) for size in array.shape)
        for array in arrays
    )


def _sum_of_products(a: Array, b: Array) -> Array:
    return (a * b).sum((0, 1, 2))


def _chunked_dot(a: Array, b: Array) -> Array:
    n, h, w, c = a.shape
    size = _images_per_chunk(n, h * w * c * a.dtype.itemsize)
    ones = jnp.ones((1, size * h * w), a.dtype)
    shape = (n // size, size * h * w, c)
    sums = lax.map(
        lambda chunk: (ones @ (chunk[0] * chunk[1]))[0], (a.reshape(shape), b.reshape(shape))
    )
    return sums.sum(0)


def _images_per_chunk(count: int, num_bytes: int) -> int:
    """The largest divisor of the number of images that fits into a chunk, or 1."""
    divisors = (i for i in range(1, count + 1) if count % i == 0)
    return max((i for i in divisors if i * num_bytes <= _CHUNK_BYTES), default=1)


def _scale(x: Array, factor: Array, **_: object) -> Array:
    return x * factor[None, None, None]


def _dot(a: Array, b: Array, **_: object) -> Array:
    return lax.platform_dependent(a, b, cpu=_chunked_dot, default=_sum_of_products)


_position_dot = bilinear_conv(
    "position_dot",
    forward=_dot,
    input_gradient=_scale,
    kernel_gradient=_scale,
    is_matrix_product=True,
)
_channel_scale = bilinear_conv(
    "channel_scale",
    forward=_scale,
    input_gradient=lambda factor, g, *, shape: _scale(g, factor),
    kernel_gradient=_dot,
    is_matrix_product=True,
)
