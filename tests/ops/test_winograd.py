"""Winograd's transforms and blocks; second derivatives and batching of `convolution`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.convolution import assert_all_close, reference_conv, value_and_grads
from vgg_jax.ops import winograd
from vgg_jax.ops.convolution import convolution
from vgg_jax.ops.epilogue import EPILOGUE_KINDS, Epilogue
from vgg_jax.ops.winograd import _AT, _BT, _G


def test_winograd_matrices():
    """F(4, 3) in one dimension: Aᵀ[(G g) ⊙ (Bᵀ d)] is the correlation of d with g."""
    rng = np.random.default_rng(0)
    d, g = rng.integers(-9, 10, 6), rng.integers(-9, 10, 3)
    expected = np.correlate(d, g, "valid")
    np.testing.assert_allclose(_AT @ ((_G @ g) * (_BT @ d)), expected, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", EPILOGUE_KINDS)
@pytest.mark.parametrize(("channels", "size"), [(8, 3), (3, 3), (8, 1)])
def test_convolution_second_derivative_and_vmap(channels, size, kind):
    """By Winograd, by few channels and by a matrix product."""
    rng = np.random.default_rng(2)
    shapes = (2, 6, 6, channels), (size, size, channels, 4), (4,)
    x, kernel, bias = (jnp.float32(rng.normal(size=shape)) for shape in shapes)
    conv, reference = (
        functools.partial(f, bias=bias, epilogue=Epilogue(kind))
        for f in (convolution, reference_conv)
    )

    def penalty(f):
        return lambda x: (jax.grad(lambda x: (f(x, kernel) ** 3).sum())(x) ** 2).sum()

    actual, expected = (jax.jit(jax.grad(penalty(f)))(x) for f in (conv, reference))
    assert jnp.abs(actual - expected).max() < 1e-4 * jnp.abs(expected).max()
    batched = jax.jit(jax.vmap(lambda kernel: conv(x, kernel)))(jnp.stack([kernel, 2 * kernel]))
    np.testing.assert_allclose(batched[1], reference(x, 2 * kernel), atol=1e-4)


@pytest.mark.parametrize(
    ("tiles", "height", "num_blocks", "kind", "masked"),
    [
        (5, 18, 3 * 5, "none", False),
        (5, 18, 3 * 5, "relu", True),
        (10, 18, 3 * 3, "relu_pool", False),
        (10, 16, 3 * 2, "relu", True),
        (10, 16, 3 * 2, "relu_pool", False),
        (50, 18, 2, "relu", True),
        (50, 16, 2, "relu_pool", False),
    ],
)
def test_winograd_blocks(tiles, height, num_blocks, kind, masked, monkeypatch):
    """Strips of one or two rows of tiles, and two of three images at a time."""
    monkeypatch.setattr(winograd, "_TILES", tiles)
    monkeypatch.setattr(winograd, "_GRADIENT_VALUES", 1)
    jax.clear_caches()  # traces of other tests used other block sizes
    rng = np.random.default_rng(3)
    blocks = winograd._blocks((3, height, 17, 8), tiles)
    assert blocks.groups * blocks.strips == num_blocks
    mask = jnp.asarray(rng.random((3, height, 17, 1)) < 0.7) if masked else None
    out = (3, height // 2, 8, 4) if kind == "relu_pool" else (3, height, 17, 4)
    with jax.enable_x64(True):
        shapes = (3, height, 17, 8), (3, 3, 8, 4), (4,), out
        arrays = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        actual, expected = (
            value_and_grads(functools.partial(f, epilogue=Epilogue(kind, mask)), *arrays)
            for f in (convolution, reference_conv)
        )
        assert_all_close(actual, expected, 1e-12)
