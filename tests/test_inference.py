"""A network prepared for inference gives what it gives unprepared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import TINY, images, init
from vgg_jax import VGG, compile_inference


@pytest.mark.parametrize("batch_norm", [False, True])
def test_prepared_nets_give_the_same(batch_norm):
    model = VGG(TINY, 7, batch_norm, image_size=64, initializer="he")
    variables = init(model)
    x, larger = images(3, 64, 64), images(1, 70, 99)
    unprepared = jax.jit(model.apply, static_argnames=("method", "layers"))
    logits = unprepared(variables, x)
    expected = unprepared(variables, larger, method="score_map")
    maps = unprepared(variables, larger, method="features", layers=("relu3_1", "pool5"))
    prepared = compile_inference(model, variables)
    np.testing.assert_allclose(prepared(x), logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())
    scores = compile_inference(model, variables, "score_map")(larger)
    assert scores.shape == expected.shape == (1, 1, 2, 7)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    found = compile_inference(model, variables, "features", layers=("relu3_1", "pool5"))(larger)
    assert found.keys() == {"relu3_1", "pool5"}
    for name in found:
        np.testing.assert_allclose(found[name], maps[name], rtol=1e-4, atol=1e-4 * np.abs(maps[name]).max())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU's kernels are transformed")
def test_kernels_are_transformed_once(monkeypatch):
    """While it is prepared, and never when it is asked."""
    model = VGG(TINY, 7, image_size=64)
    variables = init(model)
    prepared = compile_inference(model, variables)
    monkeypatch.setattr("vgg_jax.winograd.transform_filters", lambda kernel: pytest.fail("transformed again"))
    assert prepared(images(2, 64, 64)).shape == (2, 7)


def test_a_bfloat16_net_answers_in_bfloat16():
    model = VGG(TINY, 7, image_size=64, initializer="he", dtype=jnp.bfloat16)
    variables, x = init(model), images(2, 64, 64)
    exact = np.asarray(model.clone(dtype=jnp.float32).apply(variables, x))
    prepared = compile_inference(model, variables)(x)
    assert prepared.dtype == jnp.bfloat16
    np.testing.assert_allclose(prepared.astype(jnp.float32), exact, atol=0.05 * np.abs(exact).max())
