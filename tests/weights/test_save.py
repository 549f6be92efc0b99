"""Saved nets are loaded again as they were: `vgg_jax.save`, and `weights.save` after `read`."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vgg_jax
from tests.helpers.compare import assert_close_to_largest
from tests.helpers.weights_files import (
    FC,
    IMAGE_SIZE,
    NUM_CLASSES,
    TORCHVISION_STD,
    assert_round_trip,
    forward,
    random_tensors,
    torchvision_state,
)
from vgg_jax import CONFIGS, IMAGENET, VGG, InputError, with_in_channels
from vgg_jax.weights import Weights, read, save
from vgg_jax.weights.layouts import LAYOUTS, Preprocessing, tensor_table

CONFIG = dataclasses.replace(CONFIGS["A"], fc=FC)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A net of torchvision, whose images are divided by a standard deviation."""
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(torchvision_state(random_tensors("A"), "A"), path)
    return vgg_jax.load(path)


def test_save_keeps_logits(loaded, tmp_path):
    """The deviation is not divided into conv1_1 a second time."""
    model, variables, metadata = loaded
    changed = jax.tree.map(lambda leaf: 1.01 * leaf, variables)
    vgg_jax.save(tmp_path / "changed.safetensors", model, changed, metadata)
    again, restored, restored_metadata = vgg_jax.load(tmp_path / "changed.safetensors")
    images = np.random.default_rng(0).normal(0, 50, (2, IMAGE_SIZE, IMAGE_SIZE, 3))
    expected = forward(model, changed, np.float32(images))
    np.testing.assert_array_equal(forward(again, restored, np.float32(images)), expected)
    assert restored_metadata["preprocessing"] == metadata["preprocessing"]
    assert restored_metadata["classes"] == metadata["classes"]


def test_save_with_other_head(loaded, tmp_path):
    model, variables, metadata = loaded
    fc8 = {"kernel": np.ones((16, 2), np.float32), "bias": np.zeros(2, np.float32)}
    new = {"params": {**variables["params"], "fc8": fc8}}
    path = tmp_path / "two.safetensors"
    with pytest.raises(InputError, match=r"10 classes and the model 2: .*classes"):
        vgg_jax.save(path, model.clone(num_classes=2), new, metadata)
    vgg_jax.save(path, model.clone(num_classes=2), new, metadata | {"classes": ("ants", "bees")})
    again, _, restored = vgg_jax.load(path)
    assert again.num_classes == 2
    assert restored["classes"] == ("ants", "bees")


def test_save_rejects_other_net(loaded, tmp_path):
    _, variables, metadata = loaded
    with pytest.raises(InputError, match=r"net is 'A', and the model has other convolutions"):
        vgg_jax.save(tmp_path / "x.safetensors", VGG(CONFIGS["D"], 10), variables, metadata)
    model = VGG(CONFIGS["A-LRN"], 10, image_size=IMAGE_SIZE)
    with pytest.raises(InputError, match=r"net is 'A', .*local response normalisations: expected"):
        vgg_jax.save(tmp_path / "x.safetensors", model, variables, metadata)
    for change, message in (
        ({"classes": "0123456789"}, "classes are '0123456789': expected a tuple of names"),
        ({"classes": np.array("a")}, r"classes are array\(.*: expected a tuple of names"),
        ({"preprocessing": {"mean_rgb": np.array(3)}}, r"mean_rgb is array\(3\): expected a tuple"),
        ({"preprocessing": {}}, "preprocessing has no mean_rgb: expected the metadata that"),
    ):
        with pytest.raises(InputError, match=message):
            vgg_jax.save(tmp_path / "x.safetensors", loaded[0], variables, metadata | change)
    with pytest.raises(InputError, match="preprocessing is missing"):
        vgg_jax.save(
            tmp_path / "x.safetensors",
            VGG(CONFIGS["A"], 10),
            variables,
            {"net": "A", "classes": metadata["classes"]},
        )


