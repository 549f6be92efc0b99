"""A network prepared for inference gives what it gives unprepared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import DEEP, images, init
from vgg_jax import VGG, Conv, VGGConfig, compile_inference, compiler_options


@pytest.mark.parametrize("batch_norm", [False, True])
def test_prepared_nets_give_the_same(batch_norm):
    model = VGG(DEEP, 7, batch_norm, image_size=32)
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
        np.testing.assert_allclose(
            found[name], maps[name], rtol=1e-4, atol=1e-4 * np.abs(maps[name]).max()
        )


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU's kernels are transformed")
def test_kernels_are_transformed_once(monkeypatch):
    """While it is prepared, and never when it is asked."""
    model = VGG(DEEP, 7, image_size=32)
    variables = init(model)
    prepared = compile_inference(model, variables)
    monkeypatch.setattr(
        "vgg_jax.ops.winograd.transform_filters", lambda *_: pytest.fail("transformed again")
    )
    assert prepared(images(5, 32, 32)).shape == (
        5,
        7,
    )  # a shape that no other test has compiled a convolution for
    (prepared_variables,) = prepared.args
    assert prepared_variables["packed"].keys() == variables["params"].keys() - {"conv1_1"}


@pytest.mark.parametrize(
    "options",
    [{}, compiler_options(), compiler_options(dtype=jnp.bfloat16)],
    ids=["jax's options", "float32's", "bfloat16's"],
)
def test_a_bfloat16_net_is_right_as_one_program(options):
    """A batch and widths of which jax 0.12.0.1 made NaN on a CPU, the last pooling and all products behind it being one library call."""
    net = VGGConfig(((Conv(8),), (Conv(64), Conv(64))), fc=(64, 64))
    model = VGG(net, 5, image_size=4, dtype=jnp.bfloat16)
    variables, x = init(model), images(128, 4, 4)
    exact = np.asarray(model.clone(dtype=jnp.float32).apply(variables, x))
    logits = jax.jit(model.apply, compiler_options=options)(variables, x)
    np.testing.assert_allclose(logits.astype(jnp.float32), exact, atol=0.03 * np.abs(exact).max())


def test_a_bfloat16_net_answers_in_bfloat16():
    model = VGG(DEEP, 7, image_size=32, dtype=jnp.bfloat16)
    variables, x = init(model), images(2, 32, 32)
    exact = np.asarray(model.clone(dtype=jnp.float32).apply(variables, x))
    prepared = compile_inference(model, variables)(x)
    assert prepared.dtype == jnp.bfloat16
    np.testing.assert_allclose(prepared.astype(jnp.float32), exact, atol=0.05 * np.abs(exact).max())
