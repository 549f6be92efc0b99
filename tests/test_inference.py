"""`compile_inference` gives what `model.apply` gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close_to_largest
from tests.helpers.tiny import DEEP, images, init
from vgg_jax import VGG, Conv, VGGConfig, compile_inference, compiler_options
from vgg_jax.inference import quick_model
from vgg_jax.runtime.compiler import has_onednn_bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", [False, True])
def test_compile_inference_equals_apply(batch_norm):
    model = VGG(DEEP, 7, batch_norm, image_size=32)
    variables = init(model)
    x, larger = images(3, 32, 32), images(1, 38, 51)
    layers = ("relu2_1", "pool2")
    apply = jax.jit(model.apply, static_argnames=("method", "layers"))
    expected_logits = apply(variables, x)
    expected_scores = apply(variables, larger, method="score_map")
    expected_features = apply(variables, larger, method="features", layers=layers)
    assert_close_to_largest(compile_inference(model, variables)(x), expected_logits, 1e-4)
    scores = compile_inference(model, variables, "score_map")(larger)
    assert scores.shape == (1, 2, 5, 7)
    assert_close_to_largest(scores, expected_scores, 1e-4)
    features = compile_inference(model, variables, "features", layers=layers)(larger)
    assert features.keys() == set(layers)
    for name in layers:
        assert_close_to_largest(features[name], expected_features[name], 1e-4)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU has quick programs")
@pytest.mark.parametrize(
    ("dtype", "is_quick"),
    [(jnp.float32, True), (jnp.float64, True), (jnp.bfloat16, False), (jnp.float16, False)],
)
def test_quick_model(dtype, is_quick):
    """XLA's own convolutions are slow in 16 bits."""
    assert quick_model(VGG(DEEP, dtype=dtype)).quick_compile is is_quick


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU packs kernels")
@pytest.mark.parametrize("quick_compile", [False, True])
def test_compile_inference_packs_kernels_once(quick_compile, monkeypatch):
    """The call itself transforms no kernel. `quick_compile` is for nets that are applied once."""
    model = VGG(DEEP, 7, image_size=32, quick_compile=quick_compile)
    variables = init(model)
    compiled = compile_inference(model, variables)
    monkeypatch.setattr(
        "vgg_jax.ops.winograd.transform_filters", lambda *_: pytest.fail("transformed again")
    )
    x = images(5 + quick_compile, 32, 32)  # no other test has traced convolutions of this shape
    assert compiled(x).shape == (len(x), 7)
    assert compiled.func.lower(*compiled.args, x).as_text().count("stablehlo.convolution") == 1
    (packed_variables,) = compiled.args
    assert packed_variables["packed"].keys() == variables["params"].keys() - {"conv1_1"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, compiler_options(), compiler_options(dtype=jnp.bfloat16)],
    ids=["default", "float32", "bfloat16"],
)
def test_bfloat16_has_no_nan_in_one_program(options):
    """jax 0.12.0.1 gave NaN on a CPU for these sizes: one call of the last pooling and products."""
    config = VGGConfig(((Conv(8),), (Conv(64), Conv(64))), fc=(64, 64))
    model = VGG(config, 5, image_size=4, dtype=jnp.bfloat16)
    variables, x = init(model), images(128, 4, 4)
    exact = np.asarray(model.clone(dtype=jnp.float32).apply(variables, x))
    logits = jax.jit(model.apply, compiler_options=options)(variables, x)
    np.testing.assert_allclose(logits.astype(jnp.float32), exact, atol=0.03 * np.abs(exact).max())


def test_compile_inference_bfloat16():
    model = VGG(DEEP, 7, image_size=32, dtype=jnp.bfloat16)
    variables, x = init(model), images(2, 32, 32)
    exact = np.asarray(model.clone(dtype=jnp.float32).apply(variables, x))
    logits = compile_inference(model, variables)(x)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), exact, atol=0.05 * np.abs(exact).max())


@pytest.mark.skipif(not has_onednn_bfloat16(), reason="needs oneDNN's bfloat16 convolution")
def test_compile_inference_lays_out_onednn_kernels_once():
    """XLA lays out all kernels when it compiles, and oneDNN adds the biases itself."""
    model = VGG(DEEP, 7, image_size=32, dtype=jnp.bfloat16)
    variables = init(model)
    for layer in variables["params"].values():
        layer["bias"] += jnp.arange(layer["bias"].size)  # XLA simplifies equal biases
    compiled = compile_inference(model, variables)
    text = compiled.func.lower(*compiled.args, images(2, 32, 32)).compile().as_text()
    assert text.count('custom_call_target="__onednn$convolution"') == 4
    assert text.count('"weights_prepacked":true') == 4
    assert text.count('"ops":["BIAS"') == 4
    assert compiled.args[0]["params"].keys() == {"fc6", "fc7", "fc8"}
