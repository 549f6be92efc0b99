"""ReLU, pooling and their gradients against hand-written values and loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgg_jax.ops.pooling import max_pool, relu


def test_max_pool_drops_odd_edge():
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 3)).astype(np.float32)
    expected = np.zeros((2, 2, 3, 3))
    for n, i, j, c in np.ndindex(expected.shape):
        expected[n, i, j, c] = max(x[n, 2 * i + a, 2 * j + b, c] for a in (0, 1) for b in (0, 1))
    np.testing.assert_array_equal(max_pool(x), expected)


@pytest.mark.parametrize("fuse_relu", [False, True])
@pytest.mark.parametrize("ceil", [False, True])
def test_max_pool_gradient_shared_by_ties(ceil, fuse_relu):
    rng = np.random.default_rng(0)
    x = rng.integers(-1, 2, size=(2, 5, 6, 3)).astype(np.float32)
    g = rng.normal(size=(2, 3 if ceil else 2, 3, 3)).astype(np.float32)
    expected = np.zeros_like(x)
    for n, i, j, c in np.ndindex(g.shape):
        window = x[n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
        is_max = window == window.max()
        slope = window > 0 if fuse_relu else 1
        share = slope * is_max * g[n, i, j, c] / is_max.sum()
        expected[n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c] = share
    y, pullback = jax.vjp(lambda x: max_pool(x, ceil, fuse_relu), x)
    np.testing.assert_allclose(pullback(g)[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(y, relu(max_pool(x, ceil)) if fuse_relu else max_pool(x, ceil))
    # The gradient stores one byte for each window.
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(pullback) if leaf.ndim)
    assert stored == g.size


def test_relu_gradient_at_zero():
    x, g = jnp.float32([-1, -0.0, 0, 2]), jnp.float32([1, 2, 3, 4])
    y, pullback = jax.vjp(relu, x)
    np.testing.assert_array_equal(y, [0, 0, 0, 2])
    np.testing.assert_array_equal(pullback(g)[0], [0, 0, 0, 4])
