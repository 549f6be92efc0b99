"""Verifying exported files."""

import dataclasses
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.helpers.export_files import (
    FULL_CONVS,
    RUNNERS,
    own_output,
    random_weights,
    require_onnx,
    run_onnx,
)
from tests.helpers.tiny import init
from vgg_jax import InputError, cli
from vgg_jax.export import ExportSpec, write
from vgg_jax.export.verify import verify


@pytest.mark.integration
@pytest.mark.parametrize(
    "bfloat16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("file_format", ["safetensors", *RUNNERS])
def test_verify_finds_changed_weights(file_format, bfloat16, tmp_path, monkeypatch):
    """A file passes in another process; with slightly larger weights it fails."""
    if file_format == "onnx":
        require_onnx()
    weights = random_weights("A", config=FULL_CONVS)
    spec = ExportSpec(weights, bfloat16=bfloat16)
    path, changed_path = tmp_path / f"net.{file_format}", tmp_path / f"changed.{file_format}"
    write(path, spec)
    process = subprocess.run(
        [sys.executable, "-m", "vgg_jax", "verify", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "A, 3 classes, logits, images uint8" in process.stdout
    factor = np.float32(1.01 if bfloat16 else 1.001)
    changed = dataclasses.replace(
        weights, params=jax.tree.map(lambda x: x * factor, weights.params)
    )
    metadata = spec.metadata()
    monkeypatch.setattr(ExportSpec, "metadata", lambda _: metadata)
    write(changed_path, ExportSpec(changed, bfloat16=bfloat16))
    assert cli.main(["verify", str(changed_path)]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "rounding", [{"bfloat16": True}, {"float16": True}], ids=lambda x: next(iter(x))
)
def test_verify_tells_distance_of_rounded_file(rounding, tmp_path, capsys):
    require_onnx()
    weights = random_weights("A")
    weights = dataclasses.replace(weights, params=init(weights.model)["params"])
    rounded, full = ExportSpec(weights, **rounding), ExportSpec(weights)
    write(tmp_path / "rounded.onnx", rounded)
    write(tmp_path / "full.onnx", full)
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    exact = own_output(full, images)
    distance = np.abs(run_onnx(tmp_path / "rounded.onnx", images) - exact).max()
    result = verify(tmp_path / "rounded.onnx")
    assert result.difference < result.tolerance
    assert result.distance == pytest.approx(distance / np.abs(exact).max(), rel=1e-2)
    assert verify(tmp_path / "full.onnx").distance is None
    assert cli.main(["verify", str(tmp_path / "rounded.onnx")]) == 0
    line = f"difference from the float32 net: {result.distance:.1e}"
    assert line in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "full.onnx")]) == 0
    assert "float32 net" not in capsys.readouterr().out


@pytest.mark.parametrize("file_format", ["safetensors", "stablehlo", "onnx"])
def test_verify_rejects_damaged_file(file_format, tmp_path, capsys):
    if file_format == "onnx":
        require_onnx()
    path = tmp_path / f"cut.{file_format}"
    path.write_bytes(b"PK\x03\x04nothing")
    assert cli.main(["verify", str(path)]) == 2
    assert f"cut.{file_format} cannot be run" in capsys.readouterr().err


@pytest.mark.parametrize("file_format", ["safetensors", "stablehlo", "onnx", "savedmodel"])
def test_missing_paths(file_format, tmp_path, capsys):
    """No file to verify, and no folder to write to."""
    path = tmp_path / "none" / f"net.{file_format}"
    assert cli.main(["verify", str(path)]) == 2
    assert f"there is no {path}: expected what" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"^cannot write .*none"):
        write(path, ExportSpec(random_weights("A")))


def test_savedmodel_without_metadata(tmp_path):
    """It cannot be verified, and it is not replaced: it may be somebody else's."""
    path, spec = tmp_path / "net.savedmodel", ExportSpec(random_weights("A"))
    write(path, spec)
    write(path, spec, overwrite=True)
    shutil.rmtree(path / "assets.extra")
    with pytest.raises(InputError, match=r"net\.savedmodel cannot be run"):
        verify(path)
    with pytest.raises(InputError, match=r"net\.savedmodel is a folder"):
        write(path, spec, overwrite=True)
    assert not list(tmp_path.glob("*.new"))
