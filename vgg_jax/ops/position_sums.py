"""Sums over the positions of feature maps, and factors of channels whose gradients are such sums.

Batch normalisation needs them. XLA's reduction over (N, H, W) is slow on a CPU
(docs/performance.md#batch-normalisation). There, a matrix product with ones adds positions, and
`position_dot` multiplies a few rows of the maps at a time, while they are in cache. No product adds
all positions: one long sum in float32 would be less accurate.

Activations have the shape (N, H, W, C).
"""

import jax.numpy as jnp
from jax import Array, lax

from vgg_jax.ops.bilinear import bilinear_conv
from vgg_jax.ops.explicit_sharding import explicit_spec

# Bytes of the rows of maps that are multiplied and added at a time.
_CHUNK_BYTES = 2**19


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
    """Adds the rows of all maps, and then the positions of the row."""
    n, h, w, c = x.shape
    row = jnp.ones((1, n * h), x.dtype) @ x.reshape(n * h, w * c)
    return row.reshape(w, c).sum(0)


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
    rows = _largest_divisor(n * h, _CHUNK_BYTES // max(w * c * a.dtype.itemsize, 1))
    shape = (n * h // rows, rows * w, c)
    ones = jnp.ones((1, rows * w), a.dtype)
    sums = lax.map(
        lambda chunk: (ones @ (chunk[0] * chunk[1]))[0], (a.reshape(shape), b.reshape(shape))
    )
    return sums.sum(0)


def _largest_divisor(count: int, limit: int) -> int:
    """The largest divisor of a number that is at most a limit, or 1."""
    return max((i for i in range(1, min(count, limit) + 1) if count % i == 0), default=1)


def _scale(x: Array, factor: Array, **_: object) -> Array:
    return x * factor[None, None, None]


def _dot(a: Array, b: Array, **_: object) -> Array:
    return lax.platform_dependent(a, b, cpu=_chunked_dot, default=_sum_of_products)


# The sum of a · b · g is linear in each of them, like that of a convolution.
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
