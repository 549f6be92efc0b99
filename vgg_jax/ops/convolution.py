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
    computed_once,
    finish,
    gradient_of_sums,
    maxima_with_bias,
    pooled_bias_gradient,
    sum_over_positions,
)
from vgg_jax.ops.pooling import whole_windows
from vgg_jax.runtime.compiler import convolves_bfloat16

NHWC = ("NHWC", "HWIO", "NHWC")
FEW = 4  # input channels, too few for Winograd: the image's
_POSITIONS = (
    224 * 224
)  # of images, whose gradients are taken at a time: of 64 channels, with their windows, 19 MB


def convolve_directly(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


@jax.custom_vjp
def product(x: Array, kernel: Array) -> Array:
    """(N, h, w, C), (C, K) -> (N, h, w, K)"""
    return x @ kernel


def _product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel), (x, kernel)


def _product_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """The kernel's as it lies: jax's own is (K, C), turned round, and of one image a CPU's update then reads across its rows.

    2-core x86: a step of D with one photo takes 0.65 to 0.94 s, by jax's own 1.0 to 1.1; 8x28x28x512 in bfloat16, forward and gradients,
    14 ms, by jax's own 16.
    """
    x, kernel = saved
    return g @ kernel.T, x.reshape(-1, x.shape[-1]).T @ g.reshape(-1, g.shape[-1])


product.defvjp(_product_forward, _product_backward)


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
def _with_im2col(x: Array, kernel: Array) -> Array:
    """For maps smaller than the kernel."""
    return _im2col(x, kernel)


def _with_im2col_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _with_im2col(x, kernel), (x, kernel)


def _with_im2col_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    windows = lax.optimization_barrier(_windows(x, kernel.shape[0]))
    to_kernel = windows.reshape(-1, windows.shape[-1]).T @ g.reshape(
        -1, g.shape[-1]
    )  # jax's own would turn the gradient round first
    # The windows' transpose would round to bfloat16 nine times on its way; this is one product.
    return _im2col(
        g, lax.optimization_barrier(kernel.swapaxes(2, 3))[::-1, ::-1]
    ), to_kernel.reshape(kernel.shape)