def test_save_rejects_image_size_of_other_net(loaded, tmp_path):
    """The scale of the metadata belongs to its image size."""
    model, variables, metadata = loaded
    convs = {name: layer for name, layer in variables["params"].items() if name[:2] != "fc"}
    larger = model.clone(image_size=IMAGE_SIZE + 32)
    message = f"image_size is {IMAGE_SIZE} and the model's {IMAGE_SIZE + 32}: expected the same"
    path = tmp_path / "larger.safetensors"
    with pytest.raises(InputError, match=message):
        vgg_jax.save(path, larger, {"params": convs}, metadata)
    preprocessing = metadata["preprocessing"] | {"image_size": IMAGE_SIZE + 32, "scale": 80}
    vgg_jax.save(path, larger, {"params": convs}, metadata | {"preprocessing": preprocessing})
    *_, restored = vgg_jax.load(path)
    assert restored["preprocessing"]["scale"] == 80


def test_saved_file_is_as_readable_as_others(loaded, tmp_path):
    vgg_jax.save(tmp_path / "net.safetensors", *loaded)
    (tmp_path / "other").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("net.safetensors", "other")]
    assert modes[0] == modes[1]


def random_images(channels=3):
    images = np.random.default_rng(0).normal(0, 50, (2, IMAGE_SIZE, IMAGE_SIZE, channels))
    return np.float32(images)


def foreign_file(path, layout, metadata=None):
    """A file with a library's names, shapes and, if it has no metadata, preprocessing."""
    rng = np.random.default_rng(0)
    table = tensor_table(LAYOUTS[layout], CONFIG, NUM_CLASSES, False, IMAGE_SIZE)
    tensors = {}
    for tensor in table:
        is_kernel = tensor.path[2] == "kernel"
        fan_in = np.prod(tensor.foreign_shape) / tensor.shape[-1] if is_kernel else 200
        values = rng.normal(0, (2 / fan_in) ** 0.5, tensor.foreign_shape)
        tensors[tensor.foreign_name] = np.float32(values)
    save_file(tensors, path, metadata and {"vgg_jax": json.dumps(metadata)})
    return tensors


@pytest.fixture(params=[*LAYOUTS, "vgg_jax with a std"])
def source(request, tmp_path):
    """A file in each layout, and one as vgg_jax 0.1.0 converted torchvision's weights."""
    layout, _, has_std = request.param.partition(" with")
    metadata = {"mean_rgb": [120, 110, 100], "std_rgb": TORCHVISION_STD} if has_std else None
    if LAYOUTS[layout].shared:  # the names do not tell the images
        metadata = {"mean_rgb": [120, 110, 100]}
    foreign_file(tmp_path / "source.safetensors", layout, metadata)
    assert read(tmp_path / "source.safetensors").layout == layout
    return tmp_path / "source.safetensors"


def test_trained_params_replace_those_of_a_file(source, tmp_path):
    """Nothing that was done to the file's values is done to the new ones."""
    model, variables, metadata = vgg_jax.load(source)
    mine = jax.tree.map(lambda leaf: 1.01 * leaf, variables["params"])
    expected = forward(model, {"params": mine}, random_images())
    assert np.abs(expected - forward(model, variables, random_images())).max() > 1e-3
    weights = dataclasses.replace(read(source), params=mine)
    # What `compare_with_torch` and the exports compute.
    np.testing.assert_array_equal(forward(model, weights.variables, random_images()), expected)
    for layout in ("vgg_jax", "torchvision", "timm"):
        save(tmp_path / "saved.safetensors", weights, layout)
        again, restored, restored_metadata = vgg_jax.load(tmp_path / "saved.safetensors")
        assert restored_metadata["preprocessing"] == metadata["preprocessing"]
        assert restored_metadata["classes"] == metadata["classes"]
        actual = forward(again, restored, random_images())
        if layout == "vgg_jax":
            np.testing.assert_array_equal(actual, expected)
        else:
            assert_close_to_largest(actual, expected, 1e-5)


