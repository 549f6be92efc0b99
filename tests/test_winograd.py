"""What `test_layers` does not show through `convolution`: the transforms themselves, second derivatives, batching."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_layers import direct
from vgg_jax import winograd
from vgg_jax.winograd import _AT, _BT, _G, convolution_3x3


def test_the_matrices_multiply_polynomials():
    """F(4, 3) in one dimension, exact in whole numbers of 1/24: Aᵀ[(G g) ⊙ (Bᵀ d)] is the correlation of d with g."""
    rng = np.random.default_rng(0)
    d, g = rng.integers(-9, 10, 6), rng.integers(-9, 10, 3)
    np.testing.assert_allclose(_AT @ ((_G @ g) * (_BT @ d)), np.correlate(d, g, "valid"), atol=1e-12)


def test_winograd_has_second_derivatives_and_a_batching_rule():
    rng = np.random.default_rng(2)
    x, kernel = jnp.float32(rng.normal(size=(2, 6, 6, 4))), jnp.float32(rng.normal(size=(3, 3, 4, 4)))

    def penalty(f):
        return lambda x: (jax.grad(lambda x: (f(x, kernel) ** 3).sum())(x) ** 2).sum()

    ours, theirs = jax.grad(penalty(convolution_3x3))(x), jax.grad(penalty(direct))(x)
    assert jnp.abs(ours - theirs).max() < 1e-4 * jnp.abs(theirs).max()
    kernels = jnp.stack([kernel, 2 * kernel])
    twice = jax.vmap(convolution_3x3, in_axes=(None, 0))(x, kernels)
    np.testing.assert_allclose(twice[1], direct(x, 2 * kernel), atol=1e-4)


@pytest.mark.parametrize(("values", "blocks"), [(16 * 4 * 5, 3 * 5), (16 * 4 * 5 * 2, 3 * 3), (16 * 4 * 5 * 10, 2)])
def test_strips_of_a_large_map_and_groups_of_images_meet_without_a_seam(values, blocks, monkeypatch):
    """Strips of one and of two rows of tiles, and two images at a time, of three that end within a tile."""
    monkeypatch.setattr(winograd, "_VALUES", values)
    monkeypatch.setattr(winograd, "_TILES", 1)
    rng = np.random.default_rng(3)
    x, kernel, g = (jnp.float32(rng.normal(size=shape)) for shape in ((3, 18, 17, 4), (3, 3, 4, 4), (3, 18, 17, 4)))
    cut = winograd._blocks(x.shape)
    assert cut.groups * cut.strips == blocks
    ours, theirs = (jax.vjp(f, x, kernel) for f in (convolution_3x3, direct))
    for mine, his in zip((ours[0], *ours[1](g)), (theirs[0], *theirs[1](g)), strict=True):
        assert jnp.abs(mine - his).max() < 2e-5 * jnp.abs(his).max()
