"""The epilogue of a convolution (bias, ReLU, mask or pooling) and its derivatives.

An epilogue is cheap to compute, but its passes over a large activation are not. So a convolution
takes its epilogue as an argument. It can then apply the epilogue to each block of its output while
the block is in cache. Activations have the shape (N, H, W, C).
"""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from vgg_jax.ops.bilinear import bilinear_conv, match_varying_axes
from vgg_jax.ops.pooling import crop_to_even, max_pool, max_pool_fwd, pool_tangent, relu

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
    """Residuals for the derivative of an epilogue. A pytree; `kind` is static."""

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


def epilogue_tangent(res: EpilogueResiduals, tangent: Array) -> Array:
    """Derivative of an epilogue with respect to the sum of convolution and bias.

    Args:
        res: Residuals of the epilogue.
        tangent: Tangent (N, H, W, C) of the sum.

    Returns:
        Tangent of the epilogue's output.
    """
    if res.kind == "relu_pool":
        return pool_tangent(res.saved, crop_to_even(tangent))
    return jnp.where(res.saved > 0, tangent, 0) if res.kind == "relu" else tangent


def epilogue_gradient(res: EpilogueResiduals, g: Array, shape: tuple[int, ...]) -> Array:
    """Transpose of `epilogue_tangent`.

    Args:
        res: Residuals of the epilogue.
        g: Gradient with respect to the epilogue's output.
        shape: Shape (N, H, W, C) of the convolution's output.

    Returns:
        Gradient (N, H, W, C).
    """
    _, pullback = jax.vjp(functools.partial(epilogue_tangent, res), jnp.zeros_like(g, shape=shape))
    return pullback(g)[0]


def materialize_on_cpu(tree: Any) -> Any:
    """Computes the arrays of a pytree once on a CPU, instead of in every reader.

    XLA's CPU backend fuses cheap operations into each of their readers and repeats them there. The
    barrier also holds for tangents and gradients.

    Args:
        tree: A pytree of arrays.

    Returns:
        The same tree. It passes an optimization barrier on a CPU, and nothing elsewhere.
    """
    return lax.platform_dependent(tree, cpu=lax.optimization_barrier, default=lambda tree: tree)


def _bias_gradient(ones: Array, g: Array, *, shape: tuple[int, ...]) -> Array:
    """Sums over all positions. On a CPU a matrix product is faster than XLA's reduction.

    See docs/performance.md#bias-gradient.
    """
    return lax.platform_dependent(
        ones,
        g,
        cpu=lambda ones, g: (ones.reshape(1, -1) @ g.reshape(-1, g.shape[-1]))[0],
        default=lambda ones, g: (ones * g).sum((0, 1, 2)),
    )


# A bias is a convolution of an image (N, H, W, 1) of ones.
_scale_by_image = bilinear_conv(
    "bias",
    forward=lambda ones, bias: ones * bias[None, None, None],
    input_gradient=lambda bias, g, *, shape: g @ bias[:, None],
    kernel_gradient=_bias_gradient,
    is_matrix_product=True,
)


def broadcast_bias(bias: Array, shape: tuple[int, ...]) -> Array:
    """Repeats a bias at all positions, with a fast bias gradient.

    Args:
        bias: Bias (C,).
        shape: Shape (N, H, W, C).

    Returns:
        Array of that shape.
    """
    return _scale_by_image(jnp.ones((*shape[:3], 1), bias.dtype), bias)


@jax.custom_jvp
def add_bias(x: Array, bias: Array) -> Array:
    """Adds a bias (C,) to an array (N, H, W, C), with a fast bias gradient.

    Args:
        x: Array (N, H, W, C).
        bias: Bias (C,).

    Returns:
        The sum (N, H, W, C).
    """
    return x + bias[None, None, None]


@functools.partial(add_bias.defjvp, symbolic_zeros=True)
def _add_bias_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, bias = tangents
    y = add_bias(*primals)
    terms = [] if is_zero(x) else [x]
    if not is_zero(bias):
        terms.append(match_varying_axes(broadcast_bias(bias, y.shape), y)[0])
    return y, materialize_on_cpu(add_tangents(terms, y))


def is_zero(tangent: Any) -> bool:
    """Tells if a rule with `symbolic_zeros` got no tangent.

    Args:
        tangent: A tangent.

    Returns:
        True if it is a symbolic zero.
    """
    return isinstance(tangent, SymbolicZero)


def add_tangents(terms: list[Array], y: Array) -> Array:
    """Adds the tangents of an output.

    Args:
        terms: Tangents; none if the output does not depend on what is differentiated.
        y: The output.

    Returns:
        The sum.
    """
    return functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(y)


@jax.custom_jvp
def _bias_relu_pool(x: Array, bias: Array) -> Array:
    """Bias, ReLU and max-pooling: (N, 2 h, 2 w, C), (C,) -> (N, h, w, C)."""
    return max_pool(x + bias[None, None, None], fuse_relu=True)


def bias_relu_pool_fwd(x: Array, bias: Array) -> tuple[Array, Array]:
    """Bias, ReLU and max-pooling, with the residual for their derivative.

    Args:
        x: Convolution output (N, 2 h, 2 w, C).
        bias: Bias (C,).

    Returns:
        The pooled output (N, h, w, C) and the bits of `max_pool_fwd`, of the same shape.
    """
    return max_pool_fwd(x + bias[None, None, None], fuse_relu=True)


@functools.partial(_bias_relu_pool.defjvp, symbolic_zeros=True)
def _bias_relu_pool_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    x, bias = tangents
    y, bits = bias_relu_pool_fwd(*primals)
    terms = [] if is_zero(x) else [pool_tangent(bits, materialize_on_cpu(x))]
    if not is_zero(bias):
        terms.append(pooled_bias_tangent(bits, bias))
    return y, add_tangents(terms, y)


def pooled_bias_tangent(bits: Array, tangent: Array) -> Array:
    """Derivative of a ReLU and pooling with respect to the bias before them.

    A window has the tangent of the bias if its maximum passes the ReLU. So the gradient sums a
    quarter of the values that the gradient before the pooling has.

    Args:
        bits: The uint8 bits (N, h, w, C) of `bias_relu_pool_fwd`.
        tangent: Tangent (C,) of the bias.

    Returns:
        Tangent (N, h, w, C) of the pooled output.
    """
    return jnp.where(bits > 0, broadcast_bias(tangent, bits.shape), 0)
