"""Convolution against hand-written loops and XLA's direct convolution, in several dtypes."""

import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import pytest

from tests.helpers.convolution import (
    assert_all_close,
    direct_conv,
    reference_conv,
    value_and_grads,
)
from vgg_jax.ops import convolution_cpu
from vgg_jax.ops.convolution import (
    _conv_rows_as_channels,
    convolution,
    default_conv,
    first_cuda_conv,
    window_conv,
)
from vgg_jax.ops.convolution_cpu import _images_per_chunk
from vgg_jax.ops.epilogue import EPILOGUE_KINDS, Epilogue, add_bias
from vgg_jax.runtime.compiler import compiler_options, has_onednn_bfloat16

# (N, H, W, C, K, kernel size) for each path of a CPU: matrix products on small maps, im2col on few
# channels, Winograd (in several blocks, see test_winograd), XLA, and the 1x1 convolution.
SHAPES = [
    (2, 2, 9, 8, 5, 3),
    (2, 9, 7, 3, 5, 3),
    (2, 7, 6, 4, 2, 5),
    (5, 6, 9, 8, 5, 3),
    (3, 50, 47, 6, 4, 3),
    (2, 64, 33, 6, 4, 3),
    (1, 113, 8, 6, 4, 3),
    (2, 12, 11, 6, 4, 5),
    (2, 8, 9, 6, 4, 7),
    (2, 5, 6, 8, 5, 1),
]
SHAPES_WITHOUT_EPILOGUE = [
    (3, 1, 1, 8, 5, 3),
    (3, 2, 2, 8, 5, 3),
    (2, 1, 2, 8, 5, 3),
    (2, 3, 3, 8, 5, 5),
    (2, 4, 4, 8, 5, 5),
    (2, 8, 6, 1, 2, 3),
    (2, 5, 5, 2, 3, 7),
    (2, 2, 3, 4, 5, 7),
]


def random_arrays(n, h, w, c, k, size, kind="none", seed=0):
    """Input, kernel, bias and the output's gradient."""
    rng = np.random.default_rng(seed)
    out = (n, h // 2, w // 2, k) if kind == "relu_pool" else (n, h, w, k)
    return [rng.normal(size=s) for s in ((n, h, w, c), (size, size, c, k), (k,), out)]


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        *((shape, kind) for shape in SHAPES[:4] for kind in EPILOGUE_KINDS[1:]),
        *((shape, "relu_pool") for shape in SHAPES[4:]),
        *((shape, "none") for shape in SHAPES_WITHOUT_EPILOGUE[1::2]),
        *(
            pytest.param(shape, kind, marks=pytest.mark.slow)
            for shapes, kinds in (
                (SHAPES[:4], ("none",)),
                (SHAPES[4:], ("none", "relu")),
                (SHAPES_WITHOUT_EPILOGUE[::2], ("none",)),
            )
            for shape in shapes
            for kind in kinds
        ),
    ],
)
def test_convolution_gradients(shape, kind):
    arrays = random_arrays(*shape, kind)
    compute, reference = (
        functools.partial(value_and_grads, functools.partial(f, epilogue=Epilogue(kind)))
        for f in (convolution, reference_conv)
    )
    with jax.enable_x64(True):
        expected = [np.asarray(a) for a in reference(*map(jnp.asarray, arrays))]
        double = [np.asarray(a) for a in compute(*map(jnp.asarray, arrays))]
    single = compute(*(jnp.asarray(a, jnp.float32) for a in arrays))
    assert {a.dtype for a in double} == {np.dtype(np.float64)}
    assert {a.dtype for a in single} == {np.dtype(np.float32)}
    assert_all_close(double, expected, 1e-12)
    assert_all_close(single, expected, 1e-5)


