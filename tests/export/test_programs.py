"""Exported programs: their own runtimes compute the outputs of the net."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers.compare import assert_close_to_largest
from tests.helpers.export_files import (
    RUNNERS,
    own_output,
    random_images,
    random_weights,
    require_onnx,
    run_onnx,
)
from tests.helpers.tiny import init
from vgg_jax import IMAGENET, InputError
from vgg_jax.export import ExportSpec, write
from vgg_jax.export.verify import TOLERANCE, verify

# How each runtime says that images have the wrong size.
REFUSALS = {
    "onnx": "Got invalid dimensions for input|is_at_least_size_of_net",
    "savedmodel": "has_size_of_net|is_at_least_size_of_net",
    "stablehlo": "Shape mismatch|Error refining shapes",
}


@pytest.fixture(params=RUNNERS)
def file_format(request):
    if request.param == "onnx":
        require_onnx()
    return request.param


@pytest.mark.slow
@pytest.mark.parametrize(
    "net",
    [*(pytest.param(net, marks=pytest.mark.slow) for net in ("A", "A-LRN", "B", "D", "E")), "C"],
)
def test_onnx_every_net(net, tmp_path):
    require_onnx()
    spec, images = ExportSpec(random_weights(net)), random_images(3, 32, 32)
    write(tmp_path / "net.onnx", spec)
    assert_close_to_largest(run_onnx(tmp_path / "net.onnx", images), own_output(spec, images))


@pytest.mark.slow
@pytest.mark.parametrize(
    "output", ["posteriors", pytest.param("score_map", marks=pytest.mark.slow)]
)
def test_program_any_size_and_batch(file_format, output, tmp_path):
    spec = ExportSpec(random_weights("A", batch_norm=True), output)
    path = tmp_path / f"net.{file_format}"
    write(path, spec)
    for shape in ((1, 32, 32), (2, 33, 70)):
        images = random_images(*shape)
        expected = own_output(spec, images)
        assert expected.shape == (
            (shape[0], 1, shape[2] // 32, 3) if output == "score_map" else (shape[0], 3)
        )
        assert_close_to_largest(RUNNERS[file_format](path, images), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("output", "channels"),
    [("logits", 1), pytest.param("posteriors", 5, marks=pytest.mark.slow)],
)
def test_program_other_channels(file_format, output, channels, tmp_path):
    """With average pooling, which no other program has."""
    weights = random_weights("A", channels=channels)
    weights = dataclasses.replace(weights, model=weights.model.clone(pool="avg"))
    spec = ExportSpec(weights, output)
    path, images = tmp_path / f"net.{file_format}", random_images(2, 32, 32, channels=channels)
    write(path, spec)
    assert_close_to_largest(RUNNERS[file_format](path, images), own_output(spec, images))
    assert verify(path)[1] < TOLERANCE


@pytest.mark.slow
def test_program_float_images_and_bfloat16_weights(file_format, tmp_path):
    """With bfloat16 the output is that of rounded weights, and the file has half the size."""
    spec = ExportSpec(random_weights("A-LRN"), uint8=False, bfloat16=True)
    images = random_images(2, 32, 32).astype(np.float32) - np.float32(IMAGENET.mean_rgb)
    params = spec.weights.params
    path, full = tmp_path / f"net.{file_format}", tmp_path / f"full.{file_format}"
    write(path, spec)
    rounded = jax.tree.map(lambda x: x.astype(spec.dtype).astype(np.float32), params)
    expected = np.asarray(jax.jit(spec.weights.model.apply)({"params": rounded}, images))
    assert_close_to_largest(RUNNERS[file_format](path, images), expected)
    full_spec = dataclasses.replace(spec, bfloat16=False)
    write(full, full_spec)
    assert_close_to_largest(RUNNERS[file_format](full, images), own_output(full_spec, images))
    saved = size_on_disk(full) - size_on_disk(path)
    assert saved > 0.8 * 2 * sum(array.size for array in jax.tree.leaves(params))


@pytest.mark.slow
def test_onnx_float16(tmp_path):
    """Half the size, the same images and output types, and nearly the same output."""
    require_onnx()
    weights = random_weights("D")
    weights = dataclasses.replace(weights, params=init(weights.model)["params"])
    path, full = tmp_path / "half.onnx", tmp_path / "full.onnx"
    images = random_images(2, 33, 40)
    for output in ("posteriors", "score_map"):
        spec = ExportSpec(weights, output)
        write(full, spec, overwrite=True)
        write(path, dataclasses.replace(spec, float16=True), overwrite=True)
        actual = run_onnx(path, images)
        assert actual.dtype == np.float32
        assert_close_to_largest(actual, own_output(spec, images), 1e-2)
        assert np.abs(actual - run_onnx(full, images)).max() > 0
        assert path.stat().st_size < 0.6 * full.stat().st_size


def test_float16_needs_small_activations(tmp_path):
    weights = random_weights("A")
    conv1 = {name: 1000 * array for name, array in weights.params["conv1_1"].items()}
    large = dataclasses.replace(weights, params={**weights.params, "conv1_1": conv1})
    with pytest.raises(InputError, match="exceed 65504, the largest number of float16"):
        write(tmp_path / "net.onnx", ExportSpec(large, float16=True))
    for net, batch_norm, more, message in (
        ("A", True, {}, "batch normalisation, whose variances .* pass --fold-batch-norm"),
        ("A-LRN", False, {}, "the net is A-LRN, whose squared activations"),
        ("A", False, {"bfloat16": True}, "float16 and bfloat16 are both set"),
    ):
        with pytest.raises(InputError, match=message):
            ExportSpec(random_weights(net, batch_norm), float16=True, **more)


def size_on_disk(path):
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["logits", "posteriors"])
def test_program_refuses_other_sizes(file_format, output, tmp_path):
    """Also those with the right number of pixels, or of positions of pool5."""
    spec, path = ExportSpec(random_weights("A", size=64), output), tmp_path / f"net.{file_format}"
    write(path, spec)
    sizes = [(1, 1), (64, 1), (32, 32), (63, 80), (80, 63), (32, 128)]
    larger = [(100, 80), (70, 70), (64, 65)]
    for size in sizes + larger * (output == "logits"):
        with pytest.raises(Exception, match=REFUSALS[file_format]):
            RUNNERS[file_format](path, random_images(2, *size))
    for size in [(64, 64), *larger * (output == "posteriors")]:
        images = random_images(2, *size)
        assert_close_to_largest(RUNNERS[file_format](path, images), own_output(spec, images))
