"""Files with the names of Keras 3, whose images the names do not tell."""

import json
import zipfile

import h5py
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import vgg_jax
from tests.helpers.compare import assert_trees_close
from tests.helpers.weights_files import (
    FC,
    IMAGE_SIZE,
    NUM_CLASSES,
    random_tensors,
    reorder_kernel,
    torchvision_state,
)
from vgg_jax import CONFIGS, InputError, VGGConfig
from vgg_jax.cli import main
from vgg_jax.weights import read
from vgg_jax.weights.layouts import LAYOUTS, PREPROCESSINGS, tensor_table

# As the presets have them: (x / 255 - mean) / std.
CONVERTER = {
    "class_name": "VGGImageConverter",
    "config": {
        "scale": [0.017124753831663668, 0.01750700280112045, 0.017429193899782133],
        "offset": [-2.1179039301310043, -2.0357142857142856, -1.8044444444444445],
    },
}


@pytest.fixture
def tensors():
    return random_tensors("A")


@pytest.fixture
def path(tensors, tmp_path):
    """model.weights.h5, in a folder of its own."""
    config = VGGConfig(CONFIGS["A"].stages, FC)
    table = tensor_table(LAYOUTS["keras 3"], config, NUM_CLASSES, False, IMAGE_SIZE)
    arrays = [array for layer in tensors.values() for array in layer]
    with h5py.File(tmp_path / "model.weights.h5", "w") as file:
        for mapping, array in zip(table, arrays, strict=True):
            file[mapping.foreign_name] = (
                reorder_kernel(array, "HWIO", "HWI O") if array.ndim > 1 else array
            )
    return tmp_path / "model.weights.h5"


@pytest.fixture
def backbone(path):
    """model.weights.h5 as a preset has it, without a head."""
    with h5py.File(path, "a") as file:
        for name in ("dense", "dense_1", "dense_2"):
            del file["layers"][name]
    return path


def as_torchvision(tensors, folder, preprocessing=None):
    """The same weights, read from a file of torchvision."""
    save_file(torchvision_state(tensors, "A"), folder / "torchvision.safetensors")
    return read(folder / "torchvision.safetensors", preprocessing=preprocessing)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("image_converter.json", CONVERTER),
        ("preprocessor.json", {"config": {"image_converter": CONVERTER}}),
        ("task.json", {"config": {"preprocessor": {"config": {"image_converter": CONVERTER}}}}),
    ],
)
def test_preset(name, content, backbone, tensors, tmp_path):
    (tmp_path / name).write_text(json.dumps(content))
    weights, expected = read(backbone), as_torchvision(tensors, tmp_path)
    convolutions = {layer: expected.params[layer] for layer in weights.params}
    assert len(convolutions) == 8
    assert_trees_close(weights.params, convolutions, 1e-6)
    assert weights.preprocessing.mean_rgb == pytest.approx(expected.preprocessing.mean_rgb)
    assert "BGR" not in str(weights)
    assert "conv1_1 divided by the standard deviation (58.395, 57.120, 57.375)" in str(weights)


@pytest.mark.parametrize("name", ["model.weights.h5", "task.weights.h5", "mine.weights.h5", "m.h5"])
def test_other_weights_beside_a_preset(name, path, tmp_path):
    """A net of Keras Applications in the folder of a preset does not get its preprocessing."""
    (tmp_path / "image_converter.json").write_text(json.dumps(CONVERTER))
    other = path.rename(tmp_path / name)
    if name == "task.weights.h5":  # the head is KerasHub's, or none
        with h5py.File(other, "a") as file:
            for layer in ("dense", "dense_1", "dense_2"):
                del file["layers"][layer]
    with pytest.raises(InputError, match=r"and KerasHub \(torchvision\) share: expected one of"):
        read(other)


def test_keras_archive(path, tensors, tmp_path):
    """A whole classifier of KerasHub, as model.save writes it."""
    archive, inner = tmp_path / "net.keras", tmp_path / "classifier.h5"
    with h5py.File(path) as file, h5py.File(inner, "w") as classifier:
        for name, layer in file["layers"].items():
            parent = "vgg_backbone" if name.startswith("conv") else "sequential"
            file.copy(layer, classifier.require_group(f"layers/{parent}/layers"), name)
    with zipfile.ZipFile(archive, "w") as file:
        file.write(inner, "model.weights.h5")
        file.writestr("config.json", json.dumps({"config": {"preprocessor": CONVERTER}}))
    assert_trees_close(read(archive).params, as_torchvision(tensors, tmp_path).params, 1e-6)


