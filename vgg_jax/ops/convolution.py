"""Convolution that is fast on a CPU too, with the bias, ReLU and pooling behind it (`vgg_jax.ops.epilogue`).

Shapes are (N, H, W, C). On an accelerator a convolution is XLA's own, on a GPU the image's by rows. On a CPU XLA's is slow in three
places (2-core x86, float32):

- a map smaller than the kernel (batch 128 of 2x2x512, forward and both gradients: 2,600 ms, by im2col 116);
- the gradients where the image has three channels (a whole step of A, batch 128 at 32 pixels, all else by XLA: 3.4 s, by im2col 1.2 s;
  forward im2col takes 1.4 times as long);
- everywhere the 144 products a tile that Winograd does with 36 (jax 0.12, batch 8, forward and both gradients, 224x224x64: 1,450 ms, here
  970; 56x56x256: 1,520 ms, here 540), and the passes over the maps behind them (Winograd, bias, ReLU and pooling, batch 8, 224x224x64:
  178 ms, done block by block, while it is in the cache, 113).

In bfloat16 3x3 convolutions, but for the kernels' gradients, and products are oneDNN's where XLA gives them to it (jaxlib 0.12, CPUs with
AMX or AVX512-BF16; net D, 8 images: 0.16 to 0.39 s, in float32 0.51 to 0.70); elsewhere all but maps smaller than the kernel is computed in
float32.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from vgg_jax.ops import winograd
from vgg_jax.ops.epilogue import (
    Then,
    apply_epilogue,
    bias_relu_pool_fwd,
    epilogue_grad,
    materialize_on_cpu,
    pooled_bias_grad,
    sum_nhw,
)
from vgg_jax.ops.pooling import crop_to_even
from vgg_jax.runtime.compiler import has_onednn_bfloat16

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")
MAX_IMAGE_CHANNELS = 4  # input channels, too few for Winograd: the image's
_CHUNK_POSITIONS = (
    224 * 224
)  # of images, whose gradients are taken at a time: of 64 channels, with their windows, 19 MB


def xla_conv(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSION_NUMBERS)


@jax.custom_vjp
def pointwise_conv(x: Array, kernel: Array) -> Array:
    """(N, h, w, C), (C, K) -> (N, h, w, K)"""
    return x @ kernel


def _pointwise_conv_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return pointwise_conv(x, kernel), (x, kernel)


def _pointwise_conv_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """The kernel's as it lies: jax's own is (K, C), turned round, and of one image a CPU's update then reads across its rows.

    2-core x86: a step of D with one photo takes 0.65 to 0.94 s, by jax's own 1.0 to 1.1; 8x28x28x512 in bfloat16, forward and gradients,
    14 ms, by jax's own 16.
    """
    x, kernel = saved
    return g @ kernel.T, x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1])


pointwise_conv.defvjp(_pointwise_conv_fwd, _pointwise_conv_bwd)


def _windows(x: Array, side: int) -> Array:
    """(N, H, W, C) -> (N, H, W, side · side · C)"""
    h, w = x.shape[1:3]
    pad = (side // 2, side // 2)
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    return jnp.concatenate(
        [x[:, i : i + h, j : j + w] for i in range(side) for j in range(side)], axis=-1
    )


def _im2col(x: Array, kernel: Array) -> Array:
    return _windows(x, kernel.shape[0]) @ kernel.reshape(-1, kernel.shape[-1])


@jax.custom_vjp
def _conv_im2col(x: Array, kernel: Array) -> Array:
    """For maps smaller than the kernel."""
    return _im2col(x, kernel)


def _conv_im2col_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _conv_im2col(x, kernel), (x, kernel)


def _conv_im2col_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    windows = lax.optimization_barrier(_windows(x, kernel.shape[0]))
    to_kernel = windows.reshape(-1, windows.shape[-1]).T @ g.reshape(
        -1, g.shape[-1]
    )  # jax's own would turn the gradient round first
    # The windows' transpose would round to bfloat16 nine times on its way; this is one product.
    return _im2col(
        g, lax.optimization_barrier(kernel.swapaxes(2, 3))[::-1, ::-1]
    ), to_kernel.reshape(kernel.shape)


_conv_im2col.defvjp(_conv_im2col_fwd, _conv_im2col_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _conv_few_channels(
    x: Array, kernel: Array, bias: Array, there: Array | None, then: Then
) -> Array:
    """For few channels: XLA's sums, gradients by im2col. It keeps for them what `_conv_winograd` does.

    2-core x86, 8x224x224x3 to 64 channels, forward, ms: 28; by im2col 48, of tiles as a batch 55, of 2x2 pixels as channels 66.
    """
    return apply_epilogue(xla_conv(x, kernel), bias, there, then)


def _conv_few_channels_fwd(
    x: Array, kernel: Array, bias: Array, there: Array | None, then: Then
) -> tuple[Array, tuple]:
    if then == "pool":
        y, bits = bias_relu_pool_fwd(crop_to_even(xla_conv(x, kernel)), bias)
        return y, (x, kernel, bits)
    y = _conv_few_channels(x, kernel, bias, there, then)
    if then == "relu":
        y = lax.optimization_barrier(y)  # or bias and ReLU are computed again for the gradient
    return y, (x, kernel, y if then == "relu" else None)


def _conv_few_channels_bwd(then: Then, saved: tuple, g: Array) -> tuple[Array, Array, Array, None]:
    x, kernel, passed = saved
    (to_input,) = jax.vjp(lambda x: _im2col(x, kernel), x)[1](
        epilogue_grad(then, passed, g, x.shape)
    )
    return to_input, *_image_grads(then, passed, g, x, kernel.shape), None


_conv_few_channels.defvjp(_conv_few_channels_fwd, _conv_few_channels_bwd)


def _image_grads(
    then: Then, passed: Any, g: Array, x: Array, shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """The kernel's and the bias's, some images at a time, by im2col with a column of ones: what reads a map finds it in the cache.

    2-core x86, 8x224x224x3 to 64 channels, forward and these, ms: with ReLU 68, with pooling 63; all images at once 95 and 85.
    """
    wide, images = jnp.promote_types(x.dtype, jnp.float32), _images_per_chunk(x.shape)

    def add(total: Array, part: tuple[Array, Any, Array]) -> tuple[Array, None]:
        some, passed, g = part
        to_sums = lax.optimization_barrier(epilogue_grad(then, passed, g, some.shape).astype(wide))
        windows = jnp.concatenate(
            [_windows(some.astype(wide), shape[0]), jnp.ones((*some.shape[:3], 1), wide)], axis=-1
        )
        windows = lax.optimization_barrier(windows)
        return total + windows.reshape(-1, windows.shape[-1]).T @ to_sums.reshape(
            -1, shape[-1]
        ), None

    parts = jax.tree.map(lambda a: a.reshape(-1, images, *a.shape[1:]), (x, passed, g))
    total, _ = lax.scan(add, jnp.zeros((math.prod(shape[:3]) + 1, shape[-1]), wide), parts)
    return total[:-1].reshape(shape), total[-1]


def _images_per_chunk(shape: tuple[int, ...]) -> int:
    """As many as have the positions of one of 224 pixels, and divide the batch."""
    n, h, w, _ = shape
    return max(
        (i for i in range(1, n + 1) if n % i == 0 and i * h * w <= _CHUNK_POSITIONS), default=1
    )


@jax.custom_vjp
def _conv_onednn(x: Array, kernel: Array) -> Array:
    """For 3x3 kernels, by oneDNN (AMX, 128x8x8x256: 1,400 GFLOP/s, Winograd in float32 240); the kernel's gradient it does not do."""
    return xla_conv(x, kernel)


