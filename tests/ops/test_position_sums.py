"""Sums over positions against NumPy in float64, and the gradients that they are made for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.convolution import assert_all_close
from vgg_jax.layers import BatchNorm
from vgg_jax.ops.position_sums import _largest_divisor, channel_scale, position_dot, position_sum

# One chunk, several, a prime number of images, images larger than a chunk, and no image.
SHAPES = [(2, 3, 4, 5), (64, 16, 16, 32), (37, 32, 32, 16), (3, 80, 64, 64), (0, 3, 4, 5)]


def random_arrays(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_gradients(shape):
    a, b, factor, g = random_arrays(shape, shape, shape[-1:], shape[-1:])
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    dot = (wide_a * wide_b).sum((0, 1, 2))
    y, pullback = jax.vjp(jax.jit(position_dot), a, b)
    assert_all_close((y, *pullback(g)), (dot, wide_b * g, wide_a * g), 1e-5)
    y, pullback = jax.vjp(jax.jit(channel_scale), a, factor)
    assert_all_close((y, *pullback(b)), (wide_a * factor, wide_b * factor, dot), 1e-5)
    y, pullback = jax.vjp(jax.jit(position_sum), a)
    assert_all_close((y, *pullback(g)), (wide_a.sum((0, 1, 2)), np.broadcast_to(g, shape)), 1e-5)


@pytest.mark.parametrize("shape", [(128, 32, 32, 8), (16, 96, 96, 8), (3, 320, 320, 4)])
def test_long_sums_are_accurate(shape):
    """One sum over all positions would be off by more than 1e-5 in float32."""
    x = np.random.default_rng(0).normal(3, 1, shape).astype(np.float32)
    wide = x.astype(np.float64)
    for actual, expected in ((position_sum(x), wide), (position_dot(x, x), wide * wide)):
        assert_all_close([actual], [expected.sum((0, 1, 2))], 2e-6)


@pytest.mark.parametrize(
    ("count", "limit", "expected"),
    [(64, 2, 2), (64, 63, 32), (64, 100, 64), (37, 36, 1), (0, 9, 1)],
)
def test_largest_divisor(count, limit, expected):
    assert _largest_divisor(count, limit) == expected


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a path of a CPU")
def test_batch_norm_has_no_reduction_over_positions():
    """It takes a CPU several times as long as a matrix product."""
    layer, x = BatchNorm(), jnp.ones((4, 3, 3, 2))
    variables, mask = layer.init(jax.random.key(0), x), jnp.arange(4) < 3

    def total(params, x):
        variables_now = variables | {"params": params}
        y, _ = layer.apply(variables_now, x, True, mask, mutable=["batch_stats"])
        return (y**2).sum(-1)

    def backward(params, x):
        return jax.vjp(total, params, x)[1](jnp.ones(x.shape[:3]))

    text = jax.jit(backward).lower(variables["params"], x).as_text()
    assert "dimensions = [0, 1, 2]" not in text
