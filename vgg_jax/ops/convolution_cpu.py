"""Convolution on a CPU.

Three of the four float32 paths replace a slow XLA path:

- Feature maps smaller than the kernel: matrix products (`vgg_jax.ops.small_maps`).
- Inputs of at most `MAX_IMAGE_CHANNELS` channels: XLA forward, im2col for the gradients
  (docs/performance.md#image-gradients).
- 3x3 kernels: Winograd, with 36 multiplications per 4x4 output tile instead of 144. It runs block
  by block, and applies the epilogue while a block is in cache (docs/performance.md#winograd).
- Other kernels: XLA, with gradients as convolutions in its own order of dimensions
  (docs/performance.md#5x5-kernels).

3x3 bfloat16 convolutions run in oneDNN where it is faster than float32 (`vgg_jax.ops.bfloat16`).
XLA does not delegate kernel gradients to it, so those are computed in float32. All other 16-bit
convolutions run in float32 too, except on maps smaller than the kernel
(docs/performance.md#onednn-and-bfloat16).

Activations have the shape (N, H, W, C), kernels (k, k, C, K).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from vgg_jax.ops import winograd
from vgg_jax.ops.bfloat16 import choose_bfloat16_conv
from vgg_jax.ops.bilinear import bilinear_conv
from vgg_jax.ops.epilogue import (
    NO_EPILOGUE,
    Epilogue,
    EpilogueResiduals,
    add_tangents,
    apply_epilogue,
    bias_relu_pool_fwd,
    broadcast_bias,
    epilogue_gradient,
    epilogue_tangent,
    is_zero,
    pooled_bias_tangent,
)
from vgg_jax.ops.pooling import crop_to_even
from vgg_jax.ops.small_maps import small_map_conv, windows
from vgg_jax.ops.xla import DIMENSION_NUMBERS, MAX_IMAGE_CHANNELS, xla_conv

# The first layer's gradients are computed for this many positions at a time, so that their windows
# stay in cache (docs/performance.md#image-gradients).
_CHUNK_POSITIONS = 224 * 224


def cpu_conv(
    x: Array, kernel: Array, bias: Array, epilogue: Epilogue, filters: Array | None = None
) -> Array:
    """Convolves on a CPU by the path that is fastest for the shape and dtype.

    Args:
        x: Input (N, H, W, C).
        kernel: Kernel (k, k, C, K), k odd and larger than 1.
        bias: Bias (K,).
        epilogue: Operations after the bias.
        filters: Winograd's filters of the kernel, if they were computed in advance.

    Returns:
        (N, H, W, K), or (N, H // 2, W // 2, K) if the epilogue pools.
    """
    (h, w, c), size = x.shape[1:], kernel.shape[0]
    if min(h, w) < size:
        y = small_map_conv(x, kernel)
    elif jnp.finfo(x.dtype).bits < 32:
        y = _conv_16_bit(x, kernel, filters)
    elif c <= MAX_IMAGE_CHANNELS:
        return _conv_few_channels(x, kernel, bias, epilogue)
    elif size == 3:
        if filters is not None:
            return _conv_with_filters(x, filters, bias, epilogue)
        return _conv_winograd(x, kernel, bias, epilogue)
    else:
        y = _conv_xla(x, kernel)
    return apply_epilogue(y, bias, epilogue)


def _conv_16_bit(x: Array, kernel: Array, filters: Array | None) -> Array:
    """Convolves in bfloat16 by oneDNN if that is faster, else in float32.

    XLA's own 16-bit convolution is many times slower, and Winograd's transforms need float32.
    """
    is_candidate = x.dtype == jnp.bfloat16 and kernel.shape[0] == 3 and filters is None
    if is_candidate and choose_bfloat16_conv().training_in_onednn:
        return _conv_onednn(x, kernel)
    zeros = jnp.zeros(kernel.shape[-1], jnp.float32)
    y = cpu_conv(x.astype(jnp.float32), kernel.astype(jnp.float32), zeros, NO_EPILOGUE, filters)
    return y.astype(x.dtype)


# Kernels larger than 3x3


def _xla_input_gradient(kernel: Array, g: Array, *, shape: tuple[int, ...]) -> Array:
    return xla_conv(g, lax.optimization_barrier(kernel.swapaxes(2, 3))[::-1, ::-1])


def _xla_kernel_gradient(x: Array, g: Array, *, shape: tuple[int, ...]) -> Array:
    """Convolves with images as channels, channels as images, and `g` as the kernel."""
    images, kernel = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    images, kernel = lax.optimization_barrier((images, kernel))
    pad = (shape[0] // 2, shape[0] // 2)
    gradient = lax.conv_general_dilated(
        images, kernel, (1, 1), (pad, pad), dimension_numbers=DIMENSION_NUMBERS
    )
    return gradient.transpose(1, 2, 0, 3)


# XLA computes a convolution in its own order of dimensions in a fast library. It reorders others
# by itself only outside of loops and called functions (docs/performance.md#5x5-kernels).
_conv_xla = bilinear_conv(
    "xla_conv",
    forward=xla_conv,
    input_gradient=_xla_input_gradient,
    kernel_gradient=_xla_kernel_gradient,
)


# The first layer: few input channels


@jax.custom_jvp
def _conv_few_channels(x: Array, kernel: Array, bias: Array, epilogue: Epilogue) -> Array:
    """Convolves an image: XLA forward, im2col for the gradients.

    XLA's forward pass beats im2col and Winograd here (docs/performance.md#image-gradients). The
    residuals are those of `_conv_winograd`.
    """
    return apply_epilogue(xla_conv(x, kernel), bias, epilogue)


def _conv_few_channels_fwd(
    x: Array, kernel: Array, bias: Array, epilogue: Epilogue
) -> tuple[Array, EpilogueResiduals]:
    kind = epilogue.kind
    if kind == "relu_pool":
        y, bits = bias_relu_pool_fwd(crop_to_even(xla_conv(x, kernel)), bias)
        return y, EpilogueResiduals(kind, bits)
    y = _conv_few_channels(x, kernel, bias, epilogue)
    if kind == "relu":
        # Without the barrier, XLA computes bias and ReLU again for the gradient.
        y = lax.optimization_barrier(y)
    return y, EpilogueResiduals(kind, y if kind == "relu" else None)


@functools.partial(_conv_few_channels.defjvp, symbolic_zeros=True)
def _conv_few_channels_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, kernel, bias, _ = primals
    dx, dkernel, dbias, _ = tangents
    y, res = _conv_few_channels_fwd(*primals)
    terms = []
    if not (is_zero(dkernel) and is_zero(dbias)):
        dkernel = jnp.zeros_like(kernel) if is_zero(dkernel) else dkernel
        dbias = jnp.zeros_like(bias) if is_zero(dbias) else dbias
        rows = _append_bias(dkernel, dbias)
        terms.append(_conv_rows(_append_channel(x, 1), rows, res))
    if not is_zero(dx):
        terms.append(_conv_rows(_append_channel(dx, 0), _append_bias(kernel, bias), res))
    return y, add_tangents(terms, y)


def _append_channel(x: Array, value: float) -> Array:
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=value)


def _append_bias(kernel: Array, bias: Array) -> Array:
    """The kernel (k, k, C, K) and the bias (K,) as the rows of a matrix (k · k · C + 1, K)."""
    return jnp.concatenate([kernel.reshape(-1, len(bias)), bias[None]])


def _rows_forward(x: Array, rows: Array, res: EpilogueResiduals) -> Array:
    """Derivative of convolution, bias and epilogue. The last channel of x belongs to the bias."""
    image, bias_channel = x[..., :-1], x[..., -1:]
    size = math.isqrt(len(rows) // image.shape[-1])
    kernel = rows[:-1].reshape(size, size, image.shape[-1], -1)
    return epilogue_tangent(res, xla_conv(image, kernel) + bias_channel @ rows[-1:])


def _rows_input_gradient(
    rows: Array, g: Array, res: EpilogueResiduals, *, shape: tuple[int, ...]
) -> Array:
    channels = shape[-1] - 1
    size = math.isqrt(len(rows) // channels)
    image = jnp.zeros_like(g, shape=(*shape[:-1], channels))
    _, pullback = jax.vjp(lambda x: windows(x, size) @ rows[:-1], image)
    grad_output = epilogue_gradient(res, g, (*shape[:-1], rows.shape[-1]))
    bias_channel = grad_output @ rows[-1:].T
    return jnp.concatenate([*pullback(grad_output), bias_channel], axis=-1)


def _rows_kernel_gradient(
    x: Array, g: Array, res: EpilogueResiduals, *, shape: tuple[int, ...]
) -> Array:
    """Kernel and bias gradients by im2col.

    A few images are taken at a time, so that every array is still in cache when it is read
    (docs/performance.md#image-gradients).
    """
    acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
    size = math.isqrt(shape[0] // (x.shape[-1] - 1))
    chunk_size = _images_per_chunk(x.shape)

    def add_chunk(
        total: Array, chunk: tuple[Array, EpilogueResiduals, Array]
    ) -> tuple[Array, None]:
        x, res, g = chunk
        grad_output = epilogue_gradient(res, g, (*x.shape[:-1], shape[-1]))
        grad_output = lax.optimization_barrier(grad_output.astype(acc_dtype))
        columns = [windows(x[..., :-1].astype(acc_dtype), size), x[..., -1:].astype(acc_dtype)]
        matrix = lax.optimization_barrier(jnp.concatenate(columns, axis=-1))
        rows = matrix.reshape(-1, matrix.shape[-1])
        return total + rows.T @ grad_output.reshape(-1, shape[-1]), None

    chunks = jax.tree.map(lambda a: a.reshape(-1, chunk_size, *a.shape[1:]), (x, res, g))
    total, _ = lax.scan(add_chunk, jnp.zeros_like(x, acc_dtype, shape), chunks)
    return total.astype(x.dtype)


_conv_rows = bilinear_conv(
    "first_conv",
    forward=_rows_forward,
    input_gradient=_rows_input_gradient,
    kernel_gradient=_rows_kernel_gradient,
)


def _images_per_chunk(shape: tuple[int, ...]) -> int:
    """The largest divisor of the batch that has at most `_CHUNK_POSITIONS` positions, or 1."""
    n, h, w, _ = shape
    divisors = (i for i in range(1, n + 1) if n % i == 0)
    return max((i for i in divisors if i * h * w <= _CHUNK_POSITIONS), default=1)


# oneDNN


def _onednn_input_gradient(kernel: Array, g: Array, *, shape: tuple[int, ...]) -> Array:
    # XLA delegates this convolution to oneDNN only if the barrier hides that its kernel is rotated.
    return xla_conv(g, lax.optimization_barrier(kernel.swapaxes(2, 3)[::-1, ::-1]))


def _onednn_kernel_gradient(x: Array, g: Array, *, shape: tuple[int, ...]) -> Array:
    # XLA does not delegate kernel gradients to oneDNN.
    if x.shape[-1] > MAX_IMAGE_CHANNELS:
        return winograd.kernel_gradient(x, g).astype(x.dtype)
    rows = math.prod(shape[:-1]) + 1, shape[-1]
    gradient = _rows_kernel_gradient(_append_channel(x, 0), g, EpilogueResiduals(), shape=rows)
    return gradient[:-1].reshape(shape)


# bfloat16 with a 3x3 kernel, which XLA delegates to oneDNN.
_conv_onednn = bilinear_conv(
    "onednn_conv",
    forward=xla_conv,
    input_gradient=_onednn_input_gradient,
    kernel_gradient=_onednn_kernel_gradient,
)


# Winograd


@jax.custom_jvp
def _conv_winograd(x: Array, kernel: Array, bias: Array, epilogue: Epilogue) -> Array:
    """Convolves with a 3x3 kernel.

    The residuals are the input, and the output of a ReLU or the bits of a pooling.
    """
    return _conv_with_filters(x, winograd.transform_filters(kernel), bias, epilogue)


def _conv_with_filters(x: Array, filters: Array, bias: Array, epilogue: Epilogue) -> Array:
    def apply_to_block(y: Array, mask: Array | None = None) -> Array:
        return apply_epilogue(y, bias, Epilogue(epilogue.kind, mask))

    extra_inputs = [] if epilogue.mask is None else [epilogue.mask]
    return winograd.convolve(x, filters, apply_to_block, *extra_inputs)


def _conv_winograd_fwd(
    x: Array, kernel: Array, bias: Array, epilogue: Epilogue
) -> tuple[Array, EpilogueResiduals]:
    kind = epilogue.kind
    if kind == "relu_pool":
        filters = winograd.transform_filters(kernel)
        y, bits = winograd.convolve(x, filters, lambda y: bias_relu_pool_fwd(y, bias))
        return y, EpilogueResiduals(kind, bits)
    y = _conv_winograd(x, kernel, bias, epilogue)
    return y, EpilogueResiduals(kind, y if kind == "relu" else None)


@functools.partial(_conv_winograd.defjvp, symbolic_zeros=True)
def _conv_winograd_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, kernel, _, _ = primals
    dx, dkernel, dbias, _ = tangents
    y, res = _conv_winograd_fwd(*primals)
    is_pooled = res.kind == "relu_pool"
    terms = []
    if not is_zero(dx):
        terms.append(_winograd(dx, kernel))
    if not is_zero(dkernel):
        terms.append(_winograd(x, dkernel))
    if not (is_pooled or is_zero(dbias)):
        terms.append(broadcast_bias(dbias, y.shape))
    # The barrier is for the transpose: the gradient is computed once, for three readers.
    outputs = [epilogue_tangent(res, lax.optimization_barrier(sum(terms)))] if terms else []
    if is_pooled and not is_zero(dbias):
        outputs.append(pooled_bias_tangent(res.saved, dbias))
    return y, add_tangents(outputs, y)


def _winograd_forward(x: Array, kernel: Array) -> Array:
    return winograd.convolve(x, winograd.transform_filters(kernel))


def _winograd_input_gradient(kernel: Array, g: Array, *, shape: tuple[int, ...]) -> Array:
    # A fused transpose is slower (docs/performance.md#winograd).
    kernel = lax.optimization_barrier(kernel.swapaxes(2, 3))
    return winograd.convolve(g, winograd.transform_filters(kernel, rotated=True))


_winograd = bilinear_conv(
    "winograd_conv",
    forward=_winograd_forward,
    input_gradient=_winograd_input_gradient,
    kernel_gradient=lambda x, g, *, shape: winograd.kernel_gradient(x, g),
)