def _conv_onednn_fwd(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _conv_onednn(x, kernel), (x, kernel)


def _conv_onednn_bwd(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    # Behind the barrier it is a convolution like another; with the kernel turned inside, one that oneDNN is not given.
    to_input = xla_conv(g, lax.optimization_barrier(kernel.swapaxes(2, 3)[::-1, ::-1]))
    if x.shape[-1] > MAX_IMAGE_CHANNELS:
        to_kernel = winograd.kernel_gradient(x, g)
    else:
        to_kernel, _ = _image_grads("", None, g, x, kernel.shape)
    return to_input, to_kernel.astype(kernel.dtype)


_conv_onednn.defvjp(_conv_onednn_fwd, _conv_onednn_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _conv_winograd(x: Array, kernel: Array, bias: Array, there: Array | None, then: Then) -> Array:
    """For 3x3 kernels. The gradient keeps what came in, and what went out or, of a pooling, a byte for each window."""
    return _with_filters(x, winograd.transform_filters(kernel), bias, there, then)


def _with_filters(x: Array, filters: Array, bias: Array, there: Array | None, then: Then) -> Array:
    beside = [] if there is None else [there]
    return winograd.convolve(
        x, filters, lambda y, there=None: apply_epilogue(y, bias, there, then), *beside
    )


def _conv_winograd_fwd(
    x: Array, kernel: Array, bias: Array, there: Array | None, then: Then
) -> tuple[Array, tuple]:
    if then != "pool":
        y = _conv_winograd(x, kernel, bias, there, then)
        return y, (x, kernel, y if then == "relu" else None)
    y, bits = winograd.convolve(
        x, winograd.transform_filters(kernel), lambda y: bias_relu_pool_fwd(y, bias)
    )
    return y, (x, kernel, bits)


def _conv_winograd_bwd(then: Then, saved: tuple, g: Array) -> tuple[Array, Array, Array, None]:
    x, kernel, passed = saved
    to_sums = materialize_on_cpu(epilogue_grad(then, passed, g, x.shape))
    to_bias = pooled_bias_grad(passed, g) if then == "pool" else sum_nhw(to_sums)
    kernel = lax.optimization_barrier(
        kernel.swapaxes(2, 3)
    )  # by itself XLA transposes in blocks; fused, value by value
    to_input = winograd.convolve(to_sums, winograd.transform_filters(kernel, rotated=True))
    return to_input, winograd.kernel_gradient(x, to_sums), to_bias, None


_conv_winograd.defvjp(_conv_winograd_fwd, _conv_winograd_bwd)


def _on_cpu(
    x: Array, kernel: Array, bias: Array, filters: Array | None, there: Array | None, *, then: Then
) -> Array:
    (h, w, c), side = x.shape[1:], kernel.shape[0]
    if min(h, w) < side:
        y = _conv_im2col(x, kernel)
    elif (
        jnp.finfo(x.dtype).bits < 32
    ):  # XLA's own is many times slower, and Winograd's transforms need the digits
        if x.dtype == jnp.bfloat16 and side == 3 and has_onednn_bfloat16():
            y = _conv_onednn(x, kernel)
        else:
            wide, nothing = jnp.float32, jnp.zeros(bias.shape, jnp.float32)
            y = _on_cpu(
                x.astype(wide), kernel.astype(wide), nothing, filters, None, then=""
            ).astype(x.dtype)
    elif c <= MAX_IMAGE_CHANNELS:
        return _conv_few_channels(x, kernel, bias, there, then)
    elif side == 3:
        return (
            _conv_winograd(x, kernel, bias, there, then)
            if filters is None
            else _with_filters(x, filters, bias, there, then)
        )
    else:  # 5x5, 32x32x32x64, forward and both gradients: 108 ms, by im2col 279
        y = xla_conv(x, kernel)
    return apply_epilogue(y, bias, there, then)


def _conv_rows_as_channels(x: Array, kernel: Array) -> Array:
    """With the pixels of a kernel's row side by side as channels, filled up to sixteen.

    For the image on tensor cores, which cuDNN makes poor use of with three channels (H200, bfloat16, a step of net D, batch 256: 49.8
    -> 45.2 ms; by im2col 47.3). Float32 is as fast either way.
    """
    h, w = x.shape[1:3]
    side, _, c, channels = kernel.shape
    pad, fill = side // 2, -side * c % 16
    x = jnp.pad(x, ((0, 0), (0, 0), (pad, pad), (0, 0)))
    x = jnp.concatenate(
        [*(x[:, :, j : j + w] for j in range(side)), jnp.zeros((len(x), h, w, fill), x.dtype)],
        axis=-1,
    )
    kernel = jnp.pad(
        kernel.reshape(side, 1, side * c, channels), ((0, 0), (0, 0), (0, fill), (0, 0))
    )
    return lax.conv_general_dilated(
        x, kernel, (1, 1), ((pad, pad), (0, 0)), dimension_numbers=DIMENSION_NUMBERS
    )


def _on_cuda(
    x: Array, kernel: Array, bias: Array, _: Array | None, there: Array | None, *, then: Then
) -> Array:
    y = (_conv_rows_as_channels if x.shape[-1] <= MAX_IMAGE_CHANNELS else xla_conv)(x, kernel)
    return apply_epilogue(y, bias, there, then)


def default_conv(
    x: Array, kernel: Array, bias: Array, _: Array | None, there: Array | None, *, then: Then
) -> Array:
    """`convolution` by XLA's own."""
    return apply_epilogue(xla_conv(x, kernel), bias, there, then)


@functools.partial(
    jax.jit, static_argnames="then"
)  # traced, and outside of a jit compiled, once for each shape
def convolution(
    x: Array,
    kernel: Array,
    bias: Array,
    filters: Array | None = None,
    there: Array | None = None,
    then: Then = "",
) -> Array:
    """(N, H, W, C), (k, k, C, K), (K,) -> (N, H, W, K): cross-correlation, stride 1, zero padding k // 2, for an odd k, plus a bias.

    `then` its ReLU, with zeros where not `there`, bool (N, H, W, 1); or its ReLU and maxima of 2x2 windows, (N, H // 2, W // 2, K).

    `filters` are the kernel's of `winograd.transform_filters`, made beforehand for inference. Where `has_onednn_bfloat16`, bfloat16 is fast
    only in a program that is compiled with `compiler_options(dtype=jnp.bfloat16)`; with others it takes twice as long as in float32.
    """
    assert there is None or then == "relu"
    arrays = x, kernel, bias, filters, there
    if (
        kernel.shape[0] == 1
    ):  # by XLA's convolution, fast by itself on a CPU, a step of C with 8 photos takes 19 s instead of 2.2
        return apply_epilogue(pointwise_conv(x, kernel[0, 0]), bias, there, then)
    if not all(isinstance(side, int) for side in x.shape):  # a symbol of jax.export
        return default_conv(*arrays, then=then)
    on = {"cpu": _on_cpu, "cuda": _on_cuda, "default": default_conv}
    return lax.platform_dependent(
        *arrays,
        **{platform: functools.partial(function, then=then) for platform, function in on.items()},
    )
