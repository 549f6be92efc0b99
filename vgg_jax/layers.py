"""The layers of the nets: convolution, batch normalisation, LRN, dropout, FC layers over maps. Shapes are (N, H, W, C)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array, lax

from vgg_jax.ops.convolution import DIMENSION_NUMBERS, convolution, default_conv, pointwise_conv
from vgg_jax.ops.epilogue import Then


def local_response_norm(
    x: Array, k: float = 2.0, n: int = 5, alpha: float = 1e-4, beta: float = 0.75
) -> Array:
    """(…, C) -> (…, C): x / (k + alpha · Σ x²)^beta, the sum over the n channels around each (Krizhevsky et al. 2012, §3.3).

    alpha multiplies the sum itself. Caffe and PyTorch divide it by n: their equal has alpha=5e-4.
    """
    channels = x.shape[-1]
    squares = jnp.pad(x * x, [(0, 0)] * (x.ndim - 1) + [(n // 2, n // 2)])
    total = sum(squares[..., i : i + channels] for i in range(n))
    return x * (k + alpha * total) ** -beta


class Conv(nn.Module):
    """`convolution`: (N, H, W, C) -> (N, H, W, width), or of half the sides if `then` it pools."""

    features: int
    kernel_size: int
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, filters: Array | None = None, there: Array | None = None, then: Then = ""
    ) -> Array:
        kernel = self.param(
            "kernel",
            self.kernel_init,
            (self.kernel_size, self.kernel_size, x.shape[-1], self.features),
            self.param_dtype,
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        # Outside of jit, as init often is, XLA's own convolution compiles in a tenth of the time.
        function = default_conv if self.is_initializing() else convolution
        return function(x, kernel, bias, filters, there, then=then)


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

            count = total(mask.sum().astype(wide.dtype)) * (
                x.shape[1] * x.shape[2]
            )  # of 43,000 photos no int32
            mean = total(jnp.where(where, wide, 0).sum((0, 1, 2))) / jnp.maximum(count, 1)
            var = total(
                jnp.where(where, (wide - mean[None, None, None]) ** 2, 0).sum((0, 1, 2))
            ) / jnp.maximum(count, 1)
            keep = jnp.where(count > 0, self.momentum, 1.0)  # a micro-batch may be all padding
            running_mean.value = (keep * running_mean.value + (1 - keep) * mean).astype(
                self.param_dtype
            )
            unbiased = var * count / jnp.maximum(count - 1, 1)
            running_var.value = (keep * running_var.value + (1 - keep) * unbiased).astype(
                self.param_dtype
            )
        else:
            mean, var = running_mean.value, running_var.value
        factor = scale * lax.rsqrt(var + self.epsilon)
        x, factor, offset = promote_dtype(x, factor, bias - mean * factor, dtype=self.dtype)
        return x * factor[None, None, None] + offset[None, None, None]


class Dropout(nn.Module):
    """Of each row of (N, …) a random share `rate` set to zero and the rest divided by 1 - rate; nothing unless `train`.

    What is drawn for a row depends on the "dropout" rng and on the row's number alone: with `axis_name`, an axis of a `shard_map`, on its
    number in what lies along that axis. So a batch draws the same on any number of devices (2-core x86, 128 rows of 4096, ms: 7; as one
    draw for all rows 7, by the generator "rbg" 18).
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
    `turned` is the kernel transposed, for inference: a CPU then reads it faster where there are few images (fc6, 2-core x86, ms: of one
    image 21 -> 16, of 8 46 -> 22, of 32 104 -> 37; in bfloat16 of one 31 -> 15, of 8 24 -> 13).
    """

    features: int
    kernel_size: int
    kernel_init: nn.initializers.Initializer
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, turned: Array | None = None) -> Array:
        n, h, w, c = x.shape
        kernel = self.param(
            "kernel",
            self.kernel_init,
            (self.kernel_size * self.kernel_size * c, self.features),
            self.param_dtype,
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        # On a CPU jax 0.12.0.1 puts a pooling and the products behind it in one library call, which makes NaN of three in bfloat16.
        x = lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)
        if h == w == self.kernel_size or self.kernel_size == 1:
            x = x.reshape(n, h // self.kernel_size, w // self.kernel_size, len(kernel))
            y = (
                pointwise_conv(x, kernel)
                if turned is None
                else _by_turned(x, turned.astype(x.dtype))
            )
        else:
            window = kernel.reshape(self.kernel_size, self.kernel_size, c, self.features)
            y = lax.conv_general_dilated(
                x, window, (1, 1), "VALID", dimension_numbers=DIMENSION_NUMBERS
            )
        return y + bias[None, None, None]


def _by_turned(x: Array, turned: Array) -> Array:
    """(…, C), (K, C) -> (…, K). Without the barriers XLA would turn it back."""
    y = lax.optimization_barrier(turned @ lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T))
    return y.T.reshape(*x.shape[:-1], len(turned))
