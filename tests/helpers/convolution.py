"""A reference for convolutions, and comparisons of values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vgg_jax.ops.epilogue import NO_EPILOGUE


def direct_conv(x, kernel):
    """XLA's convolution, called without `vgg_jax.ops`."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def reference_conv(x, kernel, bias, epilogue=NO_EPILOGUE):
    """Convolution, bias, ReLU, pooling and mask, one after the other."""
    y = direct_conv(x, kernel) + bias[None, None, None]
    y = jnp.maximum(y, 0) if epilogue.kind != "none" else y
    if epilogue.kind == "relu_pool":
        n, h, w, c = y.shape
        y = y[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
    return y if epilogue.mask is None else jnp.where(epilogue.mask, y, 0)


def value_and_grads(function, *arrays):
    """Output and gradients of a function of all arrays but the last, the output's gradient."""

    @jax.jit  # compiled at once, instead of operation by operation
    def compute(*arrays):
        y, pullback = jax.vjp(function, *arrays[:-1])
        return y, *pullback(arrays[-1])

    return compute(*arrays)


def assert_all_close(actual, expected, tolerance):
    """Compare arrays pair by pair, relative to the largest expected value."""
    for a, e in zip(actual, expected, strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        assert a.shape == e.shape
        assert np.abs(a - e).max(initial=0) <= tolerance * np.abs(e).max(initial=0)