def test_own_file_says_that_images_are_not_divided(tmp_path):
    """Its kernel of conv1_1 is for images of which the mean is subtracted, for any reader."""
    tensors = foreign_file(tmp_path / "torch.safetensors", "torchvision")
    save(tmp_path / "own.safetensors", read(tmp_path / "torch.safetensors"))
    header = header_of(tmp_path / "own.safetensors")
    assert header["std_rgb"] == [1, 1, 1]
    kernel = load_file(tmp_path / "own.safetensors")["conv1_1/kernel"]
    expected = tensors["features.0.weight"].transpose(2, 3, 1, 0)
    expected = expected / np.array(TORCHVISION_STD)[None, None, :, None]
    np.testing.assert_allclose(kernel, expected, rtol=1e-15)
    _, variables, _ = vgg_jax.load(tmp_path / "own.safetensors")
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}
    assert_round_trip(tmp_path / "torch.safetensors", tensors, "torchvision", tmp_path)


def header_of(path):
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return json.loads(file.metadata()["vgg_jax"])


def test_bfloat16_file_has_rounded_variables(tmp_path):
    """The values that `load` returns, not those of images that are divided."""
    import ml_dtypes

    foreign_file(tmp_path / "torch.safetensors", "torchvision")
    weights = read(tmp_path / "torch.safetensors")
    save(tmp_path / "half.safetensors", weights, dtype=ml_dtypes.bfloat16)
    _, variables, _ = vgg_jax.load(tmp_path / "half.safetensors")
    for name, layer in weights.variables["params"].items():
        rounded = layer["kernel"].astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(variables["params"][name]["kernel"], rounded)


def test_save_rejects_other_layers(loaded, tmp_path):
    model, variables, metadata = loaded
    params, path = variables["params"], tmp_path / "x.safetensors"
    convs = {name: layer for name, layer in params.items() if name.startswith("conv")}
    vgg_jax.save(path, model, {"params": convs}, metadata)
    notop = read(path)
    assert not notop.top
    with pytest.raises(
        InputError, match=r"params has fc6, fc7, fc8, and the file would not: .*top"
    ):
        save(path, dataclasses.replace(notop, params=params))
    save(path, dataclasses.replace(notop, model=model, params=params, top=True))
    assert read(path).top
    with pytest.raises(InputError, match=r"params has no conv2_1: expected"):
        some = {name: layer for name, layer in params.items() if name != "conv2_1"}
        vgg_jax.save(path, model, {"params": some}, metadata)
    for wrong in (np.array(1.0), {**params, "conv2_1": np.array(1.0)}, {**params, "conv2_1": 3}):
        with pytest.raises(InputError, match=r"params has no .*conv2_1.*: expected the variables"):
            vgg_jax.save(path, model, {"params": wrong}, metadata)
    with pytest.raises(InputError, match=r"fc8/kernel in params .*\(16, 10\): expected \(16, 3\)"):
        model = model.clone(num_classes=3)
        vgg_jax.save(path, model, {"params": params}, metadata | {"classes": ("a", "b", "c")})


