"""Layers of the nets: convolution, batch normalisation, LRN, dropout and fully connected layers.

Activations have the shape (N, H, W, C). Fully connected layers apply to maps, as in §3.2.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jax import Array, lax

from vgg_jax.ops.convolution import convolution, default_conv, pointwise_conv, window_conv
from vgg_jax.ops.epilogue import NO_EPILOGUE, Epilogue, add_bias, materialize_on_cpu
from vgg_jax.ops.position_sums import channel_scale, position_dot, position_sum


def local_response_norm(
    x: Array, k: float = 2.0, n: int = 5, alpha: float = 1e-4, beta: float = 0.75
) -> Array:
    """Local response normalisation (Krizhevsky et al. 2012, §3.3).

    Computes x / (k + alpha · Σ x²)^beta, where the sum is over the n neighbouring channels. Caffe
    and PyTorch divide alpha by n: their alpha=5e-4 equals 1e-4 here.

    Args:
        x: Input (…, C).
        k: Constant of the denominator.
        n: Number of channels in the sum, centred on the channel.
        alpha: Factor of the sum.
        beta: Exponent of the denominator.

    Returns:
        Output (…, C).
    """
    channels = x.shape[-1]
    squares = jnp.pad(x * x, [(0, 0)] * (x.ndim - 1) + [(n // 2, n // 2)])
    total = sum(squares[..., i : i + channels] for i in range(n))
    return x * (k + alpha * total) ** -beta


def _kernel_and_bias(layer: "Conv | FullyConnected", shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Creates or reads the parameters of a layer."""
    kernel = layer.param("kernel", layer.kernel_init, shape, layer.param_dtype)
    bias = layer.param("bias", nn.initializers.zeros, (layer.features,), layer.param_dtype)
    return lax.stop_gradient((kernel, bias)) if layer.frozen else (kernel, bias)


class Conv(nn.Module):
    """Convolution with stride 1 and zero padding that keeps the size, and its epilogue.

    Attributes:
        features: Output channels K.
        kernel_size: Side k of the kernel, odd.
        kernel_init: Initialiser of the kernel (k, k, C, K); the bias (K,) starts at 0.
        dtype: Type of the computation.
        param_dtype: Type of the parameters.
        frozen: The gradients of the parameters are 0.
        quick_compile: Convolve by XLA, which compiles sooner on a CPU and is slower.
    """

    features: int
    kernel_size: int
    kernel_init: nn.initializers.Initializer
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    frozen: bool = False
    quick_compile: bool = False

    @nn.compact
    def __call__(
        self, x: Array, epilogue: Epilogue = NO_EPILOGUE, filters: Array | None = None
    ) -> Array:
        """Applies the convolution and its epilogue.

        Args:
            x: Input (N, H, W, C).
            epilogue: Operations after the bias: ReLU, mask or pooling.
            filters: The kernel's Winograd filters, if computed in advance.

        Returns:
            (N, H, W, K), or (N, H // 2, W // 2, K) if the epilogue pools.
        """
        size = self.kernel_size
        shape = (size, size, x.shape[-1], self.features)
        kernel, bias = _kernel_and_bias(self, shape)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        # `init` often runs outside of jit, where XLA's own convolution compiles much faster
        # (docs/performance.md#compile-time-of-init).
        if self.quick_compile or self.is_initializing():
            return default_conv(x, kernel, bias, epilogue)
        return convolution(x, kernel, bias, epilogue, filters)


