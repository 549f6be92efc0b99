"""What is done behind a convolution, its bias, ReLU and pooling, and the gradients of it. Shapes are (N, H, W, C)."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from vgg_jax.ops.pooling import crop_to_even, max_pool, max_pool_bwd, max_pool_fwd, relu

Then = Literal[
    "", "relu", "pool"
]  # what is done behind the bias: nothing, ReLU, or ReLU and max-pooling
THEN: tuple[Then, ...] = get_args(Then)


def apply_epilogue(y: Array, bias: Array, there: Array | None, then: Then) -> Array:
    """The sums of a convolution (N, H, W, C), a bias (C,) -> what `convolution` returns of them."""
    if then == "pool":
        return _add_bias_and_pool(crop_to_even(y), bias)
    y = add_bias(y, bias)
    y = relu(y) if then == "relu" else y
    return y if there is None else jnp.where(there, y, 0)


def epilogue_grad(then: Then, passed: Any, g: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of a convolution's sums, maps of `shape`, from that of what was made of them.

    `passed` says where it went through: behind a ReLU what came out, behind a pooling the bytes of `max_pool_fwd`.
    """
    if then == "pool":
        (g,) = max_pool_bwd(True, passed, g)
        return jnp.pad(g, ((0, 0), (0, shape[1] % 2), (0, shape[2] % 2), (0, 0)))
    return jnp.where(passed > 0, g, 0) if then == "relu" else g


def materialize_on_cpu(g: Array) -> Array:
    """On a CPU what makes it is else fused into its readers, and computed again in each."""
    return lax.platform_dependent(g, cpu=lax.optimization_barrier, default=lambda g: g)


def sum_nhw(g: Array) -> Array:
    """The sum of (N, H, W, C), (C,): a CPU takes 2 to 7 times as long for it in XLA's way as by a product."""

    def by_product(g: Array) -> Array:
        return (jnp.ones((1, g.size // g.shape[-1]), g.dtype) @ g.reshape(-1, g.shape[-1]))[0]

    return lax.platform_dependent(g, cpu=by_product, default=lambda g: g.sum((0, 1, 2)))


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """(N, H, W, C) + (C,)"""
    return x + bias[None, None, None]


def _add_bias(x: Array, bias: Array) -> tuple[Array, None]:
    return add_bias(x, bias), None


def _bias_gradient(_: None, g: Array) -> tuple[Array, Array]:
    g = materialize_on_cpu(g)
    return g, sum_nhw(g)


add_bias.defvjp(_add_bias, _bias_gradient)


@jax.custom_vjp
def _add_bias_and_pool(x: Array, bias: Array) -> Array:
    """(N, 2 h, 2 w, C), (C,) -> (N, h, w, C): the maxima of the ReLU of the sum."""
    return max_pool(x + bias[None, None, None], fuse_relu=True)


def bias_relu_pool_fwd(x: Array, bias: Array) -> tuple[Array, Array]:
    """The same, and the bytes of `max_pool_fwd`."""
    return max_pool_fwd(x + bias[None, None, None], fuse_relu=True)


def _add_bias_and_pool_backward(bits: Array, g: Array) -> tuple[Array, Array]:
    return materialize_on_cpu(*max_pool_bwd(True, bits, g)), pooled_bias_grad(bits, g)


def pooled_bias_grad(bits: Array, g: Array) -> Array:
    """From the gradient of the maxima, a quarter as many values as the map's: the shares of a window add up to it."""
    return sum_nhw(jnp.where(lax.stop_gradient(bits) > 0, g, 0))


_add_bias_and_pool.defvjp(bias_relu_pool_fwd, _add_bias_and_pool_backward)
