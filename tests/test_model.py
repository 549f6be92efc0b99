"""The module VGG: parameters, logits, score maps, features, initialisation, copying of layers."""

import logging

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vgg_jax
from tests.helpers.compare import assert_close_to_largest
from tests.helpers.tiny import DEEP, SHALLOW, TINY, images, init, narrow
from vgg_jax import (
    CONFIGS,
    PAPER_INIT_LAYERS,
    VGG,
    Conv,
    InputError,
    VGGConfig,
    compile_inference,
    compiler_options,
    copy_matching_layers,
    with_in_channels,
    with_new_head,
)
from vgg_jax.configs.models import layer_table
from vgg_jax.model import fuse_epilogues, select_layers, transpose_kernels
from vgg_jax.nnx import to_nnx
from vgg_jax.perceptual import lpips

PAPER_LAYERS = ("conv1_1", "conv2_1", "conv3_1", "conv3_2", "fc6", "fc7", "fc8")


@pytest.fixture(scope="module")
def tiny_net():
    """A tiny net for images of 64 pixels, and variables with a signal in every layer."""
    model = VGG(TINY, num_classes=7, image_size=64)
    return model, init(model)


def test_parameter_names(tiny_net):
    _, variables = tiny_net
    assert variables.keys() == {"params"}
    names = "conv1_1 conv2_1 conv3_1 conv3_2 conv4_1 conv4_2 conv5_1 conv5_2 fc6 fc7 fc8"
    assert " ".join(sorted(variables["params"])) == names
    assert all(layer.keys() == {"kernel", "bias"} for layer in variables["params"].values())


def test_score_map_of_image_size_is_logits(tiny_net):
    model, variables = tiny_net
    x = images(2, 64, 64)
    scores = model.apply(variables, x, method="score_map")
    assert scores.shape == (2, 1, 1, 7)
    np.testing.assert_allclose(scores[:, 0, 0], model.apply(variables, x), rtol=1e-4, atol=1e-4)


def test_score_map_is_fc_layers_on_windows(tiny_net):
    model, variables = tiny_net
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


def test_transpose_kernels_transposes_features(tiny_net):
    model, variables = tiny_net
    x = images(2, 100, 165)
    transposed = model.apply(
        transpose_kernels(variables), x.swapaxes(1, 2), ("pool5",), method="features"
    )["pool5"]
    expected = model.apply(variables, x, ("pool5",), method="features")["pool5"]
    assert transposed.shape == (2, 5, 3, 40)
    tolerance = 1e-4 * expected.max()
    np.testing.assert_allclose(transposed.swapaxes(1, 2), expected, rtol=1e-4, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((256, 256), (2, 2)),
        ((384, 384), (6, 6)),
        ((512, 512), (10, 10)),
        ((256, 341), (2, 4)),
        ((224, 224), (1, 1)),
    ],
)
def test_score_map_size(size, expected):
    model = VGG(CONFIGS["D"])
    x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    scores = jax.eval_shape(lambda v, x: model.apply(v, x, method="score_map"), variables, x)
    assert scores.shape[1:3] == model.score_map_size(*size) == expected


def test_features_before_and_after_relu(tiny_net):
    model, variables = tiny_net
    layers = ("conv3_1", "relu3_1", "pool3", "fc7", "relu7")
    features = model.apply(variables, images(1, 70, 66), method="features", layers=layers)
    assert features.keys() == set(layers)
    np.testing.assert_array_equal(features["relu3_1"], np.maximum(features["conv3_1"], 0))
    assert (features["conv3_1"] < 0).any()
    np.testing.assert_array_equal(features["relu7"], np.maximum(features["fc7"], 0))
    assert features["pool3"].shape == (1, 8, 8, 24)
    assert features["fc7"].shape == (1, 1, 1, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "layer"), [("A-LRN", "relu5_2"), ("C", "relu5_3"), ("E", "relu5_4")]
)
def test_head_continues_after_features(net, layer):
    model = VGG(narrow(net), 7, image_size=64)
    variables, x = init(model), images(2, 64, 64)
    activations = model.apply(variables, x, method="features", layers=(layer,))[layer]
    logits = model.apply(variables, activations, method="head")
    assert_close_to_largest(logits, model.apply(variables, x))


def test_features_reject_one_string(tiny_net):
    message = r"the string 'pool5': expected a tuple; pass \('pool5',\)"
    with pytest.raises(InputError, match=message):
        tiny_net[0].apply({}, images(1, 32, 32), method="features", layers="pool5")


