"""Nets with another head, or inside another model: the convolutions, and a warning on the rest."""

import io
import itertools
import logging
import re
import zipfile

import h5py
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers.compare import assert_close_to_largest
from tests.helpers.weights_files import (
    TORCHVISION_STD,
    forward,
    photos,
    pytorch_state,
    random_tensors,
    reorder_kernel,
    torchvision_state,
)
from vgg_jax import InputError
from vgg_jax.cli import main
from vgg_jax.cli.messages import MAX_LENGTH
from vgg_jax.weights import load, read


@pytest.fixture(scope="module")
def tensors():
    return random_tensors("A")


@pytest.fixture(scope="module")
def convs(tensors):
    """The convolutions alone, in torchvision's names."""
    state = torchvision_state(tensors, "A")
    return {name: array for name, array in state.items() if name.startswith("features")}


@pytest.fixture(scope="module")
def params(convs, tmp_path_factory):
    path = tmp_path_factory.mktemp("convs") / "net.safetensors"
    save_file(convs, path)
    return read(path).params


def linear(name, *sizes):
    """The layers of a head: (out, in) kernels and biases by `name` with {} for the index."""
    rng, state = np.random.default_rng(0), {}
    for i, (in_features, out_features) in enumerate(itertools.pairwise(sizes)):
        state[f"{name.format(i)}.weight"] = rng.normal(size=(out_features, in_features))
        state[f"{name.format(i)}.bias"] = rng.normal(size=out_features)
    return {key: np.float32(array) for key, array in state.items()}


HEADS = {
    "classifier.weight": linear("classifier", 512, 10),
    "flattened": linear("classifier", 25088, 10),
    "classifier.0": linear("classifier.0", 25088, 10),
    "fc": linear("fc", 512, 2),
    "other numbers": linear("classifier.{}", 512, 64, 10),
    "two layers": linear("classifier.0", 512, 256) | linear("classifier.3", 256, 2),
    "normalised": linear("head.1", 512, 2) | {"head.0.weight": np.ones(512, np.float32)},
    "segmentation": {"decoder.0.weight": np.ones((64, 512, 3, 3), np.float32)},
}


