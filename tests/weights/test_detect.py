"""Recognising a net and its layout."""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers.weights_files import random_tensors, torchvision_state
from vgg_jax import InputError
from vgg_jax.weights import read


def test_detect_lists_all_differences(tmp_path):
    state = torchvision_state(random_tensors("D"), "D")
    del state["features.5.bias"]
    state["features.7.weight"] = state["features.7.weight"][:100]
    state["extra"] = np.zeros(3, np.float32)
    save_file(state, tmp_path / "vgg.safetensors")
    with pytest.raises(InputError) as error:
        read(tmp_path / "vgg.safetensors")
    for words in (
        "the closest match, D in the torchvision layout",
        "features.5.bias (128,) is missing",
        "features.7.weight is (100, 128, 3, 3) instead of (128, 128, 3, 3)",
        "unexpected tensor extra",
    ):
        assert words in str(error.value)


def test_detect_rejects_unknown_layout(tmp_path):
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    message = "VGG; it has a: expected the names of a VGG of vgg_jax, torchvision, timm, keras"
    with pytest.raises(InputError, match=re.escape(message)):
        read(tmp_path / "other.safetensors")


def test_detect_with_named_net(tmp_path):
    path = tmp_path / "vgg.safetensors"
    save_file(torchvision_state(random_tensors("A"), "A"), path)
    assert read(path, "A").net == "A"
    with pytest.raises(
        InputError,
        match=r"features.28.weight \(512, 512, 3, 3\) is missing.*D in the torchvision layout",
    ):
        read(path, "D")
    with pytest.raises(InputError, match=r"net is 'F': expected one of A, A-LRN"):
        read(path, "F")
    with pytest.raises(InputError, match=r"net is \['A'\]: expected one of A, A-LRN"):
        read(path, ["A"])
