"""Nets whose fc6 reads one position: of 32-pixel images, or of the mean of pool5."""

import json
import zipfile

import h5py
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import vgg_jax
from tests.helpers.compare import assert_close_to_largest
from tests.helpers.weights_files import (
    FC,
    TORCHVISION_MEAN,
    TORCHVISION_STD,
    forward,
    photos,
    random_tensors,
    torchvision_state,
)
from vgg_jax import CONFIGS, InputError
from vgg_jax.cli import main
from vgg_jax.configs.models import layer_table
from vgg_jax.weights import read, save
from vgg_jax.weights.layouts import LAYOUTS


@pytest.fixture(scope="module")
def tensors():
    """A net A whose fc6 is (24, 512), as after AdaptiveAvgPool2d(1)."""
    tensors = random_tensors("A")
    kernel = np.random.default_rng(3).normal(0, 512**-0.5, (FC[0], 512))
    return tensors | {"fc6": [np.float32(kernel), tensors["fc6"][1]]}


@pytest.fixture
def path(tensors, tmp_path):
    path = tmp_path / "net.safetensors"
    save_file(torchvision_state(tensors, "A"), path)
    return path


def torch_logits(tensors, images):
    """Logits by PyTorch, with global average pooling before fc6."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    from torch.nn import functional

    x = (images - np.array(TORCHVISION_MEAN)) / np.array(TORCHVISION_STD)
    x = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    last = {"conv1_1", "conv2_1", "conv3_2", "conv4_2", "conv5_2"}  # of a stage
    for name, arrays in tensors.items():
        kernel, bias = (torch.from_numpy(np.float64(array)) for array in arrays)
        if name.startswith("conv"):
            x = functional.conv2d(x, kernel, bias, padding=1).relu()
            x = functional.max_pool2d(x, 2) if name in last else x
        else:
            x = functional.adaptive_avg_pool2d(x, 1).flatten(1) if x.ndim == 4 else x
            x = functional.linear(x, kernel, bias)
            x = x if name == "fc8" else x.relu()
    return x.numpy()


def test_asks_for_image_size(path, tmp_path, capsys):
    with pytest.raises(InputError, match=r"expected the size of the images, 32 or such as 224; pa"):
        vgg_jax.load(path)
    assert main(["import", str(path), str(tmp_path / "out.safetensors")]) == 2
    message = capsys.readouterr().err
    assert "or after global average (not max) pooling: expected" in message
    assert "--image-size" in message
    assert not (tmp_path / "out.safetensors").exists()


def test_predict_takes_image_size(path, tmp_path, capsys):
    """As import, export and evaluate do, by the same flags."""
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((70, 80, 3), np.uint8)).save(photo)
    command = ["predict", str(path), str(photo), "--protocol", "center"]
    assert main(command) == 2
    assert "--image-size" in capsys.readouterr().err
    assert main([*command, "--image-size", "64"]) == 0
    assert "photo.png: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("image_size", "window"), [(32, 1), (64, 2), (100, 3)])
def test_logits_equal_those_of_pytorch(image_size, window, path, tensors):
    """One position, or global average pooling of pool5."""
    model, variables, metadata = vgg_jax.load(path, image_size=image_size)
    assert model.image_size == metadata["preprocessing"]["image_size"] == image_size
    assert variables["params"]["fc6"]["kernel"].shape == (window**2 * 512, FC[0])
    images = photos(2, image_size)
    output = forward(model, variables, images - np.float32(metadata["preprocessing"]["mean_rgb"]))
    assert_close_to_largest(output, torch_logits(tensors, images))


def test_import_states_size_and_keeps_it(path, tmp_path, capsys):
    """The file that is written names the size, and is never asked."""
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    assert main(["import", str(path), str(out), "--image-size", "64"]) == 0
    assert "image size 64, global average pooling before fc6;" in capsys.readouterr().out
    weights = read(out)
    assert weights.model.image_size == 64
    save(again, read(path, image_size=32))
    assert read(again).model.image_size == 32
    jax.tree.map(np.testing.assert_array_equal, weights.params, read(path, image_size=64).params)
    with pytest.raises(InputError, match="image_size is 32, and the file names 64: expected no"):
        read(out, image_size=32)


def test_rejects_impossible_image_size(path, tmp_path):
    for image_size in (0, 31, 33 * 32):
        with pytest.raises(InputError, match=f"image_size is {image_size}: expected 32"):
            read(path, image_size=image_size)
    save_file(torchvision_state(random_tensors("A"), "A"), tmp_path / "64.safetensors")
    with pytest.raises(InputError, match="image_size is 224: expected 64, because fc6 reads 2x2"):
        read(tmp_path / "64.safetensors", image_size=224)
    assert read(tmp_path / "64.safetensors").model.image_size == 64


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.parametrize("pooling", ["GlobalAveragePooling2D", "GlobalMaxPooling2D"])
def test_pooling_of_keras(pooling, suffix, tensors, tmp_path):
    """The file describes its layers. On one position, the maximum is the mean."""
    layers = [{"class_name": name, "config": {"name": name}} for name in ("Conv2D", pooling)]
    config = json.dumps({"class_name": "Functional", "config": {"layers": layers}})
    path = tmp_path / f"net.{suffix}"
    names = LAYOUTS["keras 3" if suffix == "keras" else "keras"].modules(layer_table(CONFIGS["A"]))
    params = ("/vars/0", "/vars/1") if suffix == "keras" else ("/kernel:0", "/bias:0")
    with h5py.File(tmp_path / "weights", "w") as file:
        for layer, (kernel, bias) in tensors.items():
            file[names[layer] + params[0]] = (
                kernel.T.swapaxes(0, -3) if kernel.ndim > 2 else kernel.T
            )
            file[names[layer] + params[1]] = bias
        file.attrs["model_config"] = config
    if suffix == "keras":
        with zipfile.ZipFile(path, "w") as file:
            file.write(tmp_path / "weights", "model.weights.h5")
            file.writestr("config.json", config)
    else:
        (tmp_path / "weights").rename(path)
    assert read(path, preprocessing="caffe", image_size=32).top
    for image_size in (None, 64):
        if pooling == "GlobalMaxPooling2D":
            message = "it has GlobalMaxPooling2D before its dense layers: expected GlobalAverage"
            with pytest.raises(InputError, match=message):
                read(path, preprocessing="caffe", image_size=image_size)
        elif image_size:
            assert read(path, preprocessing="caffe", image_size=image_size).top