def test_features_need_no_deeper_parameters(tiny_net):
    model, variables = tiny_net
    shallow = {"params": {name: variables["params"][name] for name in ("conv1_1", "conv2_1")}}
    layers = ("relu2_1", "pool1")
    features = model.apply(shallow, images(1, 20, 20), method="features", layers=layers)
    assert features.keys() == set(layers)


def test_select_layers():
    layers = layer_table(TINY, 7, image_size=64)
    names = [layer.name for layer in select_layers(layers, ("relu2_1", "conv1_1"), "relu1_1")]
    assert names == ["pool1", "conv2_1", "relu2_1"]
    assert select_layers(layers, ("fc8", "conv1_1")) == layers
    with pytest.raises(InputError, match=r"no layer given: this net has conv1_1, .*, fc8"):
        select_layers(layers, ())


@pytest.mark.parametrize(
    ("net", "batch_norm", "targets", "settings", "expected"),
    [
        ("A", False, (), {}, "conv1_1+relu_pool conv2_1+relu_pool conv3_1+relu conv3_2+relu_pool"),
        (
            "A",
            False,
            ("relu3_2",),
            {},
            "conv1_1+relu_pool conv2_1+relu_pool conv3_1+relu conv3_2+relu pool3",
        ),
        ("A", False, (), {"ceil": True}, "conv1_1+relu pool1 conv2_1+relu pool2"),
        ("A", False, (), {"fuse_pool": False}, "conv1_1+relu pool1 conv2_1+relu pool2"),
        ("A", False, ("conv1_1",), {}, "conv1_1 relu1_1 pool1+relu conv2_1+relu_pool"),
        ("A", False, ("conv1_1",), {"ceil": True}, "conv1_1 relu1_1 pool1+relu conv2_1+relu pool2"),
        ("A", False, ("conv1_1",), {"fuse_pool": False}, "conv1_1 relu1_1 pool1 conv2_1+relu"),
        ("A-LRN", False, (), {}, "conv1_1+relu lrn1_1 pool1 conv2_1+relu_pool"),
        ("C", True, (), {}, "conv1_1 bn1_1 relu1_1 conv1_2 bn1_2 relu1_2 pool1+relu conv2_1"),
    ],
)
def test_fuse_epilogues(net, batch_norm, targets, settings, expected):
    """Expected are the first layers of the plan that are not computed by another."""
    layers = layer_table(CONFIGS[net], 7, batch_norm, 64)
    plan = fuse_epilogues(layers, targets, **({"fuse_pool": True, "ceil": False} | settings))
    assert tuple(planned.layer for planned in plan) == layers
    computed = [
        layer.name + (f"+{kind}" if kind != "none" else "") + ("+relu" if fuse_relu else "")
        for layer, kind, is_fused, fuse_relu in plan
        if not is_fused
    ]
    assert computed[: len(expected.split())] == expected.split()
    assert computed[-7:] == ["fc6", "relu6", "drop6", "fc7", "relu7", "drop7", "fc8"]


def test_model_errors(tiny_net):
    model, variables = tiny_net
    with pytest.raises(InputError, match=r"'relu9_9'.*conv1_1.*pool5.*fc8"):
        model.apply(variables, images(1, 64, 64), method="features", layers=("relu9_9",))
    with pytest.raises(InputError, match=r"63x80.*at least 64x64"):
        model.apply(variables, images(1, 63, 80), method="score_map")
    with pytest.raises(InputError, match=r"3x80.*pool2 needs at least 4x4"):
        model.apply(variables, images(1, 3, 80), method="features", layers=("pool2",))
    with pytest.raises(InputError, match=r"the activations are 6x4: expected 4x4"):
        model.apply(variables, jnp.zeros((1, 6, 4, 24)), method="head")
    with pytest.raises(InputError, match=r"96x96.*64x64.*mean.*adaptive.*score_map"):
        model.apply(variables, images(1, 96, 96))
    with pytest.raises(InputError, match=r"'xavier'.*paper, glorot, he"):
        init(VGG(TINY, image_size=32, initializer="xavier"))
    with pytest.raises(InputError, match=r"\(64, 64, 3\)"):
        model.apply(variables, images(64, 64), method="score_map")