def test_small_maps_are_not_multiplied_with_padding():
    """On 2x2 pixels, each of four outputs reads four inputs: 16 products, not nine times four."""
    x, kernel = jnp.ones((8, 2, 2, 16)), jnp.ones((3, 3, 16, 32))
    multiply_adds = 8 * 16 * 16 * 32

    def forward(x, kernel):
        return convolution(x, kernel, jnp.zeros(32))

    def gradients(x, kernel):
        return jax.vjp(forward, x, kernel)[1](jnp.ones((8, 2, 2, 32)))

    for function, products in ((forward, 1), (gradients, 2)):
        flops = jax.jit(function).lower(x, kernel).compile().cost_analysis()["flops"]
        assert flops == pytest.approx(2 * products * multiply_adds, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EPILOGUE_KINDS)
@pytest.mark.parametrize(("function", "channels"), [(default_conv, 6), (first_cuda_conv, 3)])
def test_accelerator_conv_gradients(function, channels, kind):
    epilogue = Epilogue(kind)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a) for a in random_arrays(2, 5, 9, channels, 4, 3, kind)]
        actual, expected = (
            value_and_grads(functools.partial(f, epilogue=epilogue), *arrays)
            for f in (function, reference_conv)
        )
        assert_all_close(actual, expected, 1e-12)


@pytest.mark.parametrize(("channels", "has_rows_as_channels"), [(3, True), (6, False)])
def test_gpus_stack_the_rows_of_images_only(channels, has_rows_as_channels):
    x, kernel, bias = jnp.ones((2, 8, 8, channels)), jnp.ones((3, 3, channels, 4)), jnp.ones(4)
    traced = jax.jit(convolution).trace(x, kernel, bias)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("tensor<3x1x" in text) == has_rows_as_channels


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk_positions", "chunk_size", "kind"),
    [(1, 1, "none"), (130, 2, "relu"), (200, 2, "relu_pool"), (300, 4, "relu")],
)
def test_image_gradients_in_chunks(chunk_positions, chunk_size, kind, monkeypatch):
    """Four images of 63 positions each."""
    monkeypatch.setattr(convolution_cpu, "_CHUNK_POSITIONS", chunk_positions)
    jax.clear_caches()  # traces of other tests used another chunk size
    assert _images_per_chunk((4, 9, 7, 3)) == chunk_size
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a) for a in random_arrays(4, 9, 7, 3, 5, 3, kind)]
        actual, expected = (
            value_and_grads(functools.partial(f, epilogue=Epilogue(kind)), *arrays)
            for f in (convolution, reference_conv)
        )
        assert_all_close(actual, expected, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "h", "w", "c"), [(3, 10, 7, 6), (1, 113, 8, 6), (2, 2, 2, 6), (3, 10, 7, 3)]
)
def test_convolution_masks_gradient(n, h, w, c):
    mask = jnp.asarray(np.random.default_rng(1).random((n, h, w, 1)) < 0.7)
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a) for a in random_arrays(n, h, w, c, 4, 3)]
        actual, expected = (
            value_and_grads(functools.partial(f, epilogue=Epilogue("relu", mask)), *arrays)
            for f in (convolution, reference_conv)
        )
        assert_all_close(actual, expected, 1e-12)


def test_large_kernel_gradients_are_convolutions_in_xlas_order():
    """XLA reorders others itself, but not in a loop (docs/performance.md#5x5-kernels)."""
    x, kernel, bias, g = map(jnp.asarray, random_arrays(2, 12, 11, 6, 4, 5))
    gradients = jax.jit(jax.grad(lambda *args: (convolution(*args) * g).sum(), (0, 1)))
    text = gradients.trace(x, kernel, bias).lower(lowering_platforms=("cpu",)).as_text()
    orders = re.findall(r"stablehlo\.convolution.*?dim_numbers = (.*?),? window", text)
    assert len(orders) == 2
    assert set(orders) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}


@pytest.mark.parametrize("kind", ["none", "relu_pool"])
def test_convolution_rejects_mask(kind):
    x, kernel, bias = map(jnp.asarray, random_arrays(1, 4, 4, 8, 2, 3)[:3])
    with pytest.raises(ValueError, match=f"epilogue {kind!r} has a mask: expected kind 'relu'"):
        convolution(x, kernel, bias, Epilogue(kind, jnp.ones((1, 4, 4, 1), bool)))


