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


@jax.custom_vjp
def relu(x: Array) -> Array:
    """Rectifies: max(x, 0).

    The gradient uses the output, which the next layer keeps anyway, so the input is not stored.

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


def _relu_fwd(x: Array) -> tuple[Array, Array]:
    y = relu(x)
    return y, y


def _relu_bwd(y: Array, g: Array) -> tuple[Array]:
    # Without the barrier, XLA replaces `y > 0` by a test of the input and also keeps the input. A
    # CPU adds the bias again in each reader, so nothing is kept twice, and a barrier costs time
    # (docs/performance.md#relu-and-pooling).
    y = lax.platform_dependent(y, cpu=lambda y: y, default=lax.optimization_barrier)
    return (jnp.where(y > 0, g, 0),)


relu.defvjp(_relu_fwd, _relu_bwd)


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
    if ceil:
        pad = ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0))
        x = jnp.pad(x, pad, constant_values=-jnp.inf)
    return _max_of_windows(crop_to_even(x), fuse_relu)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_of_windows(x: Array, fuse_relu: bool) -> Array:
    y = functools.reduce(jnp.maximum, map(_at_least_float32, _pixels(x)))
    return (jnp.maximum(y, 0) if fuse_relu else y).astype(x.dtype)


def max_pool_fwd(x: Array, fuse_relu: bool) -> tuple[Array, Array]:
    """Max-pools even sizes, with the residual for the gradient.

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


def max_pool_bwd(fuse_relu: bool, bits: Array, g: Array) -> tuple[Array]:
    """Gradient of `max_pool_fwd` with respect to its input. A rule of `jax.custom_vjp`.

    Args:
        fuse_relu: As in `max_pool_fwd`; `bits` already depends on it.
        bits: The uint8 bits (N, h, w, C) of `max_pool_fwd`.
        g: Gradient (N, h, w, C) with respect to the pooled output.

    Returns:
        A tuple of the gradient (N, 2 h, 2 w, C).
    """
    bits = lax.stop_gradient(bits)  # JAX cannot differentiate integers a second time
    share = g / jnp.maximum(lax.population_count(bits), 1).astype(g.dtype)
    pixel = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
    is_max = bits[:, :, None, :, None] >> pixel & 1
    n, h, w, c = g.shape
    return (jnp.where(is_max == 1, share[:, :, None, :, None], 0).reshape(n, 2 * h, 2 * w, c),)


_max_of_windows.defvjp(max_pool_fwd, max_pool_bwd)


def avg_pool(x: Array) -> Array:
    """Averages 2x2 windows with stride 2; the last row or column of an odd size is dropped.

    Args:
        x: Input (N, H, W, C).

    Returns:
        Output (N, H // 2, W // 2, C).
    """
    n, h, w, c = x.shape
    return crop_to_even(x).reshape(n, h // 2, 2, w // 2, 2, c).mean((2, 4))


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
