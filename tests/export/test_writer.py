"""Exports that are refused, and the files that are written."""

import dataclasses
import os

import pytest

from tests.helpers.export_files import FC, FULL_CONVS, RUNNERS, random_weights, require_onnx
from tests.helpers.tiny import narrow
from vgg_jax import VGG, InputError, cli
from vgg_jax.export import ExportSpec, write
from vgg_jax.export.verify import TOLERANCE, verify


@pytest.mark.parametrize(
    ("name", "net", "options", "layout", "message"),
    [
        ("taken.onnx", "A", {}, "vgg_jax", r"taken\.onnx is a folder"),
        ("x.safetensors", "A", {"uint8": False}, "vgg_jax", r"x\.safetensors holds weights only"),
        ("x.onnx", "A", {}, "timm", r"layout is 'timm': expected a \.safetensors file"),
        (
            "x.stablehlo",
            "A",
            {"float16": True},
            "vgg_jax",
            r"x\.stablehlo cannot compute in float16",
        ),
        (
            "x.safetensors",
            "A-LRN",
            {},
            "torchvision",
            "the net is A-LRN, which torchvision does not have",
        ),
        ("none/x.safetensors", "A", {}, "vgg_jax", r"cannot write .*none/x\.safetensors \("),
    ],
    ids=["folder", "float-images", "program-layout", "float16", "no-such-net", "missing-folder"],
)
def test_write_rejects(name, net, options, layout, message, tmp_path):
    (tmp_path / "taken.onnx").mkdir()
    with pytest.raises(InputError, match=message):
        write(tmp_path / name, ExportSpec(random_weights(net), **options), layout)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.onnx"]


@pytest.mark.parametrize("file_format", RUNNERS)
def test_write_replaces_only_if_told(file_format, tmp_path):
    if file_format == "onnx":
        require_onnx()
    path, spec = tmp_path / f"net.{file_format}", ExportSpec(random_weights("A"))
    write(path, spec)
    with pytest.raises(InputError, match=rf"net\.{file_format} exists: .* or --overwrite"):
        write(path, spec)
    write(path, spec, overwrite=True)
    assert verify(path).difference < TOLERANCE
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_commands_replace_only_if_told(tmp_path, capsys):
    path, out = str(tmp_path / "net.safetensors"), tmp_path / "out.safetensors"
    write(path, ExportSpec(random_weights("A", config=FULL_CONVS)))
    out.write_text("of the user's")
    for command in ("import", "export"):
        assert cli.main([command, path, str(out)]) == 2
        assert "out.safetensors exists: expected a name that is free" in capsys.readouterr().err
        assert out.read_text() == "of the user's"
    for command in ("import", "export"):
        assert cli.main([command, path, str(out), "--overwrite"]) == 0
        assert out.stat().st_size > 10_000


@pytest.mark.parametrize("umask", [0o027, 0o002])
def test_files_have_usual_permissions(umask, tmp_path):
    """Those of a file and a folder that Python creates."""
    require_onnx()
    spec = ExportSpec(random_weights("A"))
    before = os.umask(umask)
    try:
        (tmp_path / "file").touch()
        (tmp_path / "folder").mkdir()
        for file_format in ("safetensors", *RUNNERS):
            write(tmp_path / f"net.{file_format}", spec)
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        usual = tmp_path / ("folder" if path.is_dir() else "file")
        assert oct(path.stat().st_mode) == oct(usual.stat().st_mode), path


@pytest.mark.parametrize("layout", ["torchvision", "timm"])
def test_layout_needs_head_of_library(layout, tmp_path):
    """A net of another size or with other fully connected layers cannot be loaded there."""
    path = tmp_path / "net.safetensors"
    for size, fc in ((32, (4096, 4096)), (224, FC), (256, (4096, 4096))):
        config = dataclasses.replace(narrow("A"), fc=fc)
        model = VGG(config, 3, image_size=size)
        params = {"fc8": {}}
        weights = dataclasses.replace(random_weights("A"), model=model, params=params)
        message = f"reads {size}x{size} images and has {fc[0]} and {fc[1]} .* that {layout} loads"
        with pytest.raises(InputError, match=message):
            write(path, ExportSpec(weights), layout)
    assert not path.exists()
