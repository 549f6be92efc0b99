"""Sums over positions against NumPy in float64, and the gradients that they are made for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.convolution import assert_all_close
from vgg_jax.ops.position_sums import _images_per_chunk, channel_scale, position_dot, position_sum

# One chunk, several, a chunk for each of a prime number of images, images larger than a chunk,
# and no image.
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


@pytest.mark.parametrize(
    ("count", "num_bytes", "expected"),
    [(64, 2**19, 2), (64, 2**20, 1), (64, 2**22, 1), (37, 2**10, 37), (37, 2**16, 1), (0, 1, 1)],
)
def test_images_per_chunk(count, num_bytes, expected):
    assert _images_per_chunk(count, num_bytes) == expected


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a path of a CPU")
def test_sums_are_products():
    """XLA's reduction over (N, H, W) takes a CPU several times as long."""

    def total(x, factor):
        y = channel_scale(x, factor)
        return (position_sum(y) + position_dot(y, y)).sum()

    program = jax.jit(jax.grad(total, (0, 1))).lower(jnp.ones((4, 3, 3, 2)), jnp.ones(2))
    assert "dimensions = [0, 1, 2]" not in program.as_text()
