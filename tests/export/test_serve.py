"""The programs of `experiments/examples` answer as `vgg-jax predict` does, without vgg_jax."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers.corrupt_images import CORRUPT
from tests.helpers.export_files import (
    CLASSES,
    RUNNERS,
    require_onnx,
    undecided_weights,
)
from tests.helpers.image_files import UNUSUAL, encode_in_mode
from tests.helpers.pages import ROOT
from tests.helpers.tiny import narrow
from tests.helpers.tiny_data import encode_with_exif, noise
from vgg_jax import CONFIGS
from vgg_jax.configs.evaluation import ROUNDINGS, EvalProtocol
from vgg_jax.evaluation.predict import predict
from vgg_jax.export import ExportSpec, write
from vgg_jax.weights import save

PROTOCOLS = {"logits": "center", "posteriors": "dense"}  # by output of the file


def make_photos(folder):
    """Photos of odd sizes, of each usual mode, one that is turned, and files that are none."""
    rng = np.random.default_rng(0)
    files = [folder / f"{i}.png" for i in range(6)]
    for file in files:
        Image.fromarray(noise(*rng.integers(20, 90, 2))).save(file)
    for mode in ("L", "P", "RGBA"):
        files.append(folder / f"{mode}.png")
        Image.fromarray(noise(41, 64)).convert(mode).save(files[-1])
    contents = {
        "sixteen bits.png": UNUSUAL["sixteen_bits.png"],
        "cmyk.jpg": encode_in_mode("CMYK", "JPEG"),  # as Adobe's files, inverted
        "cmyk.tif": encode_in_mode("CMYK", "TIFF"),
        "floats.tif": encode_in_mode("F", "TIFF"),
        "cut.jpg": CORRUPT["cut.jpg"],
        "turned.jpg": encode_with_exif(6),
    }
    for name, content in contents.items():
        files.append(folder / name)
        files[-1].write_bytes(content)
    return [*map(str, files), str(folder / "missing.jpg")]


def check_answers(file_format, spec, photos, folder, monkeypatch):
    """Exports a net, runs the program on the photos, and compares with `predict`."""
    monkeypatch.setitem(CONFIGS, "A", narrow("A"))
    path, weight_file = folder / f"net.{file_format}", folder / "net.safetensors"
    write(path, spec)
    save(weight_file, spec.weights)
    command = [sys.executable, "-m", f"experiments.examples.serve_{file_format}", str(path)]
    process = subprocess.run(
        [*command, *photos], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    protocol = EvalProtocol(PROTOCOLS[spec.output])
    predictions = list(predict(weight_file, photos, protocol=protocol))
    assert [line["file"] for line in lines] == [prediction.file for prediction in predictions]
    found = []
    for line, prediction in zip(lines, predictions, strict=True):
        assert ("error" in line) == (prediction.error is not None)
        if "error" in line:
            continue
        actual = {best["class"]: best["probability"] for best in line["top"]}
        expected = dict(prediction.top)
        np.testing.assert_allclose(
            [actual[name] for name in CLASSES], [expected[name] for name in CLASSES], atol=1e-3
        )
        found.append(list(expected.values()))
    assert np.max(found) - np.min(found) > 0.1  # the answers differ


@pytest.mark.integration
@pytest.mark.parametrize("output", PROTOCOLS)
@pytest.mark.parametrize("file_format", RUNNERS)
def test_serve_program(file_format, output, tmp_path, monkeypatch):
    if file_format == "onnx":
        require_onnx()
    rounding = ROUNDINGS[output == "logits"]
    spec = ExportSpec(undecided_weights(rounding), output, uint8=file_format != "onnx")
    check_answers(file_format, spec, make_photos(tmp_path), tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("output", PROTOCOLS)
@pytest.mark.parametrize("file_format", RUNNERS)
def test_serve_program_real_photos(file_format, output, shared_data, tmp_path, monkeypatch):
    if file_format == "onnx":
        require_onnx()
    rounding = ROUNDINGS[output == "posteriors"]
    spec = ExportSpec(undecided_weights(rounding, size=64), output)
    files = sorted(shared_data.glob("imagenet-sample/*/*.JPEG"))[::17]
    files += sorted(shared_data.glob("ants-bees/val/*/*"))[::10]
    check_answers(file_format, spec, list(map(str, files)), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "name", ["photo", *(f"serve_{name}" for name in (*RUNNERS, "torchvision"))]
)
def test_program_needs_no_vgg_jax(name):
    text = (ROOT / "experiments" / "examples" / f"{name}.py").read_text()
    assert "import vgg_jax" not in text and "from vgg_jax" not in text
    code = text.split('"""', 2)[2]
    assert name == "photo" or len([line for line in code.splitlines() if line.strip()]) <= 20
