"""The method `features`: every layer of every net, under jit, vmap and grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close_to_largest
from tests.helpers.tiny import DEEP, TINY, images, init, narrow
from vgg_jax import CONFIGS, VGG, InputError
from vgg_jax.configs.models import layer_table


@pytest.fixture(scope="module")
def tiny_net():
    model = VGG(TINY, num_classes=7, image_size=32)
    return model, init(model)


def features_of(model, variables, x, *layers):
    return model.apply(variables, x, layers=layers, method="features")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "batch_norm"),
    [
        *(
            # A-LRN has the layers of A, and C those of B and D.
            pytest.param(
                name, False, id=name, marks=[pytest.mark.slow] * (name in ("A", "B", "D", "E"))
            )
            for name in CONFIGS
        ),
        pytest.param("A", True, id="A-batch_norm"),
        pytest.param("C", True, id="C-batch_norm", marks=pytest.mark.slow),
    ],
)
def test_features_of_every_layer(name, batch_norm):
    """All activations at once equal those of one layer at a time."""
    model = VGG(narrow(name), 5, batch_norm, image_size=32)
    variables = init(model)
    x = images(1, 32, 64)
    table = layer_table(model.config, 5, batch_norm, 32)
    layers = [layer.name for layer in table]
    types = {"conv", "relu", "pool", "fc", "drop"}
    types |= {"bn"} if batch_norm else set()
    types |= {"lrn"} if "LRN" in name else set()
    assert {layer.strip("0123456789_") for layer in layers} == types
    features = jax.jit(lambda v, x: features_of(model, v, x, *layers))(variables, x)
    assert features.keys() == set(layers)
    assert features["fc8"].shape == (1, 1, 2, 5)
    for conv in (layer for layer in layers if layer.startswith("conv")):
        linear = features[conv.replace("conv", "bn") if batch_norm else conv]
        relu = features[conv.replace("conv", "relu")]
        np.testing.assert_array_equal(relu, np.maximum(linear, 0))
    for layer in (layers[2], "pool3", "relu7"):
        single = features_of(model, variables, x, layer)
        np.testing.assert_allclose(single[layer], features[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_features_stop_at_deepest_layer(tiny_net):
    """XLA counts fewer operations for a shallower layer."""
    model, variables = tiny_net

    def flops(layer):
        function = jax.jit(lambda v, x: features_of(model, v, x, layer))
        return function.lower(variables, images(2, 32, 32)).compile().cost_analysis()["flops"]

    counts = [flops(layer) for layer in ("conv1_1", "pool2", "conv4_1", "fc8")]
    assert counts == sorted(counts)
    conv1_1 = 2 * (2 * 32 * 32 * 27 * 8)  # operations of conv1_1 for two images
    # XLA does not count products with the zeros of the padding.
    assert 0.95 * conv1_1 < counts[0] < 1.2 * conv1_1
    assert counts[1] < 0.5 * counts[3]


@pytest.mark.slow
def test_features_under_jit_vmap_and_grad(tiny_net):
    model, variables = tiny_net

    def feature(x):
        return features_of(model, variables, x[None], "relu3_1")["relu3_1"][0]

    def loss(x):
        return jnp.sum(feature(x) ** 2)

    x = images(3, 16, 20)
    batched = features_of(model, variables, x, "relu3_1")["relu3_1"]
    np.testing.assert_allclose(jax.jit(jax.vmap(feature))(x), batched, rtol=1e-4, atol=1e-5)

    gradient = jax.jit(jax.grad(loss))(x[0])
    step = 1e-3 * gradient / jnp.linalg.norm(gradient)
    slope = (loss(x[0] + step) - loss(x[0] - step)) / 2e-3
    assert slope == pytest.approx(float(jnp.linalg.norm(gradient)), rel=0.02)
    gradients = jax.jit(jax.vmap(jax.grad(loss)))(x)
    tolerance = 1e-3 * np.abs(gradient).max()
    np.testing.assert_allclose(gradients[0], gradient, rtol=1e-3, atol=tolerance)


def test_features_average_pooling(tiny_net):
    """Against a loop; the last row of an odd size is dropped, as by max-pooling."""
    model, variables = tiny_net
    average = model.clone(pool="avg")
    features = features_of(average, variables, images(1, 11, 14), "relu1_1", "pool1")
    assert features["pool1"].shape == (1, 5, 7, 8)
    for y in range(5):
        for x in range(7):
            window = features["relu1_1"][0, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            expected = window.mean((0, 1))
            np.testing.assert_allclose(features["pool1"][0, y, x], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="ceil is set and pool is 'avg'"):
        average.apply(variables, images(1, 32, 32), ceil=True, method="score_map")


@pytest.mark.parametrize("batch_norm", [False, True])
def test_capture_intermediates(batch_norm):
    """flax's own way to the activations: each module's output is that of its layer only."""
    model = VGG(DEEP, 5, batch_norm, image_size=16)
    variables, x = init(model), images(2, 16, 16)
    logits, state = model.apply(variables, x, capture_intermediates=True)
    np.testing.assert_array_equal(logits, state["intermediates"].pop("__call__")[0])
    assert_close_to_largest(logits, model.apply(variables, x))
    modules = ("conv", "bn", "fc", "drop")
    names = [
        layer.name
        for layer in layer_table(model.config, 5, batch_norm, 16)
        if layer.type in modules
    ]
    assert state["intermediates"].keys() == set(names)
    features = features_of(model, variables, x, *names)
    for name in names:
        (captured,) = state["intermediates"][name]["__call__"]
        assert_close_to_largest(captured, features[name])
        assert batch_norm or not name.startswith("conv") or (captured < 0).any()


def test_capture_intermediates_by_filter():
    model = VGG(DEEP, 7, image_size=16)
    variables, x = init(model), images(2, 16, 16)
    _, state = model.apply(
        variables,
        x,
        method="score_map",
        capture_intermediates=lambda module, method: module.name == "conv1_1",
        mutable=["intermediates"],
    )
    (captured,) = state["intermediates"]["conv1_1"]["__call__"]
    assert state["intermediates"].keys() == {"conv1_1"}
    expected = features_of(model, variables, x, "conv1_1")["conv1_1"]
    assert_close_to_largest(captured, expected)


def test_tabulate_shows_each_layer(tiny_net):
    """conv3_2 comes before a pooling, which halves its output."""
    model, _ = tiny_net
    console = {"width": 200, "force_terminal": False}
    text = model.tabulate(jax.random.key(0), images(1, 32, 32), console_kwargs=console)
    (row,) = [line for line in text.splitlines() if "conv3_2" in line]
    assert "float32[1,8,8,24]" in row.split("│")[4]
