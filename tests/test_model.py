"""One parameter set, three readings; initialisation; copying from A."""

import dataclasses

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vgg_jax
from tests.helpers.tiny import TINY, images, init
from vgg_jax import CONFIGS, VGG, InputError, compiler_options, copy_matching_layers
from vgg_jax.model import transpose_kernels


@pytest.fixture(scope="module")
def net():
    """A small net for images of 64 pixels, and variables with a signal in every layer."""
    model = VGG(TINY, num_classes=7, image_size=64)
    return model, init(model)


def test_parameters_have_the_released_names(net):
    _, variables = net
    assert variables.keys() == {"params"}
    names = [
        "conv1_1",
        "conv2_1",
        "conv3_1",
        "conv3_2",
        "conv4_1",
        "conv4_2",
        "conv5_1",
        "conv5_2",
        "fc6",
        "fc7",
        "fc8",
    ]
    assert sorted(variables["params"]) == names
    assert all(layer.keys() == {"kernel", "bias"} for layer in variables["params"].values())


def test_score_map_at_the_nets_own_size_is_the_logits(net):
    model, variables = net
    x = images(2, 64, 64)
    scores = model.apply(variables, x, method="score_map")
    assert scores.shape == (2, 1, 1, 7)
    np.testing.assert_allclose(scores[:, 0, 0], model.apply(variables, x), rtol=1e-4, atol=1e-4)


def test_score_map_is_the_three_matrices_on_every_window(net):
    model, variables = net
    x = images(2, 100, 165)
    pool5 = model.apply(variables, x, method="features", layers=("pool5",))["pool5"]
    scores = model.apply(variables, x, method="score_map")
    assert pool5.shape[1:3] == (3, 5)
    assert scores.shape == (2, 2, 4, 7)
    for i in range(2):
        for j in range(4):
            y = np.asarray(pool5[:, i : i + 2, j : j + 2]).reshape(2, -1)
            for name in ("fc6", "fc7", "fc8"):
                y = y @ np.asarray(variables["params"][name]["kernel"])
                y = y if name == "fc8" else np.maximum(y, 0)
            np.testing.assert_allclose(scores[:, i, j], y, rtol=1e-4, atol=1e-4)


def test_a_transposed_net_answers_transposed_images(net):
    model, variables = net
    x = images(2, 100, 165)
    turned = model.apply(
        transpose_kernels(variables), x.swapaxes(1, 2), ("pool5",), method="features"
    )["pool5"]
    expected = model.apply(variables, x, ("pool5",), method="features")["pool5"]
    assert turned.shape == (2, 5, 3, 40)
    np.testing.assert_allclose(
        turned.swapaxes(1, 2), expected, rtol=1e-4, atol=1e-4 * expected.max()
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [((256, 256), 2), ((384, 384), 6), ((512, 512), 10), ((256, 341), (2, 4)), ((224, 224), 1)],
)
def test_map_sizes_of_the_specification(size, expected):
    model = VGG(CONFIGS["D"])
    x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    variables = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    )
    scores = jax.eval_shape(lambda v, x: model.apply(v, x, method="score_map"), variables, x)
    assert (
        scores.shape[1:3]
        == model.score_map_size(*size)
        == (expected if isinstance(expected, tuple) else (expected, expected))
    )


def test_features_are_what_the_names_say(net):
    model, variables = net
    x = images(1, 70, 66)
    found = model.apply(
        variables, x, method="features", layers=("conv3_1", "relu3_1", "pool3", "fc7", "relu7")
    )
    assert found.keys() == {"conv3_1", "relu3_1", "pool3", "fc7", "relu7"}
    np.testing.assert_array_equal(found["relu3_1"], np.maximum(found["conv3_1"], 0))
    assert (found["conv3_1"] < 0).any()
    np.testing.assert_array_equal(found["relu7"], np.maximum(found["fc7"], 0))
    assert found["pool3"].shape == (1, 8, 8, 24)
    assert found["fc7"].shape == (1, 1, 1, 16)


def test_features_stop_at_the_deepest_layer(net):
    model, variables = net
    shallow = {
        "params": {name: variables["params"][name] for name in ("conv1_1", "conv2_1")}
    }  # the parameters behind are not even there
    found = model.apply(shallow, images(1, 20, 20), method="features", layers=("relu2_1", "pool1"))
    assert found.keys() == {"relu2_1", "pool1"}


