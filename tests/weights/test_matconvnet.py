"""MatConvNet's files, written by scipy or byte by byte."""

import time

import numpy as np
import pytest

from tests.helpers.compare import assert_close_to_largest
from tests.helpers.weights_files import (
    assert_maps_back,
    logits,
    mat_array_head,
    mat_element,
    mat_file,
    pack,
    random_tensors,
    torch_logits,
)
from vgg_jax import InputError
from vgg_jax.weights import matconvnet, read
from vgg_jax.weights.matconvnet import ARRAY, CELL, STRUCT, TEXT, ArrayBudget

OPAQUE = 17  # a class of arrays that is not read


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "net"),
    [("weights", "D"), pytest.param("weights", "E", marks=pytest.mark.slow), ("filters", "D")],
)
def test_matconvnet_layout(style, net, tmp_path):
    io = pytest.importorskip("scipy.io", reason="needs scipy")
    tensors, path = random_tensors(net), tmp_path / "imagenet-vgg-verydeep.mat"
    layers, written = [], {}
    for name, (kernel, bias) in tensors.items():
        if name.startswith("fc"):
            window = 2 if name == "fc6" else 1
            kernel = kernel.reshape(len(kernel), -1, window, window)
        filters = kernel.transpose(2, 3, 1, 0)
        written[name] = filters, bias
        pair = np.empty((1, 2), object)
        pair[0, 0], pair[0, 1] = filters, bias[None]
        arrays = (
            {"weights": pair} if style == "weights" else {"filters": filters, "biases": bias[None]}
        )
        layers += [
            {"name": name, "type": "conv", **arrays},
            {"name": name.replace("conv", "relu"), "type": "relu"},
        ]
    cells = np.empty((1, len(layers)), object)
    cells[0] = layers
    metadata = {"normalization": {"averageImage": np.array([[[100.0, 110.0, 120.0]]])}}
    if style == "weights":
        metadata = {"meta": metadata}
    io.savemat(path, {"layers": cells, **metadata})
    assert_maps_back(path, "matconvnet", written)
    assert read(path).net == net
    assert read(path).preprocessing.mean_rgb == (100, 110, 120)
    assert_close_to_largest(logits(path), torch_logits(tensors, (100, 110, 120)))


@pytest.mark.parametrize("compressed", [False, True])
def test_parse_array_equals_scipy(compressed, tmp_path):
    """Numbers of every type, whole numbers stored as smaller types, text, cells, structures."""
    io = pytest.importorskip("scipy.io", reason="needs scipy")
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 100, (3, 4, 2)).astype(dtype) for dtype in matconvnet.DTYPES.values()]
    arrays += [rng.normal(size=(1, 5)), np.zeros((0, 3))]
    cells = np.empty((2, 3), object)
    for i in range(6):
        cells[i % 2, i // 2] = np.float32(i)
    values = {f"x{i}": array for i, array in enumerate(arrays)}
    values |= {"text": "conv1_1", "cells": cells, "struct": {"a": 1.5, "b": "two"}}
    values["complex"] = np.array([[1 + 2j]])
    io.savemat(tmp_path / "x.mat", values, do_compression=compressed)
    data = memoryview((tmp_path / "x.mat").read_bytes())[128:]
    parsed = dict(
        matconvnet.parse_array(content, 1, ArrayBudget(1000))
        for content in matconvnet.iter_arrays(data, 10**6)
    )
    expected = io.loadmat(tmp_path / "x.mat")
    for name in (f"x{i}" for i in range(len(arrays))):
        assert parsed[name].dtype == expected[name].dtype
        assert parsed[name].shape == expected[name].shape
        np.testing.assert_array_equal(parsed[name], expected[name])
    assert parsed["text"] == expected["text"].item() == "conv1_1"
    assert [value.item() for value in parsed["cells"]] == [0, 1, 2, 3, 4, 5]
    assert [value.item() for value in expected["cells"].ravel("F")] == [0, 1, 2, 3, 4, 5]
    assert (parsed["struct"][0]["a"].item(), parsed["struct"][0]["b"]) == (1.5, "two")
    assert parsed["complex"] is None


def test_parse_array_skips_opaque_class():
    content = mat_element(6, pack(OPAQUE, 0)) + mat_element(1, b"string")
    assert matconvnet.parse_array(memoryview(content), 1, ArrayBudget(9)) == ("", None)


def test_matconvnet_rejects_many_compressed(tmp_path):
    """Each compressed array is small enough by itself."""
    io = pytest.importorskip("scipy.io", reason="needs scipy")
    arrays = {f"x{i}": np.zeros(10**5) for i in range(20)}
    io.savemat(tmp_path / "bomb.mat", arrays, do_compression=True)
    with pytest.raises(InputError, match="unpacks to more than"):
        read(tmp_path / "bomb.mat")


EMPTY_CELL = mat_element(ARRAY, mat_array_head(CELL, (0, 0)))
FULL_CELLS = mat_array_head(CELL, (2000, 1))
ELEVEN_CELLS = mat_array_head(CELL, (11, 1), b"meta")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (mat_array_head(CELL, [2**30] * 250_000, b"meta"), "expected 2 to 8 non-negative sides"),
        (
            mat_array_head(STRUCT, (2000, 1), b"meta")
            + mat_element(5, pack(1))
            + mat_element(1, b""),
            "field names, 1 per name",
        ),
        (
            mat_array_head(TEXT, (1, 1), b"meta") + mat_element(1, bytes(9000)),
            "9,000 bytes of text for 1 characters",
        ),
        (
            ELEVEN_CELLS + 11 * mat_element(ARRAY, FULL_CELLS + 2000 * mat_element(ARRAY, b"")),
            "too many arrays: expected at most 20,000",
        ),
        (
            ELEVEN_CELLS + 11 * mat_element(ARRAY, FULL_CELLS + 2000 * EMPTY_CELL),
            "too many arrays: expected at most 20,000",
        ),
        (
            mat_array_head(6, (16_000, 1500), b"meta") + mat_element(1, bytes(16_000 * 1500)),
            "too many arrays: expected at most 20,000",
        ),
    ],
    ids=["sides", "names", "text", "no-content", "empty-cells", "growing-numbers"],
)
def test_matconvnet_rejects_huge_arrays(array, message, tmp_path):
    """They are rejected within two seconds of computing."""
    (tmp_path / "x.mat").write_bytes(mat_file(mat_element(ARRAY, array)))
    start = time.process_time()
    with pytest.raises(InputError, match=message):
        read(tmp_path / "x.mat")
    assert time.process_time() - start < 2


def test_matconvnet_rejects_deep_nesting(tmp_path):
    cells = b""
    for _ in range(20):  # a cell array of one cell, which holds the previous one
        cells = mat_element(ARRAY, mat_array_head(CELL, (1, 1), b"layers") + cells)
    (tmp_path / "deep.mat").write_bytes(mat_file(cells))
    with pytest.raises(InputError, match="nested more than 12 deep"):
        read(tmp_path / "deep.mat")


def test_matconvnet_rejects_big_endian(tmp_path):
    (tmp_path / "big.mat").write_bytes(b"MATLAB".ljust(124) + b"\x01\x00MI" + bytes(64))
    with pytest.raises(InputError, match="is big-endian"):
        read(tmp_path / "big.mat")
