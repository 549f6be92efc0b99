"""A network prepared for inference gives what it gives unprepared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import DEEP, images, init
from vgg_jax import VGG, compile_inference


@pytest.mark.parametrize("batch_norm", [False, True])
def test_prepared_nets_give_the_same(batch_norm):
    model = VGG(DEEP, 7, batch_norm, image_size=32, initializer="he")
    variables = init(model)
    x, larger = images(3, 32, 32), images(1, 38, 51)
    unprepared = jax.jit(model.apply, static_argnames=("method", "layers"))
    logits = unprepared(variables, x)
    expected = unprepared(variables, larger, method="score_map")
    maps = unprepared(variables, larger, method="features", layers=("relu2_1", "pool2"))
    prepared = compile_inference(model, variables)
    np.testing.assert_allclose(prepared(x), logits, rtol=1e-4, atol=1e-4 * np.abs(logits).max())
    scores = compile_inference(model, variables, "score_map")(larger)
    assert scores.shape == expected.shape == (1, 2, 5, 7)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    found = compile_inference(model, variables, "features", layers=("relu2_1", "pool2"))(larger)
    assert found.keys() == {"relu2_1", "pool2"}
    for name in found:
        np.testing.assert_allclose(found[name], maps[name], rtol=1e-4, atol=1e-4 * np.abs(maps[name]).max())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU's kernels are transformed")
def test_kernels_are_transformed_once(monkeypatch):
    """While it is prepared, and never when it is asked."""
    model = VGG(DEEP, 7, image_size=32)
    variables = init(model)
    prepared = compile_inference(model, variables)
    monkeypatch.setattr("vgg_jax.winograd.transform_filters", lambda *_: pytest.fail("transformed again"))
    assert prepared(images(5, 32, 32)).shape == (5, 7)  # a shape that no other test has compiled a convolution for
    (prepared_variables,) = prepared.args
    assert prepared_variables["filters"].keys() == {name for name in variables["params"] if name.startswith("conv")} - {"conv1_1"}


def test_a_bfloat16_net_answers_in_bfloat16():
    model = VGG(DEEP, 7, image_size=32, initializer="he", dtype=jnp.bfloat16)
    variables, x = init(model), images(2, 32, 32)
    exact = np.asarray(model.clone(dtype=jnp.float32).apply(variables, x))
    prepared = compile_inference(model, variables)(x)
    assert prepared.dtype == jnp.bfloat16
    np.testing.assert_allclose(prepared.astype(jnp.float32), exact, atol=0.05 * np.abs(exact).max())
