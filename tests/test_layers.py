"""Batch normalisation, LRN and fully connected layers against formulas and hand-written loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgg_jax.layers import BatchNorm, FullyConnected, local_response_norm


def test_local_response_norm_formula():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(2, 3, 2, 9)) * 100
    expected = np.zeros_like(a)
    for i in range(9):
        total = sum(a[..., j] ** 2 for j in range(max(0, i - 2), min(8, i + 2) + 1))
        expected[..., i] = a[..., i] / (2 + 1e-4 * total) ** 0.75
    np.testing.assert_allclose(local_response_norm(jnp.float32(a)), expected, rtol=1e-5)


def test_batch_norm_ignores_masked_examples():
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


def test_batch_norm_all_masked_keeps_statistics():
    norm = BatchNorm()
    x = jnp.ones((2, 4, 4, 3))
    variables = norm.init(jax.random.key(0), x)
    mask = jnp.zeros(2, bool)
    _, updated = norm.apply(variables, x, train=True, mask=mask, mutable=["batch_stats"])
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])


def test_fully_connected_on_map_windows():
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


@pytest.mark.parametrize(("n", "h", "w", "size"), [(1, 2, 2, 2), (3, 2, 2, 2), (2, 3, 4, 1)])
def test_fully_connected_gradients(n, h, w, size):
    """Against the sum of outer products over positions."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(n, h, w, 3)), rng.normal(size=(n, h // size, w // size, 7))
    kernel, bias = rng.normal(size=(size * size * 3, 7)), rng.normal(size=7)
    layer = FullyConnected(7, size, jax.nn.initializers.zeros)

    def apply(kernel, bias, x):
        return layer.apply({"params": {"kernel": kernel, "bias": bias}}, x)

    _, pullback = jax.vjp(apply, *map(jnp.float32, (kernel, bias, x)))
    inputs, output_gradients = x.reshape(-1, len(kernel)), g.reshape(-1, 7)
    expected = (
        sum(np.outer(a, b) for a, b in zip(inputs, output_gradients, strict=True)),
        output_gradients.sum(0),
        (output_gradients @ kernel.T).reshape(x.shape),
    )
    for actual, exact in zip(pullback(jnp.float32(g)), expected, strict=True):
        np.testing.assert_allclose(actual, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_in_bfloat16_rounds_once(train):
    """The error is that of rounding the result, also if the mean is large."""
    x = jnp.bfloat16(np.random.default_rng(0).normal(40, 1, (4, 6, 6, 8)))
    wide = np.float64(x)
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    variables = {
        "params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)},
        "batch_stats": {"mean": jnp.float32(mean), "var": jnp.float32(var)},
    }
    layer = BatchNorm(dtype=jnp.bfloat16)
    y, _ = layer.apply(variables, x, train=train, mutable=["batch_stats"])
    assert y.dtype == jnp.bfloat16
    expected = (wide - mean) / np.sqrt(var + layer.epsilon)
    np.testing.assert_allclose(np.float64(y), expected, rtol=2**-8, atol=1e-4)