@pytest.mark.parametrize("size", [3, 5])
def test_conv_rows_as_channels_gradients(size):
    with jax.enable_x64(True):
        x, kernel, _, g = (jnp.asarray(a) for a in random_arrays(2, 6, 9, 3, 4, size))
        actual, expected = (
            value_and_grads(f, x, kernel, g) for f in (_conv_rows_as_channels, direct_conv)
        )
        assert_all_close(actual, expected, 1e-12)


@pytest.mark.parametrize(("size", "channels"), [(2, 8), (8, 8), (120, 8), (8, 3)])
def test_convolution_empty_batch(size, channels):
    arrays = jnp.zeros((0, size, size, channels)), jnp.zeros((3, 3, channels, 5)), jnp.zeros(5)
    y, *gradients = value_and_grads(convolution, *arrays, jnp.zeros((0, size, size, 5)))
    assert y.shape == (0, size, size, 5)
    assert [gradient.shape for gradient in gradients] == [array.shape for array in arrays]
    assert convolution(*arrays, Epilogue("relu_pool")).shape == (0, size // 2, size // 2, 5)


@pytest.mark.parametrize("channels", [8, 3])
def test_convolution_float16_under_x64(channels):
    with jax.enable_x64(True):
        x, kernel, bias, g = (
            jnp.ones(shape, jnp.float16)
            for shape in ((1, 4, 4, channels), (3, 3, channels, 2), (2,), (1, 4, 4, 2))
        )
        y, *gradients = value_and_grads(convolution, x, kernel, bias, g)
    assert y[0, 1, 1, 0] == 9 * channels + 1
    assert [gradient.dtype for gradient in gradients] == [jnp.float16] * 3


def test_convolution_by_hand():
    x, kernel, bias, _ = random_arrays(1, 4, 5, 2, 3, 3, seed=1)
    expected = np.tile(bias, (1, 4, 5, 1))
    for i in range(4):
        for j in range(5):
            for a in range(3):
                for b in range(3):
                    if 0 <= i + a - 1 < 4 and 0 <= j + b - 1 < 5:
                        expected[0, i, j] += x[0, i + a - 1, j + b - 1] @ kernel[a, b]
    actual = convolution(*map(jnp.float32, (x, kernel, bias)))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_bfloat16_uses_onednn():
    """On CPUs with bfloat16 instructions, forward and input gradient are oneDNN calls."""
    x, kernel = jnp.ones((1, 8, 8, 16), jnp.bfloat16), jnp.ones((3, 3, 16, 16), jnp.bfloat16)
    bias = jnp.zeros(16, jnp.bfloat16)
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    expected = jaxlib.version.__version_info__ >= (0, 12) and (
        "amx_bf16" in cpuinfo or "avx512_bf16" in cpuinfo
    )
    assert has_onednn_bfloat16() == expected

    def input_gradient(x, *others):
        return jax.grad(lambda x: convolution(x, *others).sum())(x)

    for function in (convolution, input_gradient):
        jitted = jax.jit(function, compiler_options=compiler_options(dtype=jnp.bfloat16))
        program = jitted.lower(x, kernel, bias).compile().as_text()
        assert program.count('custom_call_target="__onednn$convolution"') == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "channels", "kernel_size"), [(2, 512, 3), (8, 512, 3), (40, 3, 3), (8, 512, 1)]
)
def test_bfloat16_precision(size, channels, kernel_size):
    """Partial sums that are rounded to bfloat16 would be ten times less accurate."""
    arrays = random_arrays(4, size, size, channels, 64, kernel_size)
    arrays = [jnp.asarray(a, jnp.bfloat16) for a in arrays]
    arrays[2] *= 0  # the bias is added after rounding
    compute = jax.jit(
        functools.partial(value_and_grads, convolution),
        compiler_options=compiler_options(dtype=jnp.bfloat16),
    )
    actual = compute(*arrays)
    assert {a.dtype for a in actual} == {jnp.dtype(jnp.bfloat16)}
    with jax.enable_x64(True):
        exact = (jnp.asarray(np.asarray(a, np.float64)) for a in arrays)
        assert_all_close(actual, value_and_grads(reference_conv, *exact), 5e-3)