def test_missing_layers(tiny_net):
    """One sentence names them, and what works without them."""
    model, variables = tiny_net
    x, params = images(1, 64, 64), variables["params"]
    convs = {"params": {name: params[name] for name in params if not name.startswith("fc")}}
    message = r"params has no fc6, fc7, fc8: features up to the last pooling .*with_new_head"
    for arguments in ({}, {"method": "score_map"}, {"method": "features", "layers": ("fc8",)}):
        with pytest.raises(InputError, match=message):
            model.apply(convs, x, **arguments)
    with pytest.raises(InputError, match=r"no fc6: features up"):
        model.apply(convs, x, method="features", layers=("relu6",))
    assert model.apply(convs, x, method="features", layers=("pool5",))["pool5"].shape[1:3] == (2, 2)
    with pytest.raises(InputError, match=r"params has no conv2_1, fc7: expected the variables of"):
        kept = {name: params[name] for name in params if name not in ("conv2_1", "fc7")}
        model.apply({"params": kept}, x)
    with pytest.raises(InputError, match=r"params has no conv1_1, .*: expected the variables of"):
        model.apply(params, x)
    with pytest.raises(InputError, match=r"params has no fc8"):
        model.apply({"params": {**params, "fc8": {"bias": params["fc8"]["bias"]}}}, x)


def test_variables_of_another_net(tiny_net):
    model, variables = tiny_net
    x = images(1, 64, 64)
    with pytest.raises(
        InputError,
        match=r"conv2_1/kernel in params has the shape \(3, 3, 8, 16\): expected \(3, 3, 8, 32\);",
    ):
        stages = ((Conv(8),), (Conv(32),), *TINY.stages[2:])
        model.clone(config=VGGConfig(stages, TINY.fc)).apply(variables, x)
    with pytest.raises(InputError, match=r"fc6/kernel .*\(40, 24\): expected \(160, 24\)"):
        model.apply(init(model.clone(image_size=32)), x)
    with pytest.raises(InputError, match=r"fc8/kernel .*\(16, 7\): expected \(16, 5\)"):
        jax.jit(model.clone(num_classes=5).apply)(variables, x)
    normalized = model.clone(batch_norm=True)
    with pytest.raises(InputError, match=r"params has no bn1_1, .*expected the variables"):
        normalized.apply(variables, x)
    with pytest.raises(InputError, match=r"batch_stats has no bn1_1, bn2_1"):
        normalized.apply({"params": init(normalized)["params"]}, x)
    with pytest.raises(InputError, match=r"params has bn1_1, bn2_1, .*, which this net has not"):
        model.apply(init(normalized), x)
    deeper = model.clone(config=narrow("B"))
    shallower = model.clone(config=narrow("A"))
    with pytest.raises(InputError, match=r"params has conv1_2, .*, which this net has not"):
        shallower.apply(init(deeper), x, method="features", layers=("relu1_1",))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_with_new_head(batch_norm, caplog):
    model = VGG(DEEP, num_classes=7, image_size=16, batch_norm=batch_norm, frozen=("conv1_1",))
    variables = init(model)
    with caplog.at_level(logging.INFO, logger="vgg_jax"):
        new_model, new_variables = with_new_head(model, variables, 3, jax.random.key(0))
    assert "newly initialised fc8 (glorot)" in caplog.text
    assert new_model == model.clone(num_classes=3)
    assert new_variables.keys() == variables.keys()
    for name, layer in variables["params"].items():
        assert name == "fc8" or new_variables["params"][name] is layer
    assert new_variables.get("batch_stats") is variables.get("batch_stats")
    fc8 = new_variables["params"]["fc8"]
    assert fc8["kernel"].shape == (16, 3)
    assert np.abs(fc8["kernel"]).max() <= (6 / (16 + 3)) ** 0.5  # Glorot's bound
    assert fc8["kernel"].std() > 0
    assert not fc8["bias"].any()
    assert variables["params"]["fc8"]["kernel"].shape == (16, 7)
    x = images(2, 16, 16)
    old, new = (
        net.apply(v, x, ("drop7",), method="features")["drop7"]
        for net, v in ((model, variables), (new_model, new_variables))
    )
    np.testing.assert_array_equal(new, old)
    expected = np.asarray(old[:, 0, 0]) @ np.asarray(fc8["kernel"])
    np.testing.assert_allclose(new_model.apply(new_variables, x), expected, rtol=1e-4, atol=1e-5)


