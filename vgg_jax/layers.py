"""The layers that need care: convolution that is fast on a CPU too, batch normalisation, LRN, FC layers over maps.

Shapes are (N, H, W, C). On an accelerator a convolution is XLA's own, on a GPU the image's by rows. On a CPU XLA's is slow in three
places (2-core x86, float32):

- a map smaller than the kernel (batch 128 of 2x2x512, forward and both gradients: 2,600 ms, by im2col 116);
- the gradients where the image has three channels (a whole step of A, batch 128 at 32 pixels: 3.4 s, by im2col 1.2 s; forward im2col takes
  1.4 times as long);
- everywhere the 144 products a tile that Winograd does with 36 (jax 0.12, batch 8, forward and both gradients, 224x224x64: 1,450 ms, here
  970; 56x56x256: 1,520 ms, here 540).

In bfloat16 3x3 convolutions, but for the kernels' gradients, and products are oneDNN's where XLA gives them to it (jaxlib 0.12, CPUs with
AMX or AVX512-BF16; net D, 8 images: 0.15 s, in float32 0.67); elsewhere all but maps smaller than the kernel is computed in float32.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array, lax

from vgg_jax import winograd

_NHWC = ("NHWC", "HWIO", "NHWC")
FEW = 4  # input channels, too few for Winograd: the image's


def compiler_options(thorough: bool = False, dtype: Any = jnp.float32) -> dict[str, str | int | bool]:
    """What to pass as `jax.jit(f, compiler_options=...)` for the best speed on the default backend; nothing but on a CPU.

    There XLA's YNN is for matrix products alone (a step of net A at 32 pixels, jax 0.12: 0.37 s, without it 0.41 s): the weight gradient
    of a convolution it makes 1.2 to 6 times as slow. And LLVM optimises less, which halves the time to compile a training step, and
    that to compile an initialisation ten times, at the same speed. `thorough` is for inference that goes on for minutes: 1.5 times as
    long to compile, and faster by a tenth (dense evaluation with net A, 4 photos, AVX-512: 0.58 s -> 0.53 s). LLVM's expensive passes
    are a third of what would be left to compile, and gain nothing.

    For a net that computes in the `dtype` bfloat16 convolutions and products are oneDNN's, where `convolves_bfloat16`. Such programs
    jaxlib 0.12 cannot write to jax's compilation cache, which warns of it; so float32 has none of them.
    """
    if jax.default_backend() != "cpu":
        return {}
    llvm: dict[str, int | bool] = {"xla_llvm_disable_expensive_passes": True} if thorough else {"xla_backend_optimization_level": 1}
    if dtype == jnp.bfloat16 and convolves_bfloat16():
        return {**_ONEDNN, **llvm}
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT", **llvm}


_ONEDNN: dict[str, str | int | bool] = {"xla_cpu_experimental_ynn_fusion_type": "", "xla_cpu_experimental_onednn_custom_call": True}


@functools.cache
def convolves_bfloat16() -> bool:
    """Whether XLA gives a bfloat16 convolution to oneDNN here: jaxlib 0.12 does, on a CPU that has instructions for them.

    Tried by compiling one, once; the processes of a run have to answer alike, or to compute in float32.
    """
    if jax.default_backend() != "cpu":
        return False
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 8, 8, 16), (3, 3, 16, 16)))
    compiled = jax.jit(_direct, compiler_options=_ONEDNN).lower(x, kernel).compile()
    return "__onednn$convolution" in (compiled.as_text() or "")


def _direct(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=_NHWC)


def _im2col(x: Array, kernel: Array) -> Array:
    h, w = x.shape[1:3]
    side, _, _, channels = kernel.shape
    pad = (side // 2, side // 2)
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    windows = jnp.concatenate([x[:, i : i + h, j : j + w] for i in range(side) for j in range(side)], axis=-1)
    return windows @ kernel.reshape(-1, channels)


@jax.custom_vjp
def _with_im2col(x: Array, kernel: Array) -> Array:
    """For maps smaller than the kernel, and for few channels, where only the gradients are by im2col."""
    return _im2col(x, kernel) if min(x.shape[1:3]) < kernel.shape[0] else _direct(x, kernel)


def _im2col_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _with_im2col(x, kernel), (x, kernel)


def _im2col_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    to_input, to_kernel = jax.vjp(_im2col, x, kernel)[1](g)
    if x.shape[-1] > FEW:  # im2col's transpose would round to bfloat16 nine times on its way; this is one product
        to_input = _im2col(g, lax.optimization_barrier(kernel.swapaxes(2, 3))[::-1, ::-1])
    return to_input, to_kernel


_with_im2col.defvjp(_im2col_forward, _im2col_backward)


@jax.custom_vjp
def _in_bfloat16(x: Array, kernel: Array) -> Array:
    """For 3x3 kernels, by oneDNN (AMX, 128x8x8x256: 1,400 GFLOP/s, Winograd in float32 240); the kernel's gradient it does not do."""
    return _direct(x, kernel)


