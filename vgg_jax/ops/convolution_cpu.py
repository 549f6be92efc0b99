"""Convolution on a CPU.

Three of the four float32 paths replace a slow XLA path:

- Feature maps smaller than the kernel: im2col, one matrix product
  (docs/performance.md#im2col-on-small-maps).
- Inputs of at most `MAX_IMAGE_CHANNELS` channels: XLA forward, im2col for the gradients
  (docs/performance.md#image-gradients).
- 3x3 kernels: Winograd, with 36 multiplications per 4x4 output tile instead of 144. It runs block
  by block, and applies the epilogue while a block is in cache (docs/performance.md#winograd).
- Other kernels: XLA (docs/performance.md#5x5-kernels).

3x3 bfloat16 convolutions run in oneDNN where XLA delegates them (`has_onednn_bfloat16`). XLA does
not delegate kernel gradients, so those are computed in float32. All other 16-bit convolutions run
in float32 too, except on maps smaller than the kernel (docs/performance.md#onednn-and-bfloat16).

Activations have the shape (N, H, W, C), kernels (k, k, C, K).
"""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from vgg_jax.ops import winograd
from vgg_jax.ops.epilogue import (
    NO_EPILOGUE,
    Epilogue,
    EpilogueResiduals,
    apply_epilogue,
    bias_relu_pool_fwd,
    epilogue_grad,
    materialize_on_cpu,
    pooled_bias_grad,
    sum_nhw,
)
from vgg_jax.ops.pooling import crop_to_even
from vgg_jax.ops.xla import MAX_IMAGE_CHANNELS, xla_conv
from vgg_jax.runtime.compiler import has_onednn_bfloat16

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
        y = _conv_im2col(x, kernel)
    elif jnp.finfo(x.dtype).bits < 32:
        y = _conv_16_bit(x, kernel, filters)
    elif c <= MAX_IMAGE_CHANNELS:
        return _conv_few_channels(x, kernel, bias, epilogue)
    elif size == 3:
        if filters is not None:
            return _conv_with_filters(x, filters, bias, epilogue)
        return _conv_winograd(x, kernel, bias, epilogue)
    else:
        y = xla_conv(x, kernel)
    return apply_epilogue(y, bias, epilogue)


def _conv_16_bit(x: Array, kernel: Array, filters: Array | None) -> Array:
    """Convolves in bfloat16 by oneDNN if possible, else in float32.

    XLA's own 16-bit convolution is many times slower, and Winograd's transforms need float32.
    """
    if x.dtype == jnp.bfloat16 and kernel.shape[0] == 3 and has_onednn_bfloat16():
        return _conv_onednn(x, kernel)
    zeros = jnp.zeros(kernel.shape[-1], jnp.float32)
    y = cpu_conv(x.astype(jnp.float32), kernel.astype(jnp.float32), zeros, NO_EPILOGUE, filters)
    return y.astype(x.dtype)


# Im2col


