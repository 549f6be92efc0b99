"""ReLU and 2x2 pooling, with gradients that store less than XLA's own.

The gradient of `relu` uses its output, which the next layer keeps anyway. The gradient of
`max_pool` uses one byte for each window instead of the input. XLA's own uses select-and-scatter,
which is slow on a CPU and refused by XLA's deterministic mode on a GPU
(docs/performance.md#relu-and-pooling). Activations have the shape (N, H, W, C).
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from vgg_jax.ops.explicit_sharding import map_over_batch


@jax.custom_jvp
def relu(x: Array) -> Array:
    """Rectifies: max(x, 0).

    The derivative uses the output, which the next layer keeps anyway, so the input is not stored.

    Args:
        x: Array of any shape.

    Returns:
        Array of the same shape.
    """
    return lax.platform_dependent(
        x,
        cpu=lambda x: jnp.maximum(_at_least_float32(x), 0).astype(x.dtype),
        default=lambda x: jnp.maximum(x, 0),
    )


def _at_least_float32(x: Array) -> Array:
    """Widens 16-bit numbers: a CPU is slow at the maximum of bfloat16 numbers."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


@relu.defjvp
def _relu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    y = relu(*primals)
    # Without the barrier, XLA replaces `y > 0` by a test of the input and also keeps the input. A
    # CPU adds the bias again in each reader, so nothing is kept twice, and a barrier costs time
    # (docs/performance.md#relu-and-pooling).
    saved = lax.platform_dependent(y, cpu=lambda y: y, default=lax.optimization_barrier)
    return y, jnp.where(saved > 0, *tangents, 0)


def max_pool(x: Array, ceil: bool = False, fuse_relu: bool = False) -> Array:
    """Max-pools 2x2 windows with stride 2.

    The gradient stores one byte for each window, which marks the maxima. Equal maxima share the
    gradient; PyTorch gives it to the first of them.

    Args:
        x: Input (N, H, W, C).
        ceil: Pool the last row or column of an odd size by itself, as Caffe does. By default it
            is dropped.
        fuse_relu: Also apply a ReLU.

    Returns:
        Output (N, H // 2, W // 2, C), with `ceil` rounded up.
    """

    def pool(x: Array) -> Array:
        if ceil:
            pad = ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0))
            x = jnp.pad(x, pad, constant_values=-jnp.inf)
        return _max_of_windows(crop_to_even(x), fuse_relu)

    return map_over_batch(pool, (x,), ())


def crop_to_even(x: Array) -> Array:
    """Drops the last row or column of an odd size.

    Args:
        x: Array (N, H, W, …).

    Returns:
        Array (N, H // 2 * 2, W // 2 * 2, …).
    """
    return x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]


def _pixels(x: Array) -> list[Array]:
    """The four pixels of every 2x2 window, as four arrays.

    On a CPU their maximum is faster than a reduction (docs/performance.md#relu-and-pooling).
    """
    return [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_of_windows(x: Array, fuse_relu: bool) -> Array:
    y = functools.reduce(jnp.maximum, map(_at_least_float32, _pixels(x)))
    return (jnp.maximum(y, 0) if fuse_relu else y).astype(x.dtype)


def max_pool_fwd(x: Array, fuse_relu: bool) -> tuple[Array, Array]:
    """Max-pools even sizes, with the residual for the derivative.

    Args:
        x: Input (N, 2 h, 2 w, C).
        fuse_relu: Also apply a ReLU.

    Returns:
        The pooled output (N, h, w, C) and the uint8 bits, of the same shape. Bit i of a window is
        set if its pixel i equals the maximum, and a fused ReLU passes it.
    """
    y = _max_of_windows(x, fuse_relu)
    passes = (y > 0) | (not fuse_relu)
    bits = [((pixel == y) & passes).astype(jnp.uint8) << i for i, pixel in enumerate(_pixels(x))]
    return lax.optimization_barrier((y, functools.reduce(jnp.bitwise_or, bits)))


@functools.partial(jax.checkpoint, prevent_cse=False)  # the gradient stores nothing but the bits
def pool_tangent(bits: Array, tangent: Array) -> Array:
    """Derivative of `max_pool_fwd`: the mean tangent of the maxima of each window.

    Args:
        bits: The uint8 bits (N, h, w, C) of `max_pool_fwd`.
        tangent: Tangent (N, 2 h, 2 w, C) of its input.

    Returns:
        Tangent (N, h, w, C) of its output. Its transpose is the gradient.
    """
    n, h, w, c = bits.shape
    windows = tangent.reshape(n, h, 2, w, 2, c)
    pixel = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
    is_max = bits[:, :, None, :, None] >> pixel & 1
    total = jnp.where(is_max == 1, windows, 0).sum((2, 4))
    return total / jnp.maximum(lax.population_count(bits), 1).astype(tangent.dtype)


@_max_of_windows.defjvp
def _max_of_windows_jvp(
    fuse_relu: bool, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    y, bits = max_pool_fwd(*primals, fuse_relu)
    return y, pool_tangent(bits, *tangents)


def avg_pool(x: Array) -> Array:
    """Averages 2x2 windows with stride 2; the last row or column of an odd size is dropped.

    Args:
        x: Input (N, H, W, C).

    Returns:
        Output (N, H // 2, W // 2, C).
    """

    def pool(x: Array) -> Array:
        n, h, w, c = x.shape
        return crop_to_even(x).reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))

    return map_over_batch(pool, (x,), ())


def pool_mask(valid_mask: Array, ceil: bool = False) -> Array:
    """Pools a validity mask.

    Args:
        valid_mask: bool (N, H, W, 1), True where the pixel belongs to an image.
        ceil: As in `max_pool`.

    Returns:
        bool (N, H // 2, W // 2, 1), with `ceil` rounded up. A pooled pixel is valid if all of its
        window is; with `ceil`, if any of it is.
    """
    if ceil:
        pad = ((0, 0), (0, valid_mask.shape[1] % 2), (0, valid_mask.shape[2] % 2), (0, 0))
        valid_mask = jnp.pad(valid_mask, pad)
    share = avg_pool(valid_mask.astype(jnp.float32))
    return share > 0 if ceil else share == 1