def _in_bfloat16_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _in_bfloat16(x, kernel), (x, kernel)


def _in_bfloat16_backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    # Behind the barrier it is a convolution like another; with the kernel turned inside, one that oneDNN is not given.
    to_input = _direct(g, lax.optimization_barrier(kernel.swapaxes(2, 3)[::-1, ::-1]))
    x, g = x.astype(jnp.float32), g.astype(jnp.float32)
    few = x.shape[-1] <= FEW
    to_kernel = jax.vjp(lambda k: _im2col(x, k), kernel.astype(jnp.float32))[1](g)[0] if few else winograd.kernel_gradient(x, g)
    return to_input, to_kernel.astype(kernel.dtype)


_in_bfloat16.defvjp(_in_bfloat16_forward, _in_bfloat16_backward)


def _on_cpu(x: Array, kernel: Array, filters: Array | None) -> Array:
    (h, w, c), side = x.shape[1:], kernel.shape[0]
    if min(h, w) < side:
        return _with_im2col(x, kernel)
    if jnp.finfo(x.dtype).bits < 32:  # XLA's own is many times slower, and Winograd's transforms need the digits
        if x.dtype == jnp.bfloat16 and side == 3 and convolves_bfloat16():
            return _in_bfloat16(x, kernel)
        return _on_cpu(x.astype(jnp.float32), kernel.astype(jnp.float32), filters).astype(x.dtype)
    if c <= FEW:
        return _with_im2col(x, kernel)
    if side == 3:
        return winograd.convolution_3x3(x, kernel) if filters is None else winograd.convolve(x, filters)
    return _direct(x, kernel)


def _by_rows(x: Array, kernel: Array) -> Array:
    """With the pixels of a kernel's row side by side as channels, filled up to sixteen.

    For the image on tensor cores, which cuDNN makes poor use of with three channels (H200, bfloat16, a step of net D, batch 256: 49.8
    -> 45.2 ms; by im2col 47.3). Float32 is as fast either way.
    """
    h, w = x.shape[1:3]
    side, _, c, channels = kernel.shape
    pad, fill = side // 2, -side * c % 16
    x = jnp.pad(x, ((0, 0), (0, 0), (pad, pad), (0, 0)))
    x = jnp.concatenate([*(x[:, :, j : j + w] for j in range(side)), jnp.zeros((len(x), h, w, fill), x.dtype)], axis=-1)
    kernel = jnp.pad(kernel.reshape(side, 1, side * c, channels), ((0, 0), (0, 0), (0, fill), (0, 0)))
    return lax.conv_general_dilated(x, kernel, (1, 1), ((pad, pad), (0, 0)), dimension_numbers=_NHWC)


