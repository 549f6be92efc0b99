"""The comparison with PyTorch, layer by layer."""

import numpy as np
import pytest
from safetensors.numpy import save_file

import vgg_jax
from tests.helpers.weights_files import random_tensors, torchvision_state
from vgg_jax import cli
from vgg_jax.weights import from_loaded
from vgg_jax.weights.compare_torch import TOLERANCE, compare_with_torch


@pytest.mark.slow
def test_import_check_torch(tmp_path, capsys):
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    state = torchvision_state(random_tensors("A", batch_norm=True), "A", batch_norm=True)
    source, target = tmp_path / "vgg.safetensors", tmp_path / "own.safetensors"
    command = ["import", str(source), str(target), "--check", "torch"]
    save_file(state, source)
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "A with batch normalisation in torchvision's layout" in out
    assert "conv1_1 divided by the standard deviation (58.395, 57.120, 57.375)" in out
    assert "bn5_2" in out
    assert "largest difference from PyTorch" in out
    state["features.0.weight"][0, 0, 0, 0] = np.nan
    save_file(state, source)
    assert cli.main([*command, "--overwrite"]) == 1


@pytest.mark.slow
def test_compare_average_pooling(tmp_path):
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    path = tmp_path / "net.safetensors"
    save_file(torchvision_state(random_tensors("A"), "A"), path)
    model, variables, metadata = vgg_jax.load(path)
    average = from_loaded(model.clone(pool="avg"), variables, metadata)
    assert max(compare_with_torch(average).values()) < TOLERANCE