class BatchNorm(nn.Module):
    """Batch normalisation over (N, H, W), with a mask of the real examples.

    Running statistics are PyTorch's: the running variance is unbiased, while linen's is biased.
    Padding examples (mask False) do not change the statistics.

    Attributes:
        momentum: Weight of the old running statistics. PyTorch's momentum is 1 minus this.
        epsilon: Added to the variance.
        dtype: Type of the output.
        param_dtype: Type of the parameters and the running statistics.
        axis_name: Axis of the surrounding `shard_map` over which the batch is split, if any.
        frozen: The gradients of the parameters are 0, and the running statistics are used and stay
            as they are, also in training.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    axis_name: str | None = None
    frozen: bool = False

    @nn.compact
    def __call__(self, x: Array, train: bool = False, mask: Array | None = None) -> Array:
        """Normalises the activations.

        Args:
            x: Input (N, H, W, C).
            train: Use the batch's statistics and update the running ones.
            mask: bool (N,), True for real examples; None if all are.

        Returns:
            Output (N, H, W, C).
        """
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, self.param_dtype)
        if self.frozen:
            scale, bias = lax.stop_gradient((scale, bias))
        # In at least float32, and rounded once: rounded to bfloat16, a large mean would swallow the
        # rest.
        compute_dtype = jnp.promote_types(x.dtype, jnp.promote_types(self.dtype, jnp.float32))
        x = x.astype(compute_dtype)
        if train and not self.frozen and not self.is_initializing():
            mean, centred, var, count = _batch_statistics(x, mask, self.axis_name)
            keep = jnp.where(count > 0, self.momentum, 1.0)  # a micro-batch may be all padding
            new_mean = keep * running_mean.value + (1 - keep) * mean
            running_mean.value = new_mean.astype(self.param_dtype)
            unbiased = var * count / jnp.maximum(count - 1, 1)
            new_var = keep * running_var.value + (1 - keep) * unbiased
            running_var.value = new_var.astype(self.param_dtype)
            factor = (scale * lax.rsqrt(var + self.epsilon)).astype(compute_dtype)
            y = channel_scale(centred, factor)
            return add_bias(y, bias.astype(compute_dtype)).astype(self.dtype)
        mean, var = running_mean.value, running_var.value
        factor = scale * lax.rsqrt(var + self.epsilon)
        x, factor, offset = promote_dtype(x, factor, bias - mean * factor, dtype=compute_dtype)
        return (x * factor[None, None, None] + offset[None, None, None]).astype(self.dtype)


def _batch_statistics(
    x: Array, mask: Array | None, axis_name: str | None
) -> tuple[Array, Array, Array, Array]:
    """Mean (C,), all of x minus the mean, biased variance (C,) and number of counted positions."""
    mask = jnp.ones(x.shape[0], bool) if mask is None else mask

    def total(values: Array) -> Array:
        return values if axis_name is None else lax.psum(values, axis_name)

    where = mask[:, None, None, None]
    # As a float: the positions of 43,000 photos overflow int32.
    count = total(mask.sum().astype(x.dtype)) * (x.shape[1] * x.shape[2])
    mean = total(position_sum(jnp.where(where, x, 0))) / jnp.maximum(count, 1)
    centred = add_bias(x, -mean)
    masked = jnp.where(where, centred, 0)
    var = total(position_dot(masked, masked)) / jnp.maximum(count, 1)
    return mean, centred, var, count


class Dropout(nn.Module):
    """Dropout with one random draw per example.

    The draw of a row depends on the "dropout" rng and the row's index in the whole batch only. So a
    batch gets the same dropout on any number of devices, and costs as much as one draw for all rows
    (docs/performance.md#dropout).

    Attributes:
        rate: Probability to set a value to zero; the others are divided by 1 - rate.
        axis_name: Axis of the surrounding `shard_map` over which the batch is split, if any.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Drops values in training, else returns the input.

        Args:
            x: Input (N, …).
            train: Drop values; needs a "dropout" rng.

        Returns:
            Output (N, …).
        """
        if not train or self.rate == 0:
            return x
        key = self.make_rng("dropout")
        first_row = 0 if self.axis_name is None else lax.axis_index(self.axis_name) * len(x)

        def keep(row: Array) -> Array:
            return jax.random.bernoulli(jax.random.fold_in(key, row), 1 - self.rate, x.shape[1:])

        return jnp.where(jax.vmap(keep)(first_row + jnp.arange(len(x))), x / (1 - self.rate), 0)


class FullyConnected(nn.Module):
    """Fully connected layer, applied to every window of a map (§3.2).

    The kernel is (k · k · C, K), with rows in the order y, x, channel. It is a matrix product for
    k = 1 or a map of k x k positions, else a convolution without padding.

    Attributes:
        features: Outputs K.
        kernel_size: Side k of the window.
        kernel_init: Initialiser of the kernel; the bias (K,) starts at 0.
        dtype: Type of the computation.
        param_dtype: Type of the parameters.
        frozen: The gradients of the parameters are 0.
    """

    features: int
    kernel_size: int
    kernel_init: nn.initializers.Initializer
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    frozen: bool = False

    @nn.compact
    def __call__(self, x: Array, kernel_t: Array | None = None) -> Array:
        """Applies the layer.

        Args:
            x: Input (N, h, w, C).
            kernel_t: The transposed kernel (K, k · k · C), for inference. A CPU reads it faster
                for a few images (docs/performance.md#transposed-fc-kernels).

        Returns:
            Output (N, h - k + 1, w - k + 1, K).
        """
        n, h, w, c = x.shape
        size = self.kernel_size
        shape = (size * size * c, self.features)
        kernel, bias = _kernel_and_bias(self, shape)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        # On a CPU, jax 0.12.0.1 puts a pooling and the products after it into one library call.
        # Three such products in bfloat16 give NaN. The barrier prevents the call.
        x = materialize_on_cpu(x)
        if h == w == size or size == 1:
            if size > 1:
                # jax 0.10 refuses one reshape where the batch is sharded over an explicit axis.
                x = x.reshape(n, len(kernel))[:, None, None]
            if kernel_t is None:
                y = pointwise_conv(x, kernel)
            else:
                y = _multiply_transposed(x, kernel_t.astype(x.dtype))
        else:
            y = window_conv(x, kernel)
        return y + bias[None, None, None]


def _multiply_transposed(x: Array, kernel_t: Array) -> Array:
    """(…, C), (K, C) -> (…, K). The barriers keep XLA from transposing the kernel back."""
    columns = lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    y = lax.optimization_barrier(kernel_t @ columns)
    return y.T.reshape(*x.shape[:-1], len(kernel_t))
