"""ReLU and max-pooling, with their gradients, against values and loops written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgg_jax.ops.pooling import max_pool, relu


def test_max_pool_leaves_an_odd_edge_out():
    x = np.random.default_rng(0).normal(size=(2, 5, 6, 3)).astype(np.float32)
    expected = [
        [
            [max(x[n, 2 * i + a, 2 * j + b, c] for a in (0, 1) for b in (0, 1)) for c in range(3)]
            for j in range(3)
        ]
        for n in range(2)
        for i in range(2)
    ]
    np.testing.assert_array_equal(max_pool(x), np.reshape(expected, (2, 2, 3, 3)))


@pytest.mark.parametrize("fuse_relu", [False, True])
@pytest.mark.parametrize("ceil", [False, True])
def test_max_pool_shares_the_gradient_among_equal_maxima(ceil, fuse_relu):
    rng = np.random.default_rng(0)
    x = rng.integers(-1, 2, size=(2, 5, 6, 3)).astype(np.float32)
    g = rng.normal(size=(2, 3 if ceil else 2, 3, 3)).astype(np.float32)
    expected = np.zeros_like(x)
    for n, i, j, c in np.ndindex(g.shape):
        window = x[n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c]
        largest = window == window.max()
        slope = window > 0 if fuse_relu else 1
        expected[n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c] = (
            slope * largest * g[n, i, j, c] / largest.sum()
        )
    y, pullback = jax.vjp(lambda x: max_pool(x, ceil, fuse_relu), x)
    np.testing.assert_allclose(pullback(g)[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(y, relu(max_pool(x, ceil)) if fuse_relu else max_pool(x, ceil))
    assert (
        sum(leaf.nbytes for leaf in jax.tree.leaves(pullback) if leaf.ndim) == g.size
    )  # kept for it is a byte for each window


def test_relu_has_no_slope_at_zero():
    x, g = jnp.float32([-1, -0.0, 0, 2]), jnp.float32([1, 2, 3, 4])
    y, pullback = jax.vjp(relu, x)
    np.testing.assert_array_equal(y, [0, 0, 0, 2])
    np.testing.assert_array_equal(pullback(g)[0], [0, 0, 0, 4])
