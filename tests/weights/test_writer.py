"""Saving weights."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.weights_files import random_tensors, torchvision_state
from vgg_jax import InputError
from vgg_jax.weights import read, save
from vgg_jax.weights.layouts import CAFFE_PREPROCESSING, TORCHVISION


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vgg.safetensors"
    save_file(torchvision_state(random_tensors("A"), "A"), path)
    return read(path)


def test_save_rescales_conv1(weights, tmp_path):
    """A net for images without std gets torchvision's std in torchvision's layout."""
    own = dataclasses.replace(weights, preprocessing=CAFFE_PREPROCESSING)
    save(tmp_path / "vgg.safetensors", own, "torchvision")
    saved = read(tmp_path / "vgg.safetensors")
    assert saved.preprocessing == own.preprocessing._replace(scale=73)
    assert saved.source_std == TORCHVISION.std_rgb
    kernels = [net.variables["params"]["conv1_1"]["kernel"] for net in (saved, own)]
    np.testing.assert_allclose(*kernels, rtol=1e-6)
    kernel = load_file(tmp_path / "vgg.safetensors")["features.0.weight"]
    assert np.abs(kernel).max() > 50 * np.abs(kernels[1]).max()


def test_save_keeps_folder(weights, tmp_path):
    """A folder at the path is not replaced."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("content")
    with pytest.raises(InputError, match=r"cannot write .*folder: it is a folder"):
        save(folder, weights)
    assert (folder / "file").read_text() == "content"
    assert not list(tmp_path.glob("*.new"))