def _windows(x: Array, size: int) -> Array:
    """The size x size window around each position: (N, H, W, C) -> (N, H, W, size · size · C)."""
    h, w = x.shape[1:3]
    pad = (size // 2, size // 2)
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    shifted = [x[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]
    return jnp.concatenate(shifted, axis=-1)


def _im2col(x: Array, kernel: Array) -> Array:
    return _windows(x, kernel.shape[0]) @ kernel.reshape(-1, kernel.shape[-1])


@jax.custom_vjp
def _conv_im2col(x: Array, kernel: Array) -> Array:
    """Convolves maps smaller than the kernel."""
    return _im2col(x, kernel)


def _conv_im2col_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _conv_im2col(x, kernel), (x, kernel)


def _conv_im2col_bwd(res: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = res
    windows = lax.optimization_barrier(_windows(x, kernel.shape[0]))
    # JAX's own kernel gradient would transpose `g` first.
    grad_kernel = windows.reshape(-1, windows.shape[-1]).T @ g.reshape(-1, g.shape[-1])
    # The transpose of `_windows` would add nine arrays, rounding to bfloat16 each time. A
    # convolution with the rotated kernel is a single product.
    rotated = lax.optimization_barrier(kernel.swapaxes(2, 3))[::-1, ::-1]
    return _im2col(g, rotated), grad_kernel.reshape(kernel.shape)


_conv_im2col.defvjp(_conv_im2col_fwd, _conv_im2col_bwd)


# The first layer: few input channels


@jax.custom_vjp
def _conv_few_channels(x: Array, kernel: Array, bias: Array, epilogue: Epilogue) -> Array:
    """Convolves an image: XLA forward, im2col for the gradients.

    XLA's forward pass beats im2col and Winograd here (docs/performance.md#image-gradients). The
    residuals are those of `_conv_winograd`.
    """
    return apply_epilogue(xla_conv(x, kernel), bias, epilogue)


def _conv_few_channels_fwd(
    x: Array, kernel: Array, bias: Array, epilogue: Epilogue
) -> tuple[Array, tuple]:
    kind = epilogue.kind
    if kind == "relu_pool":
        y, bits = bias_relu_pool_fwd(crop_to_even(xla_conv(x, kernel)), bias)
        return y, (x, kernel, EpilogueResiduals(kind, bits))
    y = _conv_few_channels(x, kernel, bias, epilogue)
    if kind == "relu":
        # Without the barrier, XLA computes bias and ReLU again for the gradient.
        y = lax.optimization_barrier(y)
    return y, (x, kernel, EpilogueResiduals(kind, y if kind == "relu" else None))


def _conv_few_channels_bwd(res: tuple, g: Array) -> tuple[Array, Array, Array, None]:
    x, kernel, epilogue_res = res
    _, pullback = jax.vjp(lambda x: _im2col(x, kernel), x)
    (grad_input,) = pullback(epilogue_grad(epilogue_res, g, x.shape))
    grad_kernel, grad_bias = _first_layer_grads(epilogue_res, g, x, kernel.shape)
    return grad_input, grad_kernel, grad_bias, None


_conv_few_channels.defvjp(_conv_few_channels_fwd, _conv_few_channels_bwd)


def _first_layer_grads(
    res: EpilogueResiduals, g: Array, x: Array, shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """Kernel and bias gradients by im2col; a column of ones gives the bias gradient.

    A few images are taken at a time, so that every array is still in cache when it is read
    (docs/performance.md#image-gradients).
    """
    acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
    chunk_size = _images_per_chunk(x.shape)

    def add_chunk(
        total: Array, chunk: tuple[Array, EpilogueResiduals, Array]
    ) -> tuple[Array, None]:
        x, res, g = chunk
        grad_output = lax.optimization_barrier(epilogue_grad(res, g, x.shape).astype(acc_dtype))
        columns = [_windows(x.astype(acc_dtype), shape[0]), jnp.ones((*x.shape[:3], 1), acc_dtype)]
        windows = lax.optimization_barrier(jnp.concatenate(columns, axis=-1))
        rows = windows.reshape(-1, windows.shape[-1])
        return total + rows.T @ grad_output.reshape(-1, shape[-1]), None

    chunks = jax.tree.map(lambda a: a.reshape(-1, chunk_size, *a.shape[1:]), (x, res, g))
    zeros = jnp.zeros((math.prod(shape[:3]) + 1, shape[-1]), acc_dtype)
    total, _ = lax.scan(add_chunk, zeros, chunks)
    return total[:-1].reshape(shape), total[-1]


def _images_per_chunk(shape: tuple[int, ...]) -> int:
    """The largest divisor of the batch that has at most `_CHUNK_POSITIONS` positions, or 1."""
    n, h, w, _ = shape
    divisors = (i for i in range(1, n + 1) if n % i == 0)
    return max((i for i in divisors if i * h * w <= _CHUNK_POSITIONS), default=1)


# oneDNN


@jax.custom_vjp
def _conv_onednn(x: Array, kernel: Array) -> Array:
    """Convolves in bfloat16 with a 3x3 kernel, which XLA delegates to oneDNN."""
    return xla_conv(x, kernel)


def _conv_onednn_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _conv_onednn(x, kernel), (x, kernel)


def _conv_onednn_bwd(res: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = res
    # XLA delegates this convolution to oneDNN only if the barrier hides that its kernel is rotated.
    rotated = lax.optimization_barrier(kernel.swapaxes(2, 3)[::-1, ::-1])
    grad_input = xla_conv(g, rotated)
    # XLA does not delegate kernel gradients to oneDNN.
    if x.shape[-1] > MAX_IMAGE_CHANNELS:
        grad_kernel = winograd.kernel_gradient(x, g)
    else:
        grad_kernel, _ = _first_layer_grads(EpilogueResiduals(), g, x, kernel.shape)
    return grad_input, grad_kernel.astype(kernel.dtype)


_conv_onednn.defvjp(_conv_onednn_fwd, _conv_onednn_bwd)


# Winograd


@jax.custom_vjp
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
) -> tuple[Array, tuple]:
    kind = epilogue.kind
    if kind == "relu_pool":
        filters = winograd.transform_filters(kernel)
        y, bits = winograd.convolve(x, filters, lambda y: bias_relu_pool_fwd(y, bias))
        return y, (x, kernel, EpilogueResiduals(kind, bits))
    y = _conv_winograd(x, kernel, bias, epilogue)
    return y, (x, kernel, EpilogueResiduals(kind, y if kind == "relu" else None))


def _conv_winograd_bwd(res: tuple, g: Array) -> tuple[Array, Array, Array, None]:
    x, kernel, epilogue_res = res
    grad_output = materialize_on_cpu(epilogue_grad(epilogue_res, g, x.shape))
    if epilogue_res.kind == "relu_pool":
        grad_bias = pooled_bias_grad(epilogue_res.saved, g)
    else:
        grad_bias = sum_nhw(grad_output)
    # A fused transpose is slower (docs/performance.md#winograd).
    kernel = lax.optimization_barrier(kernel.swapaxes(2, 3))
    filters = winograd.transform_filters(kernel, rotated=True)
    grad_input = winograd.convolve(grad_output, filters)
    return grad_input, winograd.kernel_gradient(x, grad_output), grad_bias, None


_conv_winograd.defvjp(_conv_winograd_fwd, _conv_winograd_bwd)
