"""Convolution with bias, ReLU and pooling, by the fastest path of each platform.

- CPU: `vgg_jax.ops.convolution_cpu`, since XLA's convolution is slow there.
- CUDA GPU: XLA's convolution (cuDNN). The first layer packs kernel rows into channels, because
  tensor cores make poor use of three channels.
- Other platforms: XLA's convolution.
- 1x1 kernels, on every platform: a matrix product.
- Fully connected layers on a larger map: XLA's convolution, on a CPU with gradients by products.

Activations have the shape (N, H, W, C), kernels (k, k, C, K).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from vgg_jax.ops.bilinear import bilinear_conv, match_varying_axes
from vgg_jax.ops.convolution_cpu import cpu_conv
from vgg_jax.ops.epilogue import NO_EPILOGUE, Epilogue, apply_epilogue
from vgg_jax.ops.explicit_sharding import explicit_spec, map_over_batch
from vgg_jax.ops.xla import DIMENSION_NUMBERS, MAX_IMAGE_CHANNELS, xla_conv


@jax.jit  # traced once for each shape, and outside of another jit compiled once
def convolution(
    x: Array,
    kernel: Array,
    bias: Array,
    epilogue: Epilogue = NO_EPILOGUE,
    filters: Array | None = None,
) -> Array:
    """Cross-correlates with stride 1 and padding k // 2, adds a bias, applies an epilogue.

    bfloat16 is fast on a CPU only in a program that is compiled with
    `compiler_options(dtype=jnp.bfloat16)` (docs/performance.md#onednn-and-bfloat16).

    Args:
        x: Input (N, H, W, C).
        kernel: Kernel (k, k, C, K), k odd.
        bias: Bias (K,).
        epilogue: Operations after the bias. Only "relu" may have a mask.
        filters: For inference on a CPU, `winograd.transform_filters(kernel)` computed in advance.

    Returns:
        (N, H, W, K), or (N, H // 2, W // 2, K) if the epilogue pools.

    Raises:
        ValueError: If an epilogue other than "relu" has a mask.
    """
    if epilogue.mask is not None and epilogue.kind != "relu":
        raise ValueError(f"an epilogue {epilogue.kind!r} has a mask: expected kind 'relu'")
    return map_over_batch(_convolve, (x, epilogue), (kernel, bias, filters))


def _convolve(
    x: Array, epilogue: Epilogue, kernel: Array, bias: Array, filters: Array | None
) -> Array:
    """Chooses the path of a kernel, a size and a platform."""
    if kernel.shape[0] == 1:
        # XLA's convolution is slow for 1x1 kernels (docs/performance.md#1x1-convolution).
        return apply_epilogue(_pointwise_conv(x, kernel[0, 0]), bias, epilogue)
    if not all(isinstance(size, int) for size in x.shape):  # a symbolic size, from jax.export
        return default_conv(x, kernel, bias, epilogue)
    # JAX traces the path of every platform, so a GPU has one of its own in the first layer only.
    own_paths = {"cuda": first_cuda_conv} if x.shape[-1] <= MAX_IMAGE_CHANNELS else {}
    return lax.platform_dependent(
        x,
        kernel,
        bias,
        epilogue,
        cpu=functools.partial(cpu_conv, filters=filters),
        default=default_conv,
        **own_paths,
    )


def default_conv(x: Array, kernel: Array, bias: Array, epilogue: Epilogue) -> Array:
    """Convolves by XLA on any platform.

    Args:
        x: Input (N, H, W, C).
        kernel: Kernel (k, k, C, K), k odd.
        bias: Bias (K,).
        epilogue: Operations after the bias.

    Returns:
        (N, H, W, K), or (N, H // 2, W // 2, K) if the epilogue pools.
    """
    return apply_epilogue(xla_conv(x, kernel), bias, epilogue)


def first_cuda_conv(x: Array, kernel: Array, bias: Array, epilogue: Epilogue) -> Array:
    """Convolves an image of at most `MAX_IMAGE_CHANNELS` channels on a CUDA GPU.

    Args:
        x: Input (N, H, W, C).
        kernel: Kernel (k, k, C, K), k odd.
        bias: Bias (K,).
        epilogue: Operations after the bias.

    Returns:
        (N, H, W, K), or (N, H // 2, W // 2, K) if the epilogue pools.
    """
    return apply_epilogue(_conv_rows_as_channels(x, kernel), bias, epilogue)


def _conv_rows_as_channels(x: Array, kernel: Array) -> Array:
    """Convolves an image, with the pixels of each kernel row stacked as channels.

    The channels are padded to a multiple of 16, because cuDNN makes poor use of tensor cores with
    three channels (docs/performance.md#rows-as-channels-on-gpus).
    """
    h, w = x.shape[1:3]
    size, _, c, features = kernel.shape
    pad, fill = size // 2, -size * c % 16
    x = jnp.pad(x, ((0, 0), (0, 0), (pad, pad), (0, 0)))
    shifted = (x[:, :, j : j + w] for j in range(size))
    x = jnp.concatenate([*shifted, jnp.zeros((len(x), h, w, fill), x.dtype)], axis=-1)
    kernel = kernel.reshape(size, 1, size * c, features)
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, fill), (0, 0)))
    return lax.conv_general_dilated(
        x, kernel, (1, 1), ((pad, pad), (0, 0)), dimension_numbers=DIMENSION_NUMBERS
    )


def pointwise_conv(x: Array, kernel: Array) -> Array:
    """Convolves with a 1x1 kernel, or applies a fully connected layer at each position.

    Args:
        x: Input (N, h, w, C).
        kernel: Kernel (C, K).

    Returns:
        Output (N, h, w, K).
    """
    if any(explicit_spec(kernel)) or any(explicit_spec(x)[1:]):
        return x @ kernel  # its sharding is JAX's to decide
    return map_over_batch(_pointwise_conv, (x,), (kernel,))


# JAX's own kernel gradient is (K, C), transposed. A CPU's parameter update would then read it
# across its rows (docs/performance.md#kernel-gradient-of-matrix-products).
_pointwise_conv = bilinear_conv(
    "pointwise_conv",
    forward=lambda x, kernel: x @ kernel,
    input_gradient=lambda kernel, g, *, shape: g @ kernel.T,
    kernel_gradient=lambda x, g, *, shape: (
        x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1])
    ),
    is_matrix_product=True,
)


def window_conv(x: Array, kernel: Array) -> Array:
    """Applies a fully connected layer to every window of a map, without padding (§3.2).

    Args:
        x: Input (N, h, w, C).
        kernel: Kernel (k · k · C, K), with rows in the order y, x, channel.

    Returns:
        Output (N, h - k + 1, w - k + 1, K).
    """
    if any(explicit_spec(kernel)) or any(explicit_spec(x)[1:]):
        return _xla_window_conv(x, kernel)  # its sharding is JAX's to decide
    return map_over_batch(_convolve_windows, (x,), (kernel,))


def _convolve_windows(x: Array, kernel: Array) -> Array:
    """Chooses the gradients of a size and a platform."""
    if not all(isinstance(size, int) for size in x.shape):  # a symbolic size, from jax.export
        return _xla_window_conv(x, kernel)
    return lax.platform_dependent(x, kernel, cpu=_cpu_window_conv, default=_xla_window_conv)


def _xla_window_conv(x: Array, kernel: Array) -> Array:
    channels = x.shape[-1]
    size = math.isqrt(len(kernel) // channels)
    window = kernel.reshape(size, size, channels, kernel.shape[-1])
    return lax.conv_general_dilated(x, window, (1, 1), "VALID", dimension_numbers=DIMENSION_NUMBERS)


def _inner_windows(x: Array, size: int) -> Array:
    """The size x size windows inside a map: (N, h, w, C) -> (N, h', w', size · size · C)."""
    height, width = (side - size + 1 for side in x.shape[1:3])
    rows = jnp.stack([x[:, :, j : j + width] for j in range(size)], axis=3)
    windows = jnp.stack([rows[:, i : i + height] for i in range(size)], axis=3)
    return windows.reshape(*windows.shape[:3], size * size * x.shape[-1])


def _window_input_gradient(kernel: Array, g: Array, *, shape: tuple[int, ...]) -> Array:
    take_windows = functools.partial(_inner_windows, size=math.isqrt(len(kernel) // shape[-1]))
    sum_dtype = jnp.promote_types(g.dtype, jnp.float32)  # each addition in 16 bits would round
    products = jnp.matmul(g, kernel.T, preferred_element_type=sum_dtype)
    x, products = match_varying_axes(jnp.zeros(shape, sum_dtype), products)
    (gradient,) = jax.vjp(take_windows, x)[1](products)
    return gradient.astype(g.dtype)


def _window_kernel_gradient(x: Array, g: Array, *, shape: tuple[int, ...]) -> Array:
    count = math.prod(g.shape[:3])
    windows = _inner_windows(x, math.isqrt(shape[0] // x.shape[-1]))
    return windows.reshape(count, shape[0]).T @ g.reshape(count, shape[1])


# XLA's input gradient takes a CPU up to 38 times as long
# (docs/performance.md#windows-of-score-maps).
_cpu_window_conv = bilinear_conv(
    "window_conv",
    forward=_xla_window_conv,
    input_gradient=_window_input_gradient,
    kernel_gradient=_window_kernel_gradient,
)