def test_with_new_head_of_convolutions(caplog):
    """Weights without fully connected layers, as Keras' files without the top."""
    model = VGG(DEEP, 7, image_size=16, initializer="paper", initializer_std=0.3, batch_norm=True)
    variables = init(model)
    params = {
        name: layer for name, layer in variables["params"].items() if not name.startswith("fc")
    }
    with caplog.at_level(logging.INFO, logger="vgg_jax"):
        new_model, new = with_new_head(model, {**variables, "params": params}, 3, jax.random.key(0))
    assert "newly initialised fc6, fc7, fc8 (paper)" in caplog.text
    shapes = jax.eval_shape(model.clone(num_classes=3).init, jax.random.key(0), images(1, 16, 16))
    assert jax.tree.map(jnp.shape, new["params"]) == jax.tree.map(jnp.shape, shapes["params"])
    assert float(new["params"]["fc6"]["kernel"].std()) == pytest.approx(0.3, rel=0.05)
    assert new_model.apply(new, images(2, 16, 16)).shape == (2, 3)
    _, only_fc8 = with_new_head(model, variables, 3, jax.random.key(0))
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(only_fc8["params"]["fc8"][leaf], new["params"]["fc8"][leaf])


def test_with_new_head_trains_new_layers(caplog):
    """A new layer that stays frozen would have no gradient."""
    model = VGG(SHALLOW, num_classes=7, image_size=16)
    variables = init(model)
    frozen = model.clone(frozen=("conv1_1", "fc7", "fc8"))
    with caplog.at_level(logging.INFO, logger="vgg_jax"):
        new_model, new = with_new_head(frozen, variables, 3, jax.random.key(0))
    assert new_model == model.clone(num_classes=3, frozen=("conv1_1", "fc7"))
    assert "no longer frozen, because new: fc8" in caplog.text
    x = images(2, model.image_size, model.image_size)

    @jax.jit
    @jax.grad
    def gradient(params):
        return new_model.apply({"params": params}, x)[:, 0].sum()

    gradients = gradient(new["params"])
    assert np.abs(gradients["fc8"]["bias"]).max() > 0
    assert not np.abs(gradients["fc7"]["bias"]).any()


def test_with_new_head_draws_the_head_only():
    """No array of the size of fc6 or of an activation is computed."""
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(VGG(CONFIGS["D"]).init, jax.random.key(0), image)

    def new_head(variables, key):
        return with_new_head(VGG(CONFIGS["D"]), variables, 10, key)[1]["params"]["fc8"]

    jaxpr = jax.make_jaxpr(new_head)(variables, jax.random.key(0))
    sizes = [var.aval.size for equation in jaxpr.jaxpr.eqns for var in equation.outvars]
    assert max(sizes) == 4096 * 10


def test_with_new_head_errors(tiny_net):
    model, variables = tiny_net
    key = jax.random.key(0)
    with pytest.raises(InputError, match="num_classes is 0"):
        with_new_head(model, variables, 0, key)
    with pytest.raises(InputError, match=r"fc6/kernel .*expected \(40, 24\)"):
        with_new_head(model.clone(image_size=32), variables, 3, key)
    with pytest.raises(InputError, match="params has no conv1_1"):
        with_new_head(model, variables["params"], 3, key)
    with pytest.raises(InputError, match="batch_stats has no bn1_1"):
        normalized = model.clone(batch_norm=True)
        with_new_head(normalized, {"params": init(normalized)["params"]}, 3, key)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": "D"}, "config is 'D': expected a VGGConfig"),
        ({"image_size": (32, 32)}, r"image_size is \(32, 32\): expected one integer"),
        ({"num_classes": ["cat", "dog"]}, r"num_classes is \['cat', 'dog'\]: expected one integer"),
        ({"num_classes": True}, "num_classes is True: expected one integer"),
        ({"batch_norm": "x"}, "batch_norm is 'x': expected True or False"),
        ({"quick_compile": 1}, "quick_compile is 1: expected True or False"),
        ({"dtype": "nope"}, r"dtype is 'nope': expected a type of floats, such as jnp\.float32"),
        ({"dtype": jnp.int32}, "dtype is .*int32.*: expected a type of floats"),
        ({"param_dtype": "nope"}, "param_dtype is 'nope': expected a type of floats"),
        ({"num_classes": 0}, "num_classes is 0: expected at least 1"),
        ({"image_size": 16}, "image_size is 16: expected at least 32"),
        ({"in_channels": 0}, "in_channels is 0: expected at least 1"),
        ({"initializer": "xavier"}, "initializer is 'xavier': expected one of paper, glorot, he"),
        ({"initializer": ["he"]}, r"initializer is \['he'\]: expected one of paper, glorot, he"),
        ({"frozen": None}, "frozen is None: expected a tuple of names of layers"),
        ({"pool": "min"}, "pool is 'min': expected one of max, avg"),
        ({"other_sizes": "crop"}, "other_sizes is 'crop': expected one of error, mean, adaptive"),
        ({"frozen": "fc6"}, r"frozen is the string 'fc6': expected a tuple; pass \('fc6',\)"),
        ({"frozen": ("relu1_1",)}, "frozen has 'relu1_1': expected some of conv1_1, "),
    ],
)
def test_wrong_fields(fields, message):
    """A wrong field is an error where the net is made, not where it first runs."""
    with pytest.raises(InputError, match=message):
        VGG(**({"config": TINY} | fields))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere all convolutions are XLA's")
