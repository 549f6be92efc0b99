"""What `test_layers` does not show through `convolution`: the transforms themselves, second derivatives, batching."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.test_layers import direct
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