@pytest.mark.parametrize("head", HEADS)
def test_pytorch_head(head, convs, params, tmp_path, caplog):
    path = tmp_path / "net.safetensors"
    save_file(convs | HEADS[head], path)
    weights = read(path)
    assert not weights.top
    jax.tree.map(np.testing.assert_array_equal, weights.params, params)
    (record,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
    message = record.getMessage()
    assert "only the convolutions are read, A in the torchvision layout; another" in message
    assert all(name in message for name in HEADS[head])


def test_one_more_convolution_is_an_error(convs, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    save_file(convs | {"features.21.weight": np.ones((512, 512, 3, 3), np.float32)}, path)
    with pytest.raises(InputError, match=r"features\.21\.weight: expected all tensors of the clo"):
        read(path)
    assert main(["import", str(path), str(tmp_path / "out.safetensors")]) == 2
    assert len(capsys.readouterr().err.strip()) <= MAX_LENGTH


# fc6 to fc8 in other modules: dropouts and activations have numbers, and no weights.
OTHER_NUMBERS = {
    "no dropout": ("0", "2", "4"),
    "dropout first": ("1", "4", "6"),
    "dropout after flatten": ("1", "4", "7"),
    "Sequential(Dropout, Linear)": ("0", "3", "6.1"),
    "Sequential(Linear, LogSoftmax)": ("0", "3", "6.0"),
}


@pytest.fixture(scope="module")
def whole(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "net.safetensors"
    save_file(torchvision_state(tensors, "A"), path)
    return read(path).params


@pytest.mark.parametrize("numbers", OTHER_NUMBERS.values(), ids=OTHER_NUMBERS)
def test_whole_net_with_other_numbers(numbers, tensors, convs, whole, tmp_path):
    path = tmp_path / "net.safetensors"
    modules = [f"classifier.{number}" for number in numbers]
    indices = [name.removesuffix(".weight") for name in convs if name.endswith(".weight")]
    save_file(pytorch_state(tensors, indices, modules), path)
    weights = read(path)
    jax.tree.map(np.testing.assert_array_equal, weights.params, whole)
    assert f"fc6 to fc8 are {', '.join(modules)}, with a ReLU between them" in str(weights)


def test_whole_net_in_one_sequential(tensors, convs, whole, tmp_path):
    """All layers have numbers: Flatten is 21, and the fully connected layers 22, 24 and 26."""
    path = tmp_path / "net.safetensors"
    indices = [name.split(".")[1] for name in convs if name.endswith(".weight")]
    save_file(pytorch_state(tensors, indices, ["22", "24", "26"]), path)
    jax.tree.map(np.testing.assert_array_equal, read(path).params, whole)


def test_logits_without_dropout_equal_pytorch(tensors, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    nn, layers, in_features = torch.nn, [], 3
    for stage in ((64,), (128,), (256, 256), (512, 512), (512, 512)):
        for features in stage:
            layers += [nn.Conv2d(in_features, features, 3, padding=1), nn.ReLU()]
            in_features = features
        layers.append(nn.MaxPool2d(2))
    head = [nn.Linear(2048, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)]
    net = nn.Sequential(*layers, nn.Flatten(), *head)
    indices = [i for i, layer in enumerate(net) if isinstance(layer, nn.Conv2d)]
    state = pytorch_state(tensors, indices, [22, 24, 26])
    net.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    save_file(state, tmp_path / "net.safetensors")
    model, variables, metadata = load(tmp_path / "net.safetensors")
    images = photos() - np.float32(metadata["preprocessing"]["mean_rgb"])
    scaled = torch.tensor((images / np.float32(TORCHVISION_STD)).transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = net(scaled).numpy()
    assert_close_to_largest(forward(model, variables, images), expected)


# Not the three layers of VGG, or not all of them: only the convolutions can be read.
PARTS = {
    "fc6 and fc7 of VGG": linear("classifier.0", 2048, 24) | linear("classifier.3", 24, 16),
    "fc6 of VGG": linear("classifier.0", 2048, 24),
    "fc8 of VGG": linear("classifier.6", 16, 10),
    "6x7 positions": linear("classifier.0", 21504, 10),
    "fc7 does not read fc6": linear("classifier.0", 512, 64) | linear("classifier.3", 32, 10),
    "fc8 reads more than fc7": linear("classifier.0", 2048, 24)
    | linear("classifier.3", 24, 16)
    | linear("classifier.6", 26, 10),
    "one more layer": linear("classifier.0", 2048, 24)
    | linear("classifier.3", 24, 16)
    | linear("classifier.6", 16, 10)
    | linear("classifier.7", 10, 2),
    "two layers in the last": linear("classifier.0", 2048, 24)
    | linear("classifier.3", 24, 16)
    | linear("classifier.6.0", 16, 8)
    | linear("classifier.6.3", 8, 2),
    "no activation between": linear("classifier.{}", 2048, 24, 16, 10),
    "no bias": {"classifier.0.weight": np.ones((24, 2048), np.float32)},
    "activations in blocks": linear("classifier.0.0", 2048, 24)
    | linear("classifier.2.0", 24, 16)
    | linear("classifier.4", 16, 10),
    "normalisation": linear("classifier.0", 2048, 24)
    | {"classifier.2.weight": np.ones(24, np.float32), "classifier.2.bias": np.ones(24, np.float32)}
    | linear("classifier.4", 24, 10),
}


@pytest.mark.parametrize("head", PARTS)
def test_part_of_a_head_is_left_out(head, convs, params, tmp_path, caplog):
    """Nothing is damaged: another net, or a file that someone cut on purpose."""
    path = tmp_path / "net.safetensors"
    save_file(convs | PARTS[head], path)
    weights = read(path)
    assert not weights.top
    jax.tree.map(np.testing.assert_array_equal, weights.params, params)
    (record,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
    message = record.getMessage()
    assert "only the convolutions are read, A in the torchvision layout; another" in message
    assert all(name in message for name in PARTS[head])


def test_four_dense_layers_of_keras(tensors, params, tmp_path, caplog):
    with h5py.File(tmp_path / "net.weights.h5", "w") as file:
        write_keras3(file, tensors, "", (2048, 24, 16, 8, 3))
    weights = read(tmp_path / "net.weights.h5", preprocessing="torchvision")
    jax.tree.map(np.testing.assert_array_equal, weights.params, params)
    assert "another head is left out: layers/dense/vars/0" in caplog.text


def test_damaged_convolution_is_an_error(convs, tmp_path):
    misshapen = convs | {"features.3.weight": convs["features.3.weight"][:100]}
    save_file(misshapen | HEADS["fc"], tmp_path / "net.safetensors")
    with pytest.raises(InputError, match=r"features.3.weight is \(100, 64, 3, 3\) instead of"):
        read(tmp_path / "net.safetensors")


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (lambda name: "0." + name.removeprefix("features."), "'0.'; left out: 3.bias, 3.weight"),
        (lambda name: "net.encoder." + name.removeprefix("features."), "'net.encoder.'; left out"),
        (lambda name: "backbone." + name, "'backbone.'; left out: 3.bias, 3.weight"),
    ],
    ids=["Sequential", "features by another name", "features"],
)
def test_features_inside_pytorch_module(names, others, convs, params, tmp_path, caplog):
    """For example nn.Sequential(vgg.features, AdaptiveAvgPool2d(1), Flatten(), Linear(512, 2))."""
    path = tmp_path / "net.safetensors"
    save_file({names(name): array for name, array in convs.items()} | linear("3", 512, 2), path)
    jax.tree.map(np.testing.assert_array_equal, read(path).params, params)
    assert f"the net is under {others}" in caplog.text


def test_features_with_names_of_other_modules(convs, tmp_path):
    """Two unnamed nets are none."""
    both = {
        name.replace("features", prefix): array
        for name, array in convs.items()
        for prefix in ("a", "b")
    }
    save_file(both, tmp_path / "net.safetensors")
    with pytest.raises(InputError, match="these are not the weights of a VGG"):
        read(tmp_path / "net.safetensors")


def keras_arrays(tensors):
    """{layer: (kernel, bias)} of the convolutions, in Keras' order."""
    return {
        name: (reorder_kernel(kernel, "HWIO", "HWI O"), bias)
        for name, (kernel, bias) in tensors.items()
        if name.startswith("conv")
    }


def write_keras3(file, tensors, group, head):
    """The names of Keras 3: a group of convolutions, and dense layers beside it."""
    for i, (kernel, bias) in enumerate(keras_arrays(tensors).values()):
        name = f"{group}layers/conv2d_{i}" if i else f"{group}layers/conv2d"
        file[f"{name}/vars/0"], file[f"{name}/vars/1"] = kernel, bias
    for i, (in_features, out_features) in enumerate(itertools.pairwise(head)):
        name = f"layers/dense_{i}" if i else "layers/dense"
        file[f"{name}/vars/0"] = np.ones((in_features, out_features), np.float32)
        file[f"{name}/vars/1"] = np.ones(out_features, np.float32)
    file["optimizer/vars/1"] = np.float32(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["weights.h5", "keras"])
@pytest.mark.parametrize("head", [(512, 2), (2048, 64, 2)])
@pytest.mark.parametrize(
    "group", ["", "layers/sequential/", "layers/functional/", "layers/functional_1/layers/vgg11/"]
)
def test_keras3_head(group, head, suffix, tensors, params, tmp_path, caplog):
    path, content = tmp_path / f"net.{suffix}", io.BytesIO()
    with h5py.File(content, "w") as file:
        write_keras3(file, tensors, group, head)
    path.write_bytes(content.getvalue())
    if suffix == "keras":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("model.weights.h5", content.getvalue())
    weights = read(path, preprocessing="torchvision")
    assert not weights.top
    jax.tree.map(np.testing.assert_array_equal, weights.params, params)
    assert "left out: layers/dense/vars/0, layers/dense/vars/1" in caplog.text
    assert "optimizer" not in caplog.text


@pytest.mark.parametrize("group", ["layers/sequential/", "layers/a/layers/b/"])
def test_keras3_outer_head(group, tensors, tmp_path):
    """Dense layers after a nested net without any are its own if there are three that fit."""
    path, flat = tmp_path / "net.weights.h5", tmp_path / "flat.weights.h5"
    for file, name in ((path, group), (flat, "")):
        with h5py.File(file, "w") as opened:
            write_keras3(opened, tensors, name, (2048, 24, 16, 3))
    weights, expected = (read(file, preprocessing="caffe") for file in (path, flat))
    assert weights.top and weights.model.image_size == 64
    jax.tree.map(np.testing.assert_array_equal, weights.params, expected.params)
    with h5py.File(path, "a") as file:
        for i in range(4):
            file[f"layers/batch_normalization/vars/{i}"] = np.ones(24, np.float32)
    assert not read(path, preprocessing="caffe").top


@pytest.mark.parametrize("suffix", ["weights.h5", "keras"])
def test_keras3_whole_net_in_sequential(suffix, tensors, tmp_path):
    """The name of any Sequential is that of the head of a KerasHub classifier."""
    content, path = io.BytesIO(), tmp_path / f"net.{suffix}"
    with h5py.File(content, "w") as file:
        write_keras3(file, tensors, "", (2048, 24, 16, 3))
        file.move("layers", "net/layers")
        file.move("net", "layers/sequential")
    path.write_bytes(content.getvalue())
    if suffix == "keras":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("model.weights.h5", content.getvalue())
    assert read(path, preprocessing="caffe").top


def test_keras3_with_normalisations_is_an_error(tensors, tmp_path):
    """Batch normalisations between the convolutions have numbers of their own."""
    with h5py.File(tmp_path / "net.weights.h5", "w") as file:
        write_keras3(file, tensors, "", (512, 2))
        for i in range(8):
            for j in range(4):
                file[f"layers/batch_normalization_{i}/vars/{j}"] = np.ones(64, np.float32)
    with pytest.raises(InputError, match="unexpected tensor layers/batch_normalization_0/vars/0"):
        read(tmp_path / "net.weights.h5", preprocessing="caffe")


@pytest.mark.parametrize(
    ("conv", "dense"),
    [
        ("model_weights/vgg11/{0}/{1}", "model_weights/dense/sequential/dense/{1}"),
        ("vgg11/{0}/{1}:0", "dense/dense/{1}:0"),
        ("{0}/{0}/{1}", "predictions/predictions/{1}"),
    ],
    ids=["model", "weights", "flat"],
)
def test_legacy_keras_head(conv, dense, tensors, params, tmp_path, caplog):
    """The .h5 files of Keras 2, which Keras 3 writes as well."""
    path = tmp_path / "net.h5"
    with h5py.File(path, "w") as file:
        for name, arrays in keras_arrays(tensors).items():
            layer = re.sub(r"conv(\d)_(\d)", r"block\1_conv\2", name)
            for param, array in zip(("kernel", "bias"), arrays, strict=True):
                file[conv.format(layer, param)] = array
        file[dense.format("", "kernel")] = np.ones((512, 2), np.float32)
        file[dense.format("", "bias")] = np.ones(2, np.float32)
        file["optimizer_weights/sgd/m/block1_conv1/kernel"] = np.ones(3, np.float32)
    weights = read(path, preprocessing="torchvision")
    jax.tree.map(np.testing.assert_array_equal, weights.params, params)
    assert "left out: " in caplog.text
    assert "optimizer" not in caplog.text


def test_two_nets_in_keras_file(tensors, tmp_path):
    with h5py.File(tmp_path / "net.weights.h5", "w") as file:
        write_keras3(file, tensors, "layers/a/", ())
        del file["optimizer"]
        write_keras3(file, tensors, "layers/b/", ())
    with pytest.raises(InputError, match=r"it holds several nets, under 'layers/a/', 'layers/b/'"):
        read(tmp_path / "net.weights.h5")


@pytest.mark.slow
@pytest.mark.parametrize(
    "prefix", ["", "module.", "vgg.", "features.", "model.features.module._orig_mod."]
)
@pytest.mark.parametrize("top", [True, False])
def test_authors_names_in_state_dict(prefix, top, tensors, params, tmp_path, capsys):
    """Gatys' vgg_conv.pth and its like: conv1_1.weight, for images that the names do not tell."""
    path, out = tmp_path / "vgg_conv.safetensors", tmp_path / "out.safetensors"
    state = {}
    for name, arrays in tensors.items():
        if top or name.startswith("conv"):
            place = prefix.replace("features", "classifier") if name.startswith("fc") else prefix
            state |= dict(
                zip((f"{place}{name}.weight", f"{place}{name}.bias"), arrays, strict=True)
            )
    save_file(state, path)
    assert main(["import", str(path), str(out)]) == 2
    message = capsys.readouterr().err
    assert "copies of the authors' nets (preprocessing caffe) and PyTorch's (torc" in message
    assert len(message.strip()) <= MAX_LENGTH
    weights = read(path, preprocessing="torchvision")
    assert (weights.layout, weights.net, weights.top) == ("caffe-pytorch", "A", top)
    convolutions = {name: weights.params[name] for name in params}
    jax.tree.map(np.testing.assert_array_equal, convolutions, params)
    assert main(["import", str(path), str(out), "--preprocessing", "caffe"]) == 0
    kernel = read(out).params["conv1_1"]["kernel"]  # the channels become RGB
    np.testing.assert_array_equal(kernel, tensors["conv1_1"][0].transpose(2, 3, 1, 0)[:, :, ::-1])
    if top:
        np.testing.assert_array_equal(weights.params["fc8"]["kernel"], tensors["fc8"][0].T)


def test_authors_names_with_other_layers(tensors, params, tmp_path, caplog):
    """As in S3FD, a detector of faces: fc6 and fc7 are other convolutions."""
    state = {
        f"{name}.{param}": array
        for name, arrays in tensors.items()
        if name.startswith("conv")
        for param, array in zip(("weight", "bias"), arrays, strict=True)
    }
    for name, shape in (
        ("fc6", (1024, 512, 3, 3)),
        ("fc7", (1024, 1024, 1, 1)),
        ("conv6_1", (256, 1024, 1, 1)),
        ("conv3_3_norm", (256,)),
    ):
        state[f"{name}.weight"] = np.zeros(shape, np.float32)
    save_file(state, tmp_path / "s3fd.safetensors")
    weights = read(tmp_path / "s3fd.safetensors", preprocessing="torchvision")
    jax.tree.map(np.testing.assert_array_equal, weights.params, params)
    assert "left out: conv3_3_norm.weight, conv6_1.weight, fc6.weight, fc7.weight" in caplog.text


@pytest.mark.parametrize("net", ["D", "E"])
def test_deeper_nets_with_other_heads(net, tmp_path):
    """The convolutions of A have names that D and E have as well."""
    convolutions = {
        f"{layer}.{param}": array
        for layer, arrays in random_tensors(net).items()
        if layer.startswith("conv")
        for param, array in zip(("weight", "bias"), arrays, strict=True)
    }
    path = tmp_path / "net.safetensors"
    save_file(convolutions | HEADS["fc"], path)
    weights = read(path, preprocessing="caffe")
    assert weights.net == net and not weights.top