def test_quick_compile(tiny_net):
    """The convolutions become XLA's, which compile quickly, and the logits stay as they are."""
    model, variables = tiny_net
    quick = model.clone(quick_compile=True)
    x = images(2, model.image_size, model.image_size)
    np.testing.assert_allclose(
        jax.jit(quick.apply)(variables, x), jax.jit(model.apply)(variables, x), rtol=1e-4, atol=1e-5
    )
    convolutions = [
        jax.jit(net.apply).lower(variables, x).as_text().count("stablehlo.convolution")
        for net in (model, quick)
    ]
    assert convolutions == [1, sum(map(len, model.config.stages))]  # the first one is always XLA's


def test_integer_images(tiny_net):
    """Pixels whose mean was not subtracted give wrong logits, without any other sign."""
    model, variables = tiny_net
    with pytest.raises(InputError, match=r"the images are uint8: expected floats .*vgg_jax.prepro"):
        model.apply(variables, np.zeros((1, 64, 64, 3), np.uint8))


@pytest.mark.parametrize(
    "function",
    [
        lambda model, variables: with_new_head(model, variables, 3, jax.random.key(0)),
        lambda model, variables: with_in_channels(model, variables, 1),
        compile_inference,
        lambda model, variables: vgg_jax.save("a.safetensors", model, variables, {}),
        lambda model, variables: vgg_jax.export.export("a.onnx", model, variables, {}),
        lambda model, variables: vgg_jax.evaluate(model, variables, {}, "digits"),
        lambda model, variables: lpips(model, variables, None, None, mean_rgb=(0, 0, 0)),
        to_nnx,
    ],
)
def test_swapped_model_and_variables(tiny_net, function):
    model, variables = tiny_net
    with pytest.raises(InputError, match="model is a dict and its variables are a VGG: expected"):
        function(variables, model)


def test_dropout_in_training_only():
    model = VGG(DEEP, num_classes=7, image_size=16)
    variables = init(model)
    x = images(4, 16, 16)
    np.testing.assert_array_equal(model.apply(variables, x), model.apply(variables, x))
    with pytest.raises(flax.errors.InvalidRngError):
        model.apply(variables, x, train=True)
    a, b = (
        model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1)
    )
    assert (a != b).any()


def test_batch_norm_variables():
    model = VGG(DEEP, num_classes=7, batch_norm=True, image_size=16)
    variables = init(model)
    assert variables["params"]["bn2_2"].keys() == {"scale", "bias"}
    assert variables["batch_stats"]["bn2_2"].keys() == {"mean", "var"}
    x = images(4, 16, 16)
    logits, updated = model.apply(
        variables, x, train=True, rngs={"dropout": jax.random.key(0)}, mutable=["batch_stats"]
    )
    assert logits.shape == (4, 7)
    assert (updated["batch_stats"]["bn1_1"]["mean"] != 0).all()
    assert model.apply(variables, x).shape == (4, 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("initializer", "std", "conv", "fc"),
    [
        ("paper", 0.01, 0.01, 0.01),
        ("paper", 0.05, 0.05, 0.05),
        ("glorot", 0.01, (2 / (9 * 64 + 9 * 128)) ** 0.5, (2 / (2048 + 512)) ** 0.5),
        ("he", 0.01, (2 / (9 * 128)) ** 0.5, 0.01),
    ],
)
def test_initializer_deviation(initializer, std, conv, fc):
    config = VGGConfig(((Conv(64),), (Conv(128),)), fc=(512, 512))
    model = VGG(config, 10, image_size=16, initializer=initializer, initializer_std=std)
    image = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    draw = jax.jit(lambda key: model.lazy_init(key, image), compiler_options=compiler_options())
    params = draw(jax.random.key(0))["params"]
    assert not any(layer["bias"].any() for layer in params.values())
    assert float(params["conv2_1"]["kernel"].std()) == pytest.approx(conv, rel=0.02)
    assert float(params["fc6"]["kernel"].std()) == pytest.approx(fc, rel=0.02)
    assert abs(float(params["conv2_1"]["kernel"].mean())) < 0.02 * conv
    if initializer == "glorot":  # uniform
        assert float(jnp.abs(params["conv2_1"]["kernel"]).max()) <= conv * 3**0.5


