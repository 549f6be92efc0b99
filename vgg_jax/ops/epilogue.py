"""The epilogue of a convolution (bias, ReLU, mask or pooling) and its gradients.

An epilogue is cheap to compute, but its passes over a large activation are not. So a convolution
takes its epilogue as an argument. It can then apply the epilogue to each block of its output while
the block is in cache. Activations have the shape (N, H, W, C).
"""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from vgg_jax.ops.pooling import crop_to_even, max_pool, max_pool_bwd, max_pool_fwd, relu

# After the bias: nothing, a ReLU, or a ReLU and 2x2 max-pooling.
EpilogueKind = Literal["none", "relu", "relu_pool"]
EPILOGUE_KINDS: tuple[EpilogueKind, ...] = get_args(EpilogueKind)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Epilogue:
    """Operations after a convolution and its bias. A pytree; `kind` is static."""

    kind: EpilogueKind = dataclasses.field(default="none", metadata={"static": True})
    mask: Array | None = None  # bool (N, H, W, 1); the output is 0 where it is False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EpilogueResiduals:
    """Residuals for the gradient of an epilogue. A pytree; `kind` is static."""

    kind: EpilogueKind = dataclasses.field(default="none", metadata={"static": True})
    saved: Any = None  # after a ReLU its output; after a pooling the bits of `max_pool_fwd`


NO_EPILOGUE = Epilogue()  # the bias only


def apply_epilogue(y: Array, bias: Array, epilogue: Epilogue) -> Array:
    """Applies bias, ReLU, mask or pooling to the output of a convolution.

    Args:
        y: Convolution output (N, H, W, C).
        bias: Bias (C,).
        epilogue: The operations to apply after the bias.

    Returns:
        (N, H, W, C), or (N, H // 2, W // 2, C) after a pooling.
    """
    if epilogue.kind == "relu_pool":
        return _bias_relu_pool(crop_to_even(y), bias)
    y = add_bias(y, bias)
    y = relu(y) if epilogue.kind == "relu" else y
    return y if epilogue.mask is None else jnp.where(epilogue.mask, y, 0)


def epilogue_grad(res: EpilogueResiduals, g: Array, shape: tuple[int, ...]) -> Array:
    """Gradient with respect to the convolution output.

    Args:
        res: Residuals of the epilogue.
        g: Gradient with respect to the epilogue's output.
        shape: Shape (N, H, W, …) of the convolution output.

    Returns:
        Gradient (N, H, W, C).
    """
    if res.kind == "relu_pool":
        (g,) = max_pool_bwd(True, res.saved, g)
        return jnp.pad(g, ((0, 0), (0, shape[1] % 2), (0, shape[2] % 2), (0, 0)))
    return jnp.where(res.saved > 0, g, 0) if res.kind == "relu" else g


def materialize_on_cpu(tree: Any) -> Any:
    """Computes the arrays of a pytree once on a CPU, instead of in every reader.

    XLA's CPU backend fuses cheap operations into each of their readers and repeats them there.

    Args:
        tree: A pytree of arrays.

    Returns:
        The same tree. It passes an optimization barrier on a CPU, and nothing elsewhere.
    """
    return lax.platform_dependent(tree, cpu=lax.optimization_barrier, default=lambda tree: tree)


def sum_nhw(g: Array) -> Array:
    """Sums over all positions: (N, H, W, C) -> (C,).

    On a CPU a matrix product does it faster than XLA's reduction
    (docs/performance.md#bias-gradient).

    Args:
        g: Array (N, H, W, C).

    Returns:
        Sums (C,).
    """

    def matrix_product(g: Array) -> Array:
        return (jnp.ones((1, g.size // g.shape[-1]), g.dtype) @ g.reshape(-1, g.shape[-1]))[0]

    return lax.platform_dependent(g, cpu=matrix_product, default=lambda g: g.sum((0, 1, 2)))


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """Adds a bias (C,) to an array (N, H, W, C), with a fast bias gradient.

    Args:
        x: Array (N, H, W, C).
        bias: Bias (C,).

    Returns:
        The sum (N, H, W, C).
    """
    return x + bias[None, None, None]


def _add_bias_fwd(x: Array, bias: Array) -> tuple[Array, None]:
    return add_bias(x, bias), None


def _add_bias_bwd(res: None, g: Array) -> tuple[Array, Array]:
    g = materialize_on_cpu(g)
    return g, sum_nhw(g)


add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


@jax.custom_vjp
def _bias_relu_pool(x: Array, bias: Array) -> Array:
    """Bias, ReLU and max-pooling: (N, 2 h, 2 w, C), (C,) -> (N, h, w, C)."""
    return max_pool(x + bias[None, None, None], fuse_relu=True)


def bias_relu_pool_fwd(x: Array, bias: Array) -> tuple[Array, Array]:
    """Bias, ReLU and max-pooling, with the residual for their gradient.

    Args:
        x: Convolution output (N, 2 h, 2 w, C).
        bias: Bias (C,).

    Returns:
        The pooled output (N, h, w, C) and the bits of `max_pool_fwd`, of the same shape.
    """
    return max_pool_fwd(x + bias[None, None, None], fuse_relu=True)


def _bias_relu_pool_bwd(bits: Array, g: Array) -> tuple[Array, Array]:
    return materialize_on_cpu(*max_pool_bwd(True, bits, g)), pooled_bias_grad(bits, g)


def pooled_bias_grad(bits: Array, g: Array) -> Array:
    """Bias gradient after a ReLU and pooling.

    The gradients of a window's pixels add up to the gradient of its maximum. So this sums a quarter
    of the values that the gradient before the pooling has.

    Args:
        bits: The uint8 bits (N, h, w, C) of `bias_relu_pool_fwd`.
        g: Gradient (N, h, w, C) with respect to the pooled output.

    Returns:
        Gradient (C,).
    """
    return sum_nhw(jnp.where(lax.stop_gradient(bits) > 0, g, 0))


_bias_relu_pool.defvjp(bias_relu_pool_fwd, _bias_relu_pool_bwd)
