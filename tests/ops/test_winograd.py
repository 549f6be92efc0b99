"""What `test_convolution` does not show through `convolution`: the transforms themselves, second derivatives, batching."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.test_convolution import in_steps
from vgg_jax.ops import winograd
from vgg_jax.ops.convolution import convolution
from vgg_jax.ops.epilogue import THEN
from vgg_jax.ops.winograd import _AT, _BT, _G


def test_the_matrices_multiply_polynomials():
    """F(4, 3) in one dimension, exact in whole numbers of 1/24: Aᵀ[(G g) ⊙ (Bᵀ d)] is the correlation of d with g."""
    rng = np.random.default_rng(0)
    d, g = rng.integers(-9, 10, 6), rng.integers(-9, 10, 3)
    np.testing.assert_allclose(
        _AT @ ((_G @ g) * (_BT @ d)), np.correlate(d, g, "valid"), atol=1e-12
    )


@pytest.mark.parametrize("then", THEN)
@pytest.mark.parametrize(("channels", "side"), [(8, 3), (3, 3), (8, 1)])
def test_second_derivatives_and_a_batching_rule(channels, side, then):
    """Of Winograd's convolution, of that of few channels, and of a product."""
    rng = np.random.default_rng(2)
    x, kernel, bias = (
        jnp.float32(rng.normal(size=shape))
        for shape in ((2, 6, 6, channels), (side, side, channels, 4), (4,))
    )

    def penalty(f):
        return lambda x: (
            jax.grad(lambda x: (f(x, kernel, bias, then=then) ** 3).sum())(x) ** 2
        ).sum()

    ours, theirs = jax.grad(penalty(convolution))(x), jax.grad(penalty(in_steps))(x)
    assert jnp.abs(ours - theirs).max() < 1e-4 * jnp.abs(theirs).max()
    twice = jax.vmap(lambda kernel: convolution(x, kernel, bias, then=then))(
        jnp.stack([kernel, 2 * kernel])
    )
    np.testing.assert_allclose(twice[1], in_steps(x, 2 * kernel, bias, then=then), atol=1e-4)


@pytest.mark.parametrize(
    ("tiles", "height", "blocks", "then", "holes"),
    [
        (5, 18, 3 * 5, "", False),
        (5, 18, 3 * 5, "relu", True),
        (10, 18, 3 * 3, "pool", False),
        (10, 16, 3 * 2, "relu", True),
        (10, 16, 3 * 2, "pool", False),
        (50, 18, 2, "relu", True),
        (50, 16, 2, "pool", False),
    ],
)
def test_strips_of_a_large_map_and_groups_of_images_meet_without_a_seam(
    tiles, height, blocks, then, holes, monkeypatch
):
    """Strips of one and of two rows of tiles, and two images at a time, of three that end with a tile or within one."""
    monkeypatch.setattr(winograd, "_TILES", tiles)
    monkeypatch.setattr(winograd, "_GRADIENT_VALUES", 1)
    jax.clear_caches()  # what was traced knows the other size
    rng = np.random.default_rng(3)
    shapes = (3, height, 17, 8), (3, 3, 8, 4), (4,)
    cut = winograd._blocks(shapes[0], tiles)
    assert cut.groups * cut.strips == blocks
    there = jnp.asarray(rng.random((3, height, 17, 1)) < 0.7) if holes else None
    with jax.enable_x64(True):
        arrays = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        ours, theirs = (
            jax.vjp(functools.partial(f, there=there, then=then), *arrays)
            for f in (convolution, in_steps)
        )
        g = jnp.asarray(rng.normal(size=theirs[0].shape))
        for mine, his in zip((ours[0], *ours[1](g)), (theirs[0], *theirs[1](g)), strict=True):
            assert jnp.abs(mine - his).max() < 1e-12 * jnp.abs(his).max()