def test_weights_with_std_are_rejected(loaded):
    model, variables, _ = loaded
    preprocessing = Preprocessing(IMAGENET.mean_rgb, TORCHVISION_STD)
    classes = tuple(map(str, range(10)))
    with pytest.raises(InputError, match=r"std_rgb is \(58.395, .*: expected 1 for each channel"):
        Weights("A", "vgg_jax", model, variables["params"], {}, True, preprocessing, classes)


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 5])
def test_save_with_other_channels(channels, loaded, tmp_path):
    """The mean becomes that of the images which `with_in_channels` describes."""
    model, variables, metadata = loaded
    adapted, adapted_variables = with_in_channels(model, variables, channels)
    path = tmp_path / "net.safetensors"
    vgg_jax.save(path, adapted, adapted_variables, metadata)
    again, restored, restored_metadata = vgg_jax.load(path)
    assert again == adapted
    images = random_images(channels)
    expected = forward(adapted, adapted_variables, images)
    np.testing.assert_array_equal(forward(again, restored, images), expected)
    red, green, blue = metadata["preprocessing"]["mean_rgb"]
    preprocessing = restored_metadata["preprocessing"]
    mean = [(red + green + blue) / 3] if channels == 1 else [red, green, blue, red, green]
    np.testing.assert_allclose(preprocessing["mean_rgb"], mean)
    assert preprocessing["channels"] == ("grey" if channels == 1 else "5 channels")
    # A mean of one's own for each channel is kept.
    own = metadata | {"preprocessing": preprocessing | {"mean_rgb": (99.0,) * channels}}
    vgg_jax.save(path, adapted, adapted_variables, own)
    assert read(path).preprocessing.mean_rgb == (99.0,) * channels
    with pytest.raises(InputError, match=f"in_channels is {channels}, and torchvision's .*for RGB"):
        save(path, read(path), "torchvision")
    with pytest.raises(InputError, match=f"mean_rgb has 2 values .* in_channels is {channels}"):
        own = metadata | {"preprocessing": preprocessing | {"mean_rgb": (1, 2)}}
        vgg_jax.save(path, adapted, adapted_variables, own)


def test_file_with_other_channels_than_it_says(loaded, tmp_path):
    model, variables, metadata = loaded
    vgg_jax.save(tmp_path / "net.safetensors", *with_in_channels(model, variables, 1), metadata)
    tensors, header = (
        load_file(tmp_path / "net.safetensors"),
        header_of(tmp_path / "net.safetensors"),
    )
    for changes, message in (
        (
            {"in_channels": 3, "mean_rgb": [1] * 3, "std_rgb": [1] * 3},
            r"conv1_1/kernel is \(3, 3, 1, 64\) instead of",
        ),
        ({"mean_rgb": [1, 2, 3]}, r"mean_rgb is .*expected a finite number for each of 1 channels"),
        ({"in_channels": "many"}, r"in_channels is 'many': expected an integer"),
    ):
        content = header | changes
        save_file(tensors, tmp_path / "bad.safetensors", {"vgg_jax": json.dumps(content)})
        with pytest.raises(InputError, match=message):
            vgg_jax.load(tmp_path / "bad.safetensors")


def test_save_keeps_pool(loaded, tmp_path):
    model, variables, metadata = loaded
    average, path = model.clone(pool="avg"), tmp_path / "net.safetensors"
    vgg_jax.save(path, average, variables, metadata)
    again, restored, _ = vgg_jax.load(path)
    assert again == average
    expected = forward(average, variables, random_images())
    np.testing.assert_array_equal(forward(again, restored, random_images()), expected)
    with pytest.raises(InputError, match=r"pool is 'avg', and timm's nets .*expected 'max'"):
        save(path, read(path), "timm")
    tensors, header = load_file(path), header_of(path)
    save_file(tensors, path, {"vgg_jax": json.dumps(header | {"pool": "min"})})
    with pytest.raises(InputError, match="pool is 'min': expected one of max, avg"):
        vgg_jax.load(path)
    del header["pool"]  # as in files of 0.1.0
    save_file(tensors, path, {"vgg_jax": json.dumps(header)})
    assert vgg_jax.load(path)[0].pool == "max"


def test_save_rejects_other_ending(loaded, tmp_path):
    with pytest.raises(InputError, match=r"net\.npz: expected a name that ends in \.safetensors"):
        vgg_jax.save(tmp_path / "net.npz", *loaded)
    assert not any(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"the path is b'net\.safetensors': expected a string"):
        vgg_jax.save(b"net.safetensors", *loaded)
