"""`features` in other people's programs: every layer of every net, jit, vmap, grad, NNX, and no work behind the deepest layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.helpers.tiny import TINY, images, init
from vgg_jax import CONFIGS, VGG, InputError
from vgg_jax.configs.models import layer_table


def narrow(name):
    """A net with channels few enough to run in the tests."""
    config = CONFIGS[name]
    stages = tuple(
        tuple(conv._replace(features=4 * i) for conv in stage)
        for i, stage in enumerate(config.stages, 1)
    )
    return dataclasses.replace(config, stages=stages, fc=(12, 8))


@pytest.fixture(scope="module")
def net():
    model = VGG(TINY, num_classes=7, image_size=32)
    return model, init(model)


@pytest.mark.parametrize(
    ("name", "batch_norm"),
    [
        *(
            pytest.param(
                name, False, id=name, marks=[pytest.mark.slow] if name in ("B", "E") else []
            )
            for name in CONFIGS
        ),
        pytest.param("A", True, id="A-batch_norm"),
        pytest.param("C", True, id="C-batch_norm", marks=pytest.mark.slow),
    ],
)
def test_every_layer_of_every_net(name, batch_norm):
    """One by one what all at once gives: each named activation is that of the net cut off behind it."""
    model = VGG(narrow(name), 5, batch_norm, image_size=32)
    variables = init(model)
    x = images(1, 32, 64)
    layers = [layer.name for layer in layer_table(model.config, 5, batch_norm, 32)]
    kinds = {layer.strip("0123456789_") for layer in layers}
    assert {"conv", "relu", "pool", "fc", "drop"} | ({"bn"} if batch_norm else set()) | (
        {"lrn"} if "LRN" in name else set()
    ) == kinds
    every = jax.jit(lambda v, x: model.apply(v, x, layers=layers, method="features"))(variables, x)
    assert every.keys() == set(layers)
    assert every["fc8"].shape == (1, 1, 2, 5)
    for conv in (layer for layer in layers if layer.startswith("conv")):
        behind = every[conv.replace("conv", "bn")] if batch_norm else every[conv]
        np.testing.assert_array_equal(every[conv.replace("conv", "relu")], np.maximum(behind, 0))
    for layer in (layers[2], "pool3", "relu7"):
        alone = model.apply(variables, x, layers=(layer,), method="features")
        np.testing.assert_allclose(alone[layer], every[layer], rtol=1e-4, atol=1e-5)


def test_nothing_behind_the_deepest_layer_is_computed(net):
    """By XLA's own count of operations, beside the spec's: A up to pool2 and whole."""
    model, variables = net

    def flops(layer):
        function = jax.jit(lambda v, x: model.apply(v, x, layers=(layer,), method="features"))
        return function.lower(variables, images(2, 32, 32)).compile().cost_analysis()["flops"]

    counts = [flops(layer) for layer in ("conv1_1", "pool2", "conv4_1", "fc8")]
    assert counts == sorted(counts)
    multiply_adds = 2 * 32 * 32 * 27 * 8  # conv1_1 of two images
    assert (
        0.95 * 2 * multiply_adds < counts[0] < 1.2 * 2 * multiply_adds
    )  # XLA leaves out those with the padding's zeros
    assert counts[1] < 0.5 * counts[3]


def test_under_jit_vmap_and_grad(net):
    model, variables = net

    def feature(x):
        return model.apply(variables, x[None], layers=("relu3_1",), method="features")["relu3_1"][0]

    x = images(3, 16, 20)
    together = model.apply(variables, x, layers=("relu3_1",), method="features")["relu3_1"]
    np.testing.assert_allclose(jax.jit(jax.vmap(feature))(x), together, rtol=1e-4, atol=1e-5)

    loss = lambda x: jnp.sum(feature(x) ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(x[0])
    step = 1e-3 * gradient / jnp.linalg.norm(gradient)
    slope = (loss(x[0] + step) - loss(x[0] - step)) / 2e-3
    assert slope == pytest.approx(float(jnp.linalg.norm(gradient)), rel=0.02)
    each = jax.jit(jax.vmap(jax.grad(loss)))(x)
    np.testing.assert_allclose(each[0], gradient, rtol=1e-3, atol=1e-3 * np.abs(gradient).max())


@pytest.mark.slow
def test_as_an_nnx_module(net):
    """Its logits, features and gradients, and a step of an nnx optimizer."""
    model, variables = net
    x = images(2, 32, 32)
    bridged = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(x)
    for name, layer in variables["params"].items():
        setattr(bridged, name, {leaf: nnx.Param(array) for leaf, array in layer.items()})
    np.testing.assert_allclose(bridged(x), model.apply(variables, x), rtol=1e-4, atol=1e-5)
    ours = model.apply(variables, x, layers=("pool2",), method="features")["pool2"]
    np.testing.assert_allclose(
        bridged(x, layers=("pool2",), method="features")["pool2"], ours, rtol=1e-4, atol=1e-5
    )

    optimizer = nnx.Optimizer(bridged, optax.sgd(0.1), wrt=nnx.Param)
    loss = lambda module: jnp.mean(module(x) ** 2)  # noqa: E731
    before, gradients = nnx.value_and_grad(loss)(bridged)
    optimizer.update(bridged, gradients)
    assert loss(bridged) < before


def test_average_pooling(net):
    """Against a loop; an odd side loses its last row as with the maximum."""
    model, variables = net
    average = model.clone(pool="avg")
    found = average.apply(
        variables, images(1, 11, 14), layers=("relu1_1", "pool1"), method="features"
    )
    assert found["pool1"].shape == (1, 5, 7, 8)
    for y in range(5):
        for x in range(7):
            window = found["relu1_1"][0, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            np.testing.assert_allclose(
                found["pool1"][0, y, x], window.mean((0, 1)), rtol=1e-5, atol=1e-6
            )
    with pytest.raises(InputError, match="pool is 'min': expected one of max, avg"):
        model.clone(pool="min").apply(variables, images(1, 32, 32))
    with pytest.raises(InputError, match="ceil is set and pool is 'avg'"):
        average.apply(variables, images(1, 32, 32), ceil=True, method="score_map")
