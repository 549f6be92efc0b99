"""Batch normalisation, LRN and FC layers against formulas and loops written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgg_jax.layers import BatchNorm, FullyConnected, local_response_norm


def test_local_response_norm_is_krizhevskys_formula():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(2, 3, 2, 9)) * 100
    expected = np.zeros_like(a)
    for i in range(9):
        total = sum(a[..., j] ** 2 for j in range(max(0, i - 2), min(8, i + 2) + 1))
        expected[..., i] = a[..., i] / (2 + 1e-4 * total) ** 0.75
    np.testing.assert_allclose(local_response_norm(jnp.float32(a)), expected, rtol=1e-5)


def test_masked_examples_change_no_statistics():
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(6, 4, 4, 3)) * 5 + 2)
    mask = jnp.array([True, False, True, True, False, True])
    norm = BatchNorm()
    variables = norm.init(jax.random.key(0), x)
    junk = jnp.where(mask[:, None, None, None], x, 1e9)
    y, updated = norm.apply(variables, junk, train=True, mask=mask, mutable=["batch_stats"])
    expected, expected_stats = norm.apply(variables, x[mask], train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(y[mask], expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updated, expected_stats)


def test_a_batch_of_nothing_keeps_the_running_statistics():
    norm = BatchNorm()
    x = jnp.ones((2, 4, 4, 3))
    variables = norm.init(jax.random.key(0), x)
    _, updated = norm.apply(
        variables, x, train=True, mask=jnp.zeros(2, bool), mutable=["batch_stats"]
    )
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])


def test_fully_connected_layer_on_a_map_is_its_matrix_on_every_window():
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(2, 5, 4, 3)))
    layer = FullyConnected(7, 2, jax.nn.initializers.normal(1.0))
    variables = layer.init(jax.random.key(0), x)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    y = layer.apply(variables, x)
    assert y.shape == (2, 4, 3, 7)
    for i in range(4):
        for j in range(3):
            expected = x[:, i : i + 2, j : j + 2].reshape(2, -1) @ kernel + bias[None]
            np.testing.assert_allclose(y[:, i, j], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("n", "h", "w", "side"), [(1, 2, 2, 2), (3, 2, 2, 2), (2, 3, 4, 1)])
def test_gradients_of_a_fully_connected_layer(n, h, w, side):
    """Each position's, added up by hand."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(n, h, w, 3)), rng.normal(size=(n, h // side, w // side, 7))
    kernel, bias = rng.normal(size=(side * side * 3, 7)), rng.normal(size=7)
    layer = FullyConnected(7, side, jax.nn.initializers.zeros)
    arrays = (jnp.float32(array) for array in (kernel, bias, x))
    _, pullback = jax.vjp(
        lambda kernel, bias, x: layer.apply({"params": {"kernel": kernel, "bias": bias}}, x),
        *arrays,
    )
    rows, slopes = x.reshape(-1, len(kernel)), g.reshape(-1, 7)
    expected = (
        sum(np.outer(row, slope) for row, slope in zip(rows, slopes, strict=True)),
        slopes.sum(0),
        (slopes @ kernel.T).reshape(x.shape),
    )
    for ours, right in zip(pullback(jnp.float32(g)), expected, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-5, atol=1e-5)
