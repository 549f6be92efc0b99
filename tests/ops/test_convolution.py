"""The operations against loops written by hand and XLA's direct convolution, in both precisions."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest
from jax import lax

import vgg_jax.ops.convolution
from vgg_jax.ops.convolution import (
    _conv_rows_as_channels,
    _images_per_chunk,
    _on_cuda,
    convolution,
    default_conv,
)
from vgg_jax.ops.epilogue import THEN, add_bias
from vgg_jax.ops.pooling import max_pool, relu
from vgg_jax.runtime.compiler import compiler_options, has_onednn_bfloat16


def direct(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def with_gradients(f, *arrays):
    """Of a function of all but the last, which is the gradient of what it returns."""
    y, pullback = jax.vjp(f, *arrays[:-1])
    return y, *pullback(arrays[-1])


def in_steps(x, kernel, bias, there=None, then=""):
    """One thing after the other, the convolution by XLA."""
    y = direct(x, kernel) + bias[None, None, None]
    y = relu(y) if then else y
    y = max_pool(y) if then == "pool" else y
    return y if there is None else jnp.where(there, y, 0)


# Each path of the convolution: im2col by size and by channels, Winograd (in several blocks: see test_winograd), direct.
SHAPES = [
    (2, 2, 9, 8, 5, 3),
    (2, 9, 7, 3, 5, 3),
    (2, 7, 6, 4, 2, 5),
    (5, 6, 9, 8, 5, 3),
    (3, 50, 47, 6, 4, 3),
    (2, 64, 33, 6, 4, 3),
    (1, 113, 8, 6, 4, 3),
    (2, 12, 11, 6, 4, 5),
    (2, 5, 6, 8, 5, 1),
]
MORE = [
    (3, 1, 1, 8, 5, 3),
    (3, 2, 2, 8, 5, 3),
    (2, 1, 2, 8, 5, 3),
    (2, 3, 3, 8, 5, 5),
    (2, 4, 4, 8, 5, 5),
    (2, 8, 6, 1, 2, 3),
]


@pytest.mark.parametrize(
    ("shape", "then"),
    [*((shape, then) for shape in SHAPES for then in THEN), *((shape, "") for shape in MORE)],
)
def test_convolution_and_its_gradients(shape, then):
    n, h, w, c, k, side = shape
    rng = np.random.default_rng(0)
    out = (n, h // 2, w // 2, k) if then == "pool" else (n, h, w, k)
    arrays = [rng.normal(size=shape) for shape in ((n, h, w, c), (side, side, c, k), (k,), out)]
    ours, theirs = (
        jax.jit(functools.partial(with_gradients, functools.partial(f, then=then)))
        for f in (convolution, in_steps)
    )
    with jax.enable_x64(True):
        expected = [np.asarray(a) for a in theirs(*map(jnp.asarray, arrays))]
        double = [np.asarray(a) for a in ours(*map(jnp.asarray, arrays))]
    single = ours(*(jnp.asarray(a, jnp.float32) for a in arrays))
    for ours, ours_in_single, theirs in zip(double, single, expected, strict=True):
        largest = np.abs(theirs).max(initial=0)
        assert (ours.dtype, ours_in_single.dtype) == (np.float64, np.float32)
        assert np.abs(ours - theirs).max(initial=0) <= 1e-12 * largest
        assert np.abs(ours_in_single - theirs).max(initial=0) <= 1e-5 * largest


@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize(
    ("of_accelerator", "channels"), [(default_conv, 6), (_on_cuda, 6), (_on_cuda, 3)]
)
def test_convolution_of_an_accelerator_and_its_gradients(of_accelerator, channels, then):
    rng = np.random.default_rng(0)
    out = (2, 2, 4, 4) if then == "pool" else (2, 5, 9, 4)
    with jax.enable_x64(True):
        arrays = [
            jnp.asarray(rng.normal(size=shape))
            for shape in ((2, 5, 9, channels), (3, 3, channels, 4), (4,), out)
        ]
        ours, theirs = (
            with_gradients(f, *arrays)
            for f in (
                lambda *a: of_accelerator(*a, None, None, then=then),
                lambda *a: in_steps(*a, then=then),
            )
        )
        for mine, his in zip(ours, theirs, strict=True):
            assert jnp.abs(mine - his).max() < 1e-12 * jnp.abs(his).max()


@pytest.mark.parametrize(
    ("positions", "at_a_time", "then"),
    [(1, 1, ""), (130, 2, "relu"), (200, 2, "pool"), (300, 4, "relu")],
)
def test_gradients_of_images_some_at_a_time(positions, at_a_time, then, monkeypatch):
    """Of four with 63 positions each."""
    monkeypatch.setattr(vgg_jax.ops.convolution, "_CHUNK_POSITIONS", positions)
    jax.clear_caches()  # what was traced knows the other number
    rng = np.random.default_rng(0)
    shapes = (4, 9, 7, 3), (3, 3, 3, 5), (5,), (4, 4, 3, 5) if then == "pool" else (4, 9, 7, 5)
    assert _images_per_chunk(shapes[0]) == at_a_time
    with jax.enable_x64(True):
        arrays = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        ours, theirs = (
            with_gradients(functools.partial(f, then=then), *arrays)
            for f in (convolution, in_steps)
        )
        for mine, his in zip(ours, theirs, strict=True):
            assert jnp.abs(mine - his).max() < 1e-12 * jnp.abs(his).max()


@pytest.mark.parametrize(
    ("n", "h", "w", "c"), [(3, 10, 7, 6), (1, 113, 8, 6), (2, 2, 2, 6), (3, 10, 7, 3)]
)
def test_where_nothing_is_there_zeros_come_out_and_no_gradient_goes_in(n, h, w, c):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel, bias, g = (
            jnp.asarray(rng.normal(size=shape))
            for shape in ((n, h, w, c), (3, 3, c, 4), (4,), (n, h, w, 4))
        )
        there = jnp.asarray(rng.random((n, h, w, 1)) < 0.7)
        ours, theirs = (
            with_gradients(
                lambda *arrays, f=f: f(*arrays, there=there, then="relu"), x, kernel, bias, g
            )
            for f in (convolution, in_steps)
        )
        for mine, his in zip(ours, theirs, strict=True):
            assert jnp.abs(mine - his).max() < 1e-12 * jnp.abs(his).max()


@pytest.mark.parametrize("side", [3, 5])
def test_convolution_of_a_gpu_for_the_image(side):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        arrays = [
            jnp.asarray(rng.normal(size=shape))
            for shape in ((2, 6, 9, 3), (side, side, 3, 4), (2, 6, 9, 4))
        ]
        for ours, theirs in zip(
            with_gradients(_conv_rows_as_channels, *arrays),
            with_gradients(direct, *arrays),
            strict=True,
        ):
            assert np.abs(ours - theirs).max() < 1e-12 * np.abs(theirs).max()


@pytest.mark.parametrize(("size", "channels"), [(2, 8), (8, 8), (120, 8), (8, 3)])
def test_an_empty_batch(size, channels):
    arrays = jnp.zeros((0, size, size, channels)), jnp.zeros((3, 3, channels, 5)), jnp.zeros(5)
    y, *gradients = with_gradients(convolution, *arrays, jnp.zeros((0, size, size, 5)))
    assert y.shape == (0, size, size, 5)
    assert [each.shape for each in gradients] == [each.shape for each in arrays]
    assert convolution(*arrays, then="pool").shape == (0, size // 2, size // 2, 5)


@pytest.mark.parametrize("channels", [8, 3])
def test_narrow_types_beside_wide_ones(channels):
    with jax.enable_x64(True):
        x, kernel, bias = (
            jnp.ones(shape, jnp.float16)
            for shape in ((1, 4, 4, channels), (3, 3, channels, 2), (2,))
        )
        y, *gradients = with_gradients(
            convolution, x, kernel, bias, jnp.ones((1, 4, 4, 2), jnp.float16)
        )
    assert [y[0, 1, 1, 0], *(each.dtype for each in gradients)] == [
        9 * channels + 1,
        *[jnp.float16] * 3,
    ]


def test_convolution_by_hand():
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(1, 4, 5, 2)), rng.normal(size=(3, 3, 2, 3))
    bias = rng.normal(size=3)
    expected = np.tile(bias, (1, 4, 5, 1))
    for i in range(4):
        for j in range(5):
            for a in range(3):
                for b in range(3):
                    if 0 <= i + a - 1 < 4 and 0 <= j + b - 1 < 5:
                        expected[0, i, j] += x[0, i + a - 1, j + b - 1] @ kernel[a, b]
    np.testing.assert_allclose(
        convolution(*map(jnp.float32, (x, kernel, bias))), expected, atol=1e-5
    )


def test_bfloat16_is_onednns_where_xla_gives_it_to_it():
    x, kernel = jnp.ones((1, 8, 8, 16), jnp.bfloat16), jnp.ones((3, 3, 16, 16), jnp.bfloat16)
    processor = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    given = jaxlib.version.__version_info__ >= (0, 12) and (
        "amx_bf16" in processor or "avx512_bf16" in processor
    )
    assert has_onednn_bfloat16() == given
    bias = jnp.zeros(16, jnp.bfloat16)
    for function in (
        convolution,
        lambda x, *others: jax.grad(lambda x: convolution(x, *others).sum())(x),
    ):
        compiled = (
            jax.jit(function, compiler_options=compiler_options(dtype=jnp.bfloat16))
            .lower(x, kernel, bias)
            .compile()
        )
        found = sum(
            'custom_call_target="__onednn$convolution"' in line
            for line in compiled.as_text().splitlines()
        )
        assert found == given


@pytest.mark.parametrize(
    ("side", "channels", "of_kernel"), [(2, 512, 3), (8, 512, 3), (40, 3, 3), (8, 512, 1)]
)
def test_bfloat16_keeps_its_digits_forward_and_backward(side, channels, of_kernel):
    """Against float64 from the same rounded numbers: a product that rounded its partial sums to bfloat16 would be ten times as far off."""
    rng = np.random.default_rng(0)
    shapes = (
        (4, side, side, channels),
        (of_kernel, of_kernel, channels, 64),
        (64,),
        (4, side, side, 64),
    )
    arrays = [jnp.asarray(rng.normal(size=size), jnp.bfloat16) for size in shapes]
    arrays[2] *= 0  # a bias is added to what has been rounded
    ours = jax.jit(
        functools.partial(with_gradients, convolution),
        compiler_options=compiler_options(dtype=jnp.bfloat16),
    )(*arrays)
    with jax.enable_x64(True):
        expected = with_gradients(
            in_steps, *(jnp.asarray(np.asarray(each, np.float64)) for each in arrays)
        )
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(one, np.float64), other, atol=5e-3 * np.abs(other).max()
        )


def test_gradients_of_a_bias():
    """Of a sum over all positions, by hand; and its own gradient."""
    x, bias, g = (
        np.random.default_rng(0).normal(size=shape).astype(np.float32)
        for shape in ((3, 5, 7, 4), (4,), (3, 5, 7, 4))
    )
    y, pullback = jax.vjp(add_bias, x, bias)
    np.testing.assert_array_equal(y, x + bias[None, None, None])
    dx, db = pullback(g)
    np.testing.assert_array_equal(dx, g)
    np.testing.assert_allclose(db, g.sum((0, 1, 2)), rtol=1e-5, atol=1e-5)
    twice = jax.grad(lambda b: (jax.grad(lambda b: (add_bias(x, b) ** 3).sum())(b) ** 2).sum())(
        bias
    )
    first = (3 * (x + bias) ** 2).sum((0, 1, 2))
    np.testing.assert_allclose(twice, 2 * first * (6 * (x + bias)).sum((0, 1, 2)), rtol=1e-4)