def _on_cuda(x: Array, kernel: Array, _: Array | None) -> Array:
    return (_by_rows if x.shape[-1] <= FEW else _direct)(x, kernel)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """(N, H, W, C) + (C,). The bias's gradient, a sum over all positions, takes a CPU 2 to 7 times as long in XLA's way as by a product."""
    return x + bias[None, None, None]


def _add_bias(x: Array, bias: Array) -> tuple[Array, None]:
    return add_bias(x, bias), None


def _bias_gradient(_: None, g: Array) -> tuple[Array, Array]:
    return lax.platform_dependent(g, cpu=_bias_gradient_on_cpu, default=lambda g: (g, g.sum((0, 1, 2))))


def _bias_gradient_on_cpu(g: Array) -> tuple[Array, Array]:
    g = lax.optimization_barrier(g)  # or what makes it is fused into its readers, and computed again in each
    positions = g.reshape(-1, g.shape[-1])
    return g, (jnp.ones((1, len(positions)), g.dtype) @ positions)[0]


add_bias.defvjp(_add_bias, _bias_gradient)


@jax.jit  # traced, and outside of a jit compiled, once for each shape
def convolution(x: Array, kernel: Array, filters: Array | None = None) -> Array:
    """(N, H, W, C), (k, k, C, K) -> (N, H, W, K): cross-correlation, stride 1, zero padding k // 2, for an odd k.

    `filters` are the kernel's from `with_filters`, for inference. Where `convolves_bfloat16`, bfloat16 is fast only in a program that is
    compiled with `compiler_options(dtype=jnp.bfloat16)`; with others it takes twice as long as in float32.
    """
    if kernel.shape[0] == 1:
        return x @ kernel[0, 0]
    if not all(isinstance(side, int) for side in x.shape):  # a symbol of jax.export
        return _direct(x, kernel)
    return lax.platform_dependent(x, kernel, filters, cpu=_on_cpu, cuda=_on_cuda, default=lambda x, kernel, _: _direct(x, kernel))


def with_filters(variables: Mapping[str, Any], dtype: Any = jnp.float32) -> dict[str, Any]:
    """The variables of a net with its 3x3 kernels as the CPU's convolution wants them, made once for inference over and over in `dtype`.

    Four times the kernels' memory; a fifth less time (dense evaluation with net A, 2-core x86). On an accelerator there are none, nor where
    the CPU convolves bfloat16.
    """
    if jax.default_backend() != "cpu" or (dtype == jnp.bfloat16 and convolves_bfloat16()):
        return dict(variables)
    kernels = {name: layer["kernel"] for name, layer in variables["params"].items() if name.startswith("conv")}
    kernels = {name: kernel for name, kernel in kernels.items() if kernel.shape[0] == 3 and kernel.shape[2] > FEW}
    return {**variables, "filters": _filters(kernels)}


@jax.jit
def _filters(kernels: dict[str, Array]) -> dict[str, Array]:
    return {
        name: winograd.transform_filters(kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))) for name, kernel in kernels.items()
    }


