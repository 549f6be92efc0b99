"""The operations against loops written by hand and XLA's direct convolution, in both precisions."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from jax import lax

from vgg_jax.layers import (
    BatchNorm,
    FullyConnected,
    _by_rows,
    add_bias,
    compiler_options,
    convolution,
    convolves_bfloat16,
    local_response_norm,
)


def direct(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def with_gradients(f, x, kernel, g):
    y, pullback = jax.vjp(f, x, kernel)
    return y, *pullback(g)


# Each path of the convolution: im2col by channels and by size, Winograd in one piece and in chunks (which divide the images
# or do not), direct.
SHAPES = [
    (3, 1, 1, 8, 5, 3),
    (3, 2, 2, 8, 5, 3),
    (2, 1, 2, 8, 5, 3),
    (2, 3, 3, 8, 5, 5),
    (2, 9, 7, 3, 5, 3),
    (2, 4, 4, 8, 5, 5),
    (2, 2, 9, 8, 5, 3),
    (2, 5, 6, 8, 5, 1),
    (5, 6, 9, 8, 5, 3),
    (3, 50, 47, 6, 4, 3),
    (2, 64, 33, 6, 4, 3),
    (1, 113, 8, 6, 4, 3),
    (2, 12, 11, 6, 4, 5),
]


@pytest.mark.parametrize(("n", "h", "w", "c", "k", "side"), SHAPES)
def test_convolution_and_its_gradients(n, h, w, c, k, side):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape) for shape in ((n, h, w, c), (side, side, c, k), (n, h, w, k))]
    with jax.enable_x64(True):
        expected = [np.asarray(a) for a in with_gradients(direct, *map(jnp.asarray, arrays))]
        double = [np.asarray(a) for a in with_gradients(convolution, *map(jnp.asarray, arrays))]
    single = with_gradients(convolution, *(jnp.asarray(a, jnp.float32) for a in arrays))
    for ours, ours_in_single, theirs in zip(double, single, expected, strict=True):
        largest = np.abs(theirs).max()
        assert (ours.dtype, ours_in_single.dtype) == (np.float64, np.float32)
        assert np.abs(ours - theirs).max() < 1e-12 * largest
        assert np.abs(ours_in_single - theirs).max() < 1e-5 * largest


@pytest.mark.parametrize("side", [3, 5])
def test_convolution_of_a_gpu_for_the_image(side):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(rng.normal(size=shape)) for shape in ((2, 6, 9, 3), (side, side, 3, 4), (2, 6, 9, 4))]
        for ours, theirs in zip(with_gradients(_by_rows, *arrays), with_gradients(direct, *arrays), strict=True):
            assert np.abs(ours - theirs).max() < 1e-12 * np.abs(theirs).max()


def test_an_empty_batch():
    for size in (2, 8, 120):
        assert convolution(jnp.zeros((0, size, size, 8)), jnp.zeros((3, 3, 8, 5))).shape == (0, size, size, 5)


def test_convolution_by_hand():
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(1, 4, 5, 2)), rng.normal(size=(3, 3, 2, 3))
    expected = np.zeros((1, 4, 5, 3))
    for i in range(4):
        for j in range(5):
            for a in range(3):
                for b in range(3):
                    if 0 <= i + a - 1 < 4 and 0 <= j + b - 1 < 5:
                        expected[0, i, j] += x[0, i + a - 1, j + b - 1] @ kernel[a, b]
    np.testing.assert_allclose(convolution(jnp.float32(x), jnp.float32(kernel)), expected, atol=1e-5)


def test_bfloat16_is_not_left_to_winograd():
    x, kernel = jnp.ones((1, 8, 8, 8), jnp.bfloat16), jnp.ones((3, 3, 8, 4), jnp.bfloat16)
    y = convolution(x, kernel)
    assert y.dtype == jnp.bfloat16
    assert (y == direct(x, kernel)).all()


def test_bfloat16_is_onednns_where_xla_gives_it_to_it():
    x, kernel = jnp.ones((1, 8, 8, 16), jnp.bfloat16), jnp.ones((3, 3, 16, 16), jnp.bfloat16)
    processor = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    given = jaxlib.version.__version_info__ >= (0, 12) and ("amx_bf16" in processor or "avx512_bf16" in processor)
    assert convolves_bfloat16() == given
    for function in (convolution, lambda x, kernel: jax.grad(lambda x: convolution(x, kernel).sum())(x)):
        compiled = jax.jit(function, compiler_options=compiler_options(dtype=jnp.bfloat16)).lower(x, kernel).compile()
        found = sum('custom_call_target="__onednn$convolution"' in line for line in compiled.as_text().splitlines())
        assert found == given


@pytest.mark.parametrize("side", [2, 8])
def test_bfloat16_keeps_its_digits_forward_and_backward(side):
    """Against float64 from the same rounded numbers: a product that rounded its partial sums to bfloat16 would be ten times as far off."""
    rng = np.random.default_rng(0)
    x, kernel, g = (
        jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in ((4, side, side, 512), (3, 3, 512, 64), (4, side, side, 64))
    )

    ours = jax.jit(functools.partial(with_gradients, convolution), compiler_options=compiler_options(dtype=jnp.bfloat16))(x, kernel, g)
    with jax.enable_x64(True):
        expected = with_gradients(direct, *(jnp.asarray(np.asarray(each, np.float64)) for each in (x, kernel, g)))
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(one, np.float64), other, atol=5e-3 * np.abs(other).max())


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
    _, updated = norm.apply(variables, x, train=True, mask=jnp.zeros(2, bool), mutable=["batch_stats"])
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


def test_gradients_of_a_bias():
    """Of a sum over all positions, by hand; and its own gradient."""
    x, bias, g = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((3, 5, 7, 4), (4,), (3, 5, 7, 4)))
    y, pullback = jax.vjp(add_bias, x, bias)
    np.testing.assert_array_equal(y, x + bias[None, None, None])
    dx, db = pullback(g)
    np.testing.assert_array_equal(dx, g)
    np.testing.assert_allclose(db, g.sum((0, 1, 2)), rtol=1e-5, atol=1e-5)
    twice = jax.grad(lambda b: (jax.grad(lambda b: (add_bias(x, b) ** 3).sum())(b) ** 2).sum())(bias)
    first = (3 * (x + bias) ** 2).sum((0, 1, 2))
    np.testing.assert_allclose(twice, 2 * first * (6 * (x + bias)).sum((0, 1, 2)), rtol=1e-4)