_with_im2col.defvjp(_with_im2col_forward, _with_im2col_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _with_few_channels(
    x: Array, kernel: Array, bias: Array, there: Array | None, then: Then
) -> Array:
    """For few channels: XLA's sums, gradients by im2col. It keeps for them what `_by_winograd` does.

    2-core x86, 8x224x224x3 to 64 channels, forward, ms: 28; by im2col 48, of tiles as a batch 55, of 2x2 pixels as channels 66.
    """
    return finish(convolve_directly(x, kernel), bias, there, then)


def _with_few_channels_forward(
    x: Array, kernel: Array, bias: Array, there: Array | None, then: Then
) -> tuple[Array, tuple]:
    if then == "pool":
        y, bits = maxima_with_bias(whole_windows(convolve_directly(x, kernel)), bias)
        return y, (x, kernel, bits)
    y = _with_few_channels(x, kernel, bias, there, then)
    if then == "relu":
        y = lax.optimization_barrier(y)  # or bias and ReLU are computed again for the gradient
    return y, (x, kernel, y if then == "relu" else None)


def _with_few_channels_backward(
    then: Then, saved: tuple, g: Array
) -> tuple[Array, Array, Array, None]:
    x, kernel, passed = saved
    (to_input,) = jax.vjp(lambda x: _im2col(x, kernel), x)[1](
        gradient_of_sums(then, passed, g, x.shape)
    )
    return to_input, *_image_gradients(then, passed, g, x, kernel.shape), None


_with_few_channels.defvjp(_with_few_channels_forward, _with_few_channels_backward)


def _image_gradients(
    then: Then, passed: Any, g: Array, x: Array, shape: tuple[int, ...]
) -> tuple[Array, Array]:
    """The kernel's and the bias's, some images at a time, by im2col with a column of ones: what reads a map finds it in the cache.

    2-core x86, 8x224x224x3 to 64 channels, forward and these, ms: with ReLU 68, with pooling 63; all images at once 95 and 85.
    """
    wide, images = jnp.promote_types(x.dtype, jnp.float32), _images_at_a_time(x.shape)

    def add(total: Array, part: tuple[Array, Any, Array]) -> tuple[Array, None]:
        some, passed, g = part
        to_sums = lax.optimization_barrier(
            gradient_of_sums(then, passed, g, some.shape).astype(wide)
        )
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


def _images_at_a_time(shape: tuple[int, ...]) -> int:
    """As many as have the positions of one of 224 pixels, and divide the batch."""
    n, h, w, _ = shape
    return max((i for i in range(1, n + 1) if n % i == 0 and i * h * w <= _POSITIONS), default=1)


@jax.custom_vjp
def _in_bfloat16(x: Array, kernel: Array) -> Array:
    """For 3x3 kernels, by oneDNN (AMX, 128x8x8x256: 1,400 GFLOP/s, Winograd in float32 240); the kernel's gradient it does not do."""
    return convolve_directly(x, kernel)


def _in_bfloat16_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _in_bfloat16(x, kernel), (x, kernel)


def _in_bfloat16_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    # Behind the barrier it is a convolution like another; with the kernel turned inside, one that oneDNN is not given.
    to_input = convolve_directly(g, lax.optimization_barrier(kernel.swapaxes(2, 3)[::-1, ::-1]))
    if x.shape[-1] > FEW:
        to_kernel = winograd.kernel_gradient(x, g)
    else:
        to_kernel, _ = _image_gradients("", None, g, x, kernel.shape)
    return to_input, to_kernel.astype(kernel.dtype)


_in_bfloat16.defvjp(_in_bfloat16_forward, _in_bfloat16_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _by_winograd(x: Array, kernel: Array, bias: Array, there: Array | None, then: Then) -> Array:
    """For 3x3 kernels. The gradient keeps what came in, and what went out or, of a pooling, a byte for each window."""
    return _with_filters(x, winograd.transform_filters(kernel), bias, there, then)


def _with_filters(x: Array, filters: Array, bias: Array, there: Array | None, then: Then) -> Array:
    beside = [] if there is None else [there]
    return winograd.convolve(
        x, filters, lambda y, there=None: finish(y, bias, there, then), *beside
    )


def _by_winograd_forward(
    x: Array, kernel: Array, bias: Array, there: Array | None, then: Then
) -> tuple[Array, tuple]:
    if then != "pool":
        y = _by_winograd(x, kernel, bias, there, then)
        return y, (x, kernel, y if then == "relu" else None)
    y, bits = winograd.convolve(
        x, winograd.transform_filters(kernel), lambda y: maxima_with_bias(y, bias)
    )
    return y, (x, kernel, bits)


def _by_winograd_backward(then: Then, saved: tuple, g: Array) -> tuple[Array, Array, Array, None]:
    x, kernel, passed = saved
    to_sums = computed_once(gradient_of_sums(then, passed, g, x.shape))
    to_bias = pooled_bias_gradient(passed, g) if then == "pool" else sum_over_positions(to_sums)
    kernel = lax.optimization_barrier(
        kernel.swapaxes(2, 3)
    )  # by itself XLA transposes in blocks; fused, value by value
    to_input = winograd.convolve(to_sums, winograd.transform_filters(kernel, rotated=True))
    return to_input, winograd.kernel_gradient(x, to_sums), to_bias, None


_by_winograd.defvjp(_by_winograd_forward, _by_winograd_backward)


def _on_cpu(
    x: Array, kernel: Array, bias: Array, filters: Array | None, there: Array | None, *, then: Then
) -> Array:
    (h, w, c), side = x.shape[1:], kernel.shape[0]
    if min(h, w) < side:
        y = _with_im2col(x, kernel)
    elif (
        jnp.finfo(x.dtype).bits < 32
    ):  # XLA's own is many times slower, and Winograd's transforms need the digits
        if x.dtype == jnp.bfloat16 and side == 3 and convolves_bfloat16():
            y = _in_bfloat16(x, kernel)
        else:
            wide, nothing = jnp.float32, jnp.zeros(bias.shape, jnp.float32)
            y = _on_cpu(
                x.astype(wide), kernel.astype(wide), nothing, filters, None, then=""
            ).astype(x.dtype)
    elif c <= FEW:
        return _with_few_channels(x, kernel, bias, there, then)
    elif side == 3:
        return (
            _by_winograd(x, kernel, bias, there, then)
            if filters is None
            else _with_filters(x, filters, bias, there, then)
        )
    else:  # 5x5, 32x32x32x64, forward and both gradients: 108 ms, by im2col 279
        y = convolve_directly(x, kernel)
    return finish(y, bias, there, then)


def _by_rows(x: Array, kernel: Array) -> Array:
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
    return lax.conv_general_dilated(x, kernel, (1, 1), ((pad, pad), (0, 0)), dimension_numbers=NHWC)


def _on_cuda(
    x: Array, kernel: Array, bias: Array, _: Array | None, there: Array | None, *, then: Then
) -> Array:
    y = (_by_rows if x.shape[-1] <= FEW else convolve_directly)(x, kernel)
    return finish(y, bias, there, then)


def convolve_anywhere(
    x: Array, kernel: Array, bias: Array, _: Array | None, there: Array | None, *, then: Then
) -> Array:
    """`convolution` by XLA's own."""
    return finish(convolve_directly(x, kernel), bias, there, then)


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

    `filters` are the kernel's of `winograd.transform_filters`, made beforehand for inference. Where `convolves_bfloat16`, bfloat16 is fast
    only in a program that is compiled with `compiler_options(dtype=jnp.bfloat16)`; with others it takes twice as long as in float32.
    """
    assert there is None or then == "relu"
    arrays = x, kernel, bias, filters, there
    if (
        kernel.shape[0] == 1
    ):  # by XLA's convolution, fast by itself on a CPU, a step of C with 8 photos takes 19 s instead of 2.2
        return finish(product(x, kernel[0, 0]), bias, there, then)
    if not all(isinstance(side, int) for side in x.shape):  # a symbol of jax.export
        return convolve_anywhere(*arrays, then=then)
    on = {"cpu": _on_cpu, "cuda": _on_cuda, "default": convolve_anywhere}
    return lax.platform_dependent(
        *arrays,
        **{platform: functools.partial(function, then=then) for platform, function in on.items()},
    )
