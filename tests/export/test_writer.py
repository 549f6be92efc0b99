"""Exports that are refused."""

import pytest

from tests.helpers.export_files import random_weights
from vgg_jax import InputError
from vgg_jax.export import ExportSpec, write


@pytest.mark.parametrize(
    ("name", "net", "options", "layout", "message"),
    [
        ("taken.onnx", "A", {}, "vgg_jax", r"taken\.onnx is a folder"),
        ("x.safetensors", "A", {"uint8": False}, "vgg_jax", r"x\.safetensors holds weights only"),
        ("x.onnx", "A", {}, "timm", r"layout is 'timm': expected a \.safetensors file"),
        (
            "x.safetensors",
            "A-LRN",
            {},
            "torchvision",
            "the net is A-LRN, which torchvision does not have",
        ),
        ("none/x.safetensors", "A", {}, "vgg_jax", r"cannot write .*none/x\.safetensors \("),
    ],
    ids=["folder", "float-images", "program-layout", "no-such-net", "missing-folder"],
)
def test_write_rejects(name, net, options, layout, message, tmp_path):
    (tmp_path / "taken.onnx").mkdir()
    with pytest.raises(InputError, match=message):
        write(tmp_path / name, ExportSpec(random_weights(net), **options), layout)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.onnx"]


def test_write_replaces_earlier_file(tmp_path):
    path = tmp_path / "net.safetensors"
    path.write_text("earlier")
    write(path, ExportSpec(random_weights("A")))
    assert path.stat().st_size > 10_000
    assert not list(tmp_path.glob("*.new"))