def test_add_bias_gradients():
    """First and second derivative, against sums over all positions."""
    rng = np.random.default_rng(0)
    x, bias, g = (np.float32(rng.normal(size=s)) for s in ((3, 5, 7, 4), (4,), (3, 5, 7, 4)))
    y, grad_x, grad_bias = value_and_grads(add_bias, x, bias, g)
    np.testing.assert_array_equal(y, x + bias[None, None, None])
    np.testing.assert_array_equal(grad_x, g)
    np.testing.assert_allclose(grad_bias, g.sum((0, 1, 2)), rtol=1e-5, atol=1e-5)

    def penalty(bias):
        return (jax.grad(lambda b: (add_bias(x, b) ** 3).sum())(bias) ** 2).sum()

    first = (3 * (x + bias) ** 2).sum((0, 1, 2))
    expected = 2 * first * (6 * (x + bias)).sum((0, 1, 2))
    np.testing.assert_allclose(jax.grad(penalty)(bias), expected, rtol=1e-4)


def window_conv_by_numpy(x, kernel, g):
    """Output and gradients of `window_conv`, window by window, in float64."""
    x, kernel, g = (np.asarray(array, np.float64) for array in (x, kernel, g))
    size = math.isqrt(len(kernel) // x.shape[-1])
    y, dx, dkernel = np.zeros_like(g), np.zeros_like(x), np.zeros_like(kernel)
    for i, j in np.ndindex(g.shape[1:3]):
        place = (slice(None), slice(i, i + size), slice(j, j + size))
        window = x[place].reshape(len(x), len(kernel))
        y[:, i, j] = window @ kernel
        dx[place] += (g[:, i, j] @ kernel.T).reshape(x[place].shape)
        dkernel += window.T @ g[:, i, j]
    return y, dx, dkernel


@pytest.mark.parametrize(
    ("n", "h", "w", "size"),
    [(2, 5, 4, 3), (2, 3, 6, 3), (2, 7, 9, 7), (2, 2, 2, 2), (0, 5, 4, 3), (1, 20, 20, 7)],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 4e-3)])
def test_window_conv(n, h, w, size, dtype, tolerance):
    """The tolerance of bfloat16 is a unit in the last place of the largest value."""
    rng = np.random.default_rng(0)
    shapes = (n, h, w, 4), (size * size * 4, 3), (n, h - size + 1, w - size + 1, 3)
    x, kernel, g = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
    y, pullback = jax.vjp(jax.jit(window_conv), x, kernel)
    assert_all_close((y, *pullback(g)), window_conv_by_numpy(x, kernel, g), tolerance)


def test_window_conv_with_symbolic_sizes():
    gradients = jax.jit(jax.grad(lambda x, kernel: (window_conv(x, kernel) ** 2).sum(), (0, 1)))
    sizes = jax.export.symbolic_shape("n, h, w, 4", constraints=["h >= 8", "w >= 8"])
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 9, 8, 4), (16, 3)))
    program = jax.export.export(gradients)(jax.ShapeDtypeStruct(sizes, jnp.float32), kernel)
    assert_all_close(program.call(x, kernel), gradients(x, kernel), 1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a path of a CPU")
def test_window_conv_has_products_as_gradients():
    """XLA's input gradient of this convolution takes a CPU several times as long."""
    x, kernel = jnp.ones((1, 8, 9, 4)), jnp.ones((7 * 7 * 4, 3))
    gradients = jax.jit(jax.grad(lambda x, kernel: window_conv(x, kernel).sum(), (0, 1)))
    text = gradients.lower(x, kernel).as_text()
    assert "stablehlo.convolution" not in text and text.count("stablehlo.dot_general") == 2