def test_bfloat16_keeps_float32_parameters():
    model = VGG(DEEP, num_classes=7, image_size=16, dtype=jnp.bfloat16)
    variables = init(model)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert model.apply(variables, images(1, 16, 16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["B", "C", "D", "E"])
def test_copy_matching_layers_from_a(name):
    x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    source, target = (
        jax.eval_shape(VGG(CONFIGS[net]).init, jax.random.key(0), x) for net in ("A", name)
    )
    merged, copied = copy_matching_layers(source=source, target=target, layers=PAPER_INIT_LAYERS)
    assert sorted(copied) == sorted(PAPER_LAYERS)
    assert merged["params"].keys() == target["params"].keys()
    for layer in target["params"]:
        expected = (source if layer in copied else target)["params"][layer]
        assert merged["params"][layer] is expected


def test_copy_matching_layers_copies_all_that_fit():
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    source, target = (
        jax.eval_shape(
            VGG(CONFIGS["D"], num_classes, image_size=32, batch_norm=True).init,
            jax.random.key(0),
            x,
        )
        for num_classes in (10, 3)
    )
    merged, copied = copy_matching_layers(source=source, target=target)
    assert {*target["params"]} - {*copied} == {"fc8"}
    assert merged["params"]["fc8"] is target["params"]["fc8"]
    assert merged["params"]["conv5_3"] is source["params"]["conv5_3"]
    assert merged["batch_stats"]["bn5_3"] is source["batch_stats"]["bn5_3"]
    with pytest.raises(TypeError):
        copy_matching_layers(source, target)
    with pytest.raises(InputError, match="layers is the string 'conv1_1': expected a tuple"):
        copy_matching_layers(source=source, target=target, layers="conv1_1")
    with pytest.raises(InputError, match="source has no 'params', but bn1_1"):
        copy_matching_layers(source=source["params"], target=target)


def test_copy_matching_layers_without_match(tiny_net):
    _, variables = tiny_net
    other = {"params": {"conv1_1": {"kernel": jnp.zeros((3, 3, 1, 8)), "bias": jnp.zeros(8)}}}
    with pytest.raises(InputError, match="no layer fits: expected some of conv1_1, "):
        copy_matching_layers(source=other, target=variables)
    with pytest.raises(InputError, match="no layer fits: expected some of conv1_1, "):
        copy_matching_layers(source=variables, target=variables, layers=("conv9",))


def test_copy_matching_layers_skips_other_shape():
    source, target = (
        {
            "params": {
                "fc7": {"kernel": np.full((3, 4), k), "bias": np.zeros(4)},
                "fc8": {"kernel": np.zeros((4, k)), "bias": np.zeros(k)},
            }
        }
        for k in (10, 5)
    )
    merged, copied = copy_matching_layers(source=source, target=target)
    assert copied == ("fc7",)
    assert merged["params"]["fc7"] is source["params"]["fc7"]
    assert merged["params"]["fc8"] is target["params"]["fc8"]


def test_frozen_layers_have_no_gradient():
    """Also in one's own loop, which knows nothing of `frozen`."""
    frozen = ("conv1_1", "bn1_1", "fc7")
    model = VGG(
        SHALLOW, num_classes=7, image_size=16, batch_norm=True, frozen=frozen, dropout_rate=0
    )
    variables, x = init(model), images(2, 16, 16)

    def loss(params):
        stats = {"batch_stats": variables["batch_stats"]}
        logits, updated = model.apply(
            {"params": params, **stats}, x, train=True, mutable=["batch_stats"]
        )
        return (logits**2).sum(), updated["batch_stats"]

    gradients, stats = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    for name, layer in gradients.items():
        is_zero = [not np.any(leaf) for leaf in layer.values()]
        # The batch normalisation after a convolution takes its bias away.
        assert all(is_zero) if name in frozen else not all(is_zero), name
    for name, layer in stats.items():
        is_equal = np.array_equal(layer["mean"], variables["batch_stats"][name]["mean"])
        assert is_equal == (name in frozen)