def local_response_norm(x: Array, k: float = 2.0, n: int = 5, alpha: float = 1e-4, beta: float = 0.75) -> Array:
    """(…, C) -> (…, C): x / (k + alpha · Σ x²)^beta, the sum over the n channels around each (Krizhevsky et al. 2012, §3.3).

    alpha multiplies the sum itself. Caffe and PyTorch divide it by n: their equal has alpha=5e-4.
    """
    channels = x.shape[-1]
    squares = jnp.pad(x * x, [(0, 0)] * (x.ndim - 1) + [(n // 2, n // 2)])
    total = sum(squares[..., i : i + channels] for i in range(n))
    return x * (k + alpha * total) ** -beta


class Conv(nn.Module):
    """`convolution` with a bias: (N, H, W, C) -> (N, H, W, width). `filters` are its kernel's, see `with_filters`."""

    width: int
    side: int
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, filters: Array | None = None) -> Array:
        kernel = self.param("kernel", self.kernel_init, (self.side, self.side, x.shape[-1], self.width), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        # Outside of jit, as init often is, XLA's own convolution compiles in a tenth of the time.
        return add_bias(_direct(x, kernel) if self.is_initializing() else convolution(x, kernel, filters), bias)


class BatchNorm(nn.Module):
    """Batch normalisation over (N, H, W), with PyTorch's running statistics and a mask of the real examples.

    linen's own keeps the biased variance; PyTorch's running variance is the unbiased one. An example that a mask leaves out
    changes neither the statistics nor, thereby, the others. Inside a `shard_map` the statistics are those over its axis `axis_name`.
    """

    momentum: float = 0.9  # the weight of the past: PyTorch's 0.1, said the other way round
    epsilon: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False, mask: Array | None = None) -> Array:
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)
        if train and not self.is_initializing():
            wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
            mask = jnp.ones(x.shape[0], bool) if mask is None else mask
            where = mask[:, None, None, None]

            def total(part: Array) -> Array:
                return part if self.axis_name is None else lax.psum(part, self.axis_name)

            count = total(mask.sum().astype(wide.dtype)) * (x.shape[1] * x.shape[2])  # of 43,000 photos no int32
            mean = total(jnp.where(where, wide, 0).sum((0, 1, 2))) / jnp.maximum(count, 1)
            var = total(jnp.where(where, (wide - mean[None, None, None]) ** 2, 0).sum((0, 1, 2))) / jnp.maximum(count, 1)
            keep = jnp.where(count > 0, self.momentum, 1.0)  # a micro-batch may be all padding
            running_mean.value = (keep * running_mean.value + (1 - keep) * mean).astype(self.param_dtype)
            unbiased = var * count / jnp.maximum(count - 1, 1)
            running_var.value = (keep * running_var.value + (1 - keep) * unbiased).astype(self.param_dtype)
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * lax.rsqrt(var + self.epsilon)
        x, factor, offset = promote_dtype(x, factor, bias - mean * factor, dtype=self.dtype)
        return x * factor[None, None, None] + offset[None, None, None]


class Dropout(nn.Module):
    """Of each row of (N, …) a random share `rate` set to zero and the rest divided by 1 - rate; nothing unless `train`.

    What is drawn for a row depends on the "dropout" rng and on the row's number alone: with `axis_name`, an axis of a `shard_map`, on its
    number in what lies along that axis. So a batch draws the same on any number of devices.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        if not train or self.rate == 0:
            return x
        key = self.make_rng("dropout")
        first = 0 if self.axis_name is None else lax.axis_index(self.axis_name) * len(x)

        def keep(row: Array) -> Array:
            return jax.random.bernoulli(jax.random.fold_in(key, row), 1 - self.rate, x.shape[1:])

        return jnp.where(jax.vmap(keep)(first + jnp.arange(len(x))), x / (1 - self.rate), 0)


class FullyConnected(nn.Module):
    """A fully connected layer at every position of a map (§3.2): (N, h, w, C) -> (N, h - side + 1, w - side + 1, width).

    The kernel is (side · side · C, width), its rows in the order y, x, channel. On a map of its own size it is a plain matrix product.
    """

    width: int
    side: int
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, h, w, c = x.shape
        kernel = self.param("kernel", self.kernel_init, (self.side * self.side * c, self.width), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.width,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        # On a CPU jax 0.12.0.1 puts a pooling and the products behind it in one library call, which makes NaN of three in bfloat16.
        x = lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
        if h == w == self.side or self.side == 1:
            y = x.reshape(n, h // self.side, w // self.side, len(kernel)) @ kernel
        else:
            window = kernel.reshape(self.side, self.side, c, self.width)
            y = lax.conv_general_dilated(x, window, (1, 1), "VALID", dimension_numbers=_NHWC)
        return y + bias[None, None, None]
