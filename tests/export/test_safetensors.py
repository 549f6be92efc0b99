"""Exported .safetensors files and their metadata."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from tests.helpers.export_files import CLASSES, FC, FULL_CONVS, random_weights
from vgg_jax import CONFIGS, IMAGENET, cli
from vgg_jax.export import ExportSpec, write
from vgg_jax.weights import read


@pytest.mark.slow
def test_safetensors_metadata(tmp_path):
    weights = random_weights("A-LRN", config=dataclasses.replace(CONFIGS["A-LRN"], fc=FC))
    path = tmp_path / "net.safetensors"
    write(path, ExportSpec(weights))
    with safe_open(path, "numpy") as file:
        metadata = json.loads(file.metadata()["vgg_jax"])
    assert metadata["classes"] == list(CLASSES)
    assert (metadata["net"], metadata["image_size"]) == ("A-LRN", 32)
    assert (metadata["channels"], metadata["mean_rgb"]) == ("RGB", list(IMAGENET.mean_rgb))
    back = read(path)
    assert (back.net, back.classes) == ("A-LRN", CLASSES)
    assert back.preprocessing.mean_rgb == IMAGENET.mean_rgb
    jax.tree.map(np.testing.assert_array_equal, back.params, weights.params)


@pytest.mark.slow
def test_safetensors_bfloat16(tmp_path):
    weights = random_weights("A", config=FULL_CONVS)
    path = tmp_path / "net.safetensors"
    write(path, ExportSpec(weights, bfloat16=True))
    kernel = read(path).params["conv3_1"]["kernel"]
    assert kernel.dtype == np.float32
    rounded = weights.params["conv3_1"]["kernel"].astype(jnp.bfloat16)
    np.testing.assert_array_equal(kernel, rounded.astype(np.float32))
    assert cli.main(["verify", str(path)]) == 0