def test_errors_name_the_layers_and_the_smallest_size(net):
    model, variables = net
    with pytest.raises(InputError, match=r"'relu9_9'.*conv1_1.*pool5.*fc8"):
        model.apply(variables, images(1, 64, 64), method="features", layers=("relu9_9",))
    with pytest.raises(InputError, match=r"63x80.*at least 64x64"):
        model.apply(variables, images(1, 63, 80), method="score_map")
    with pytest.raises(InputError, match=r"3x80.*pool2 needs at least 4x4"):
        model.apply(variables, images(1, 3, 80), method="features", layers=("pool2",))
    with pytest.raises(InputError, match=r"96x96.*64x64.*score_map"):
        model.apply(variables, images(1, 96, 96))
    with pytest.raises(InputError, match=r"'xavier'.*paper, glorot, he"):
        init(VGG(TINY, image_size=32, initializer="xavier"))
    with pytest.raises(InputError, match=r"\(64, 64, 3\)"):
        model.apply(variables, images(64, 64), method="score_map")


def test_dropout_needs_a_rng_in_training_only(net):
    model, variables = net
    x = images(4, 64, 64)
    np.testing.assert_array_equal(model.apply(variables, x), model.apply(variables, x))
    with pytest.raises(flax.errors.InvalidRngError):
        model.apply(variables, x, train=True)
    a, b = (
        model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1)
    )
    assert (a != b).any()


def test_batch_norm_lies_beside_its_convolution():
    model = VGG(TINY, num_classes=7, batch_norm=True, image_size=32)
    variables = init(model)
    assert variables["params"]["bn3_2"].keys() == {"scale", "bias"}
    assert variables["batch_stats"]["bn3_2"].keys() == {"mean", "var"}
    x = images(4, 32, 32)
    logits, updated = model.apply(
        variables, x, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"]
    )
    assert logits.shape == (4, 7)
    assert (updated["batch_stats"]["bn1_1"]["mean"] != 0).all()
    assert model.apply(variables, x).shape == (4, 7)


@pytest.mark.parametrize(
    ("initializer", "std", "conv", "fc"),
    [
        ("paper", 0.01, 0.01, 0.01),
        ("paper", 0.05, 0.05, 0.05),
        ("glorot", 0.01, (2 / (9 * 64 + 9 * 128)) ** 0.5, (2 / (2048 + 512)) ** 0.5),
        ("he", 0.01, (2 / (9 * 128)) ** 0.5, 0.01),
    ],
)
def test_initial_deviations(initializer, std, conv, fc):
    config = dataclasses.replace(CONFIGS["A"], fc=(512, 512))
    model = VGG(config, 10, image_size=64, initializer=initializer, initializer_std=std)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    draw = jax.jit(lambda key: model.lazy_init(key, image), compiler_options=compiler_options())
    params = draw(jax.random.key(0))["params"]
    assert not any(layer["bias"].any() for layer in params.values())
    assert float(params["conv2_1"]["kernel"].std()) == pytest.approx(conv, rel=0.02)
    assert float(params["fc6"]["kernel"].std()) == pytest.approx(fc, rel=0.02)
    assert abs(float(params["conv2_1"]["kernel"].mean())) < 0.02 * conv
    if initializer == "glorot":  # uniform
        assert float(jnp.abs(params["conv2_1"]["kernel"]).max()) <= conv * 3**0.5


def test_bfloat16_keeps_float32_parameters():
    model = VGG(TINY, num_classes=7, image_size=32, dtype=jnp.bfloat16)
    variables = init(model)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert model.apply(variables, images(1, 32, 32)).dtype == jnp.bfloat16


@pytest.mark.parametrize("net", ["B", "C", "D", "E"])
def test_a_fits_the_deeper_nets_by_name_in_exactly_seven_layers(net):
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    source, params = (
        jax.eval_shape(VGG(CONFIGS[name]).init, jax.random.key(0), x)["params"]
        for name in ("A", net)
    )
    merged, copied = copy_matching_layers(source, params)
    assert set(copied) == {"conv1_1", "conv2_1", "conv3_1", "conv3_2", "fc6", "fc7", "fc8"}
    assert all(
        merged[name] is (source[name] if name in copied else params[name]) for name in params
    )
    assert merged.keys() == params.keys()


def test_a_head_of_another_size_is_not_copied():
    source, params = ({"fc8": {"kernel": np.zeros((4, k)), "bias": np.zeros(k)}} for k in (10, 5))
    merged, copied = copy_matching_layers(source, params)
    assert copied == ()
    assert merged == params


def test_names_that_people_know():
    names = {
        "vgg11": "A",
        "vgg11_lrn": "A-LRN",
        "vgg13": "B",
        "vgg16_c": "C",
        "vgg16": "D",
        "vgg19": "E",
    }
    for name, net in names.items():
        assert getattr(vgg_jax, name)(num_classes=10) == VGG(CONFIGS[net], num_classes=10)