def split_head(path, folder, pooling="flatten", whole=False):
    """task.weights.h5 with the head of the net in `path`, or with the whole net."""
    task = folder / "task.weights.h5"
    with h5py.File(path) as file, h5py.File(task, "w") as classifier:
        for name, layer in file["layers"].items():
            if name.startswith("dense"):
                head = classifier.require_group("layers/sequential/layers")
                new = {"dense": "conv2d", "dense_1": "conv2d_1", "dense_2": "dense"}[name]
                file.copy(layer, head, name if pooling == "flatten" else new)
            elif whole:
                file.copy(layer, classifier.require_group("layers/vgg_backbone/layers"), name)
        if pooling != "flatten":  # fc6 and fc7 are convolutions
            for name, side in (("conv2d", 2), ("conv2d_1", 1)):
                group = classifier[f"layers/sequential/layers/{name}/vars"]
                kernel = group["0"][()]
                del group["0"]
                group["0"] = kernel.reshape(side, side, -1, kernel.shape[-1])
        classifier["optimizer/vars/1"] = np.float32(0.1)
    return task


@pytest.mark.parametrize("pooling", ["flatten", "avg"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "head"])
def test_task_weights(whole, pooling, path, tensors, tmp_path):
    """With the head alone, as KerasHub 0.32 saves it, the convolutions are read beside it."""
    (tmp_path / "task.json").write_text(json.dumps({"config": {"preprocessor": CONVERTER}}))
    task = split_head(path, tmp_path, pooling, whole)
    with h5py.File(path, "a") as file:  # model.weights.h5 of a preset has no head
        for name in list(file["layers"]):
            if name.startswith("dense") or whole:
                del file["layers"][name]
    weights = read(task)
    assert weights.top
    assert_trees_close(weights.params, as_torchvision(tensors, tmp_path).params, 1e-6)


def test_task_weights_alone(path, tmp_path):
    task = split_head(path, tmp_path)
    path.unlink()
    with pytest.raises(
        InputError,
        match=r"task.weights.h5 holds the head of a KerasHub preset only: expected its convol.*, "
        "model.weights.h5, in the same folder",
    ):
        read(task)


def test_without_preset_asks(path, tensors, tmp_path, capsys):
    """Nothing is guessed: pool5 of the wrong choice is 57 times too large."""
    message = r"Keras Applications \(preprocessing caffe\) and KerasHub \(torchvision\) share: exp"
    for content in (None, "[]", "{", json.dumps({"class_name": "VGGImageConverter"})):
        if content:
            (tmp_path / "image_converter.json").write_text(content)
        with pytest.raises(InputError, match=message):
            vgg_jax.load(path)
    assert main(["import", str(path), str(tmp_path / "out.safetensors")]) == 2
    assert "--preprocessing" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("preprocessing", PREPROCESSINGS)
def test_named_preprocessing(preprocessing, path, tensors, tmp_path, capsys):
    """Both files have the same tensors, so that they have the same net."""
    out = tmp_path / "out.safetensors"
    assert main(["import", str(path), str(out), "--preprocessing", preprocessing]) == 0
    bgr = "conv1_1 reordered from BGR to RGB" in capsys.readouterr().out
    assert bgr == (preprocessing == "caffe")
    expected = as_torchvision(tensors, tmp_path, preprocessing)
    jax.tree.map(np.testing.assert_array_equal, read(out).params, expected.params)
    assert read(out).preprocessing.mean_rgb == expected.preprocessing.mean_rgb
    kernel = expected.params["conv1_1"]["kernel"]
    if bgr:  # PyTorch's kernel (O, I, H, W), with the input channels reversed
        np.testing.assert_array_equal(
            kernel, tensors["conv1_1"][0].transpose(2, 3, 1, 0)[:, :, ::-1]
        )


def test_preprocessing_of_file_with_mean(tensors, tmp_path):
    """A file's own mean is no guess."""
    path, metadata = tmp_path / "own.safetensors", {"mean_rgb": [1, 2, 3], "std_rgb": [1, 1, 1]}
    save_file(torchvision_state(tensors, "A"), path, {"vgg_jax": json.dumps(metadata)})
    with pytest.raises(InputError, match=r"is 'caffe', and .* names a mean of its own: expected"):
        read(path, preprocessing="caffe")


def test_unknown_preprocessing(path, tmp_path):
    with pytest.raises(InputError, match="preprocessing is 'tf': expected one of caffe, torchv"):
        read(path, preprocessing="tf")
    with pytest.raises(InputError, match=r"preprocessing is 'caffe' and .* is a folder: expected"):
        vgg_jax.load(tmp_path, preprocessing="caffe")
