"""Descriptions of the images and the classes that another library's net was trained with."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import vgg_jax
from tests.helpers.compare import assert_close_to_largest
from tests.helpers.export_files import RUNNERS
from tests.helpers.photos import make_photo_folder
from tests.helpers.weights_files import (
    FC,
    IMAGE_SIZE,
    TORCHVISION_MEAN,
    TORCHVISION_STD,
    forward,
    photos,
    random_tensors,
    torch_logits,
    torchvision_state,
)
from vgg_jax import InputError, cli
from vgg_jax.weights import read, save

NAMES = tuple(f"class {letter}" for letter in "abcdefghij")
# (x / 255 - 0.5) / 0.5 of BGR images, in Python and on the command line.
SYMMETRIC = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "range": "0-1", "channels": "bgr"}
SYMMETRIC_FLAGS = ["--mean", "0.5", "--std", "0.5", "0.5", "0.5"]
SYMMETRIC_FLAGS += ["--range", "0-1", "--channels", "bgr"]
VGG_FACE = {"mean": (93.594, 104.7624, 129.1863), "channels": "bgr"}


@pytest.fixture(scope="module")
def tensors():
    return random_tensors("A")


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory):
    """A file in torchvision's layout, which does not tell its images."""
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(torchvision_state(tensors, "A"), path)
    return path


def numpy_logits(tensors, x):
    """Logits of images (N, C, H, W) as the net itself reads them, by a convolution in NumPy."""
    stage = 1
    for name, (kernel, bias) in tensors.items():
        if name.startswith("fc") or int(name[4]) > stage:
            if x.ndim == 4:  # max pooling
                n, c, h, w = x.shape
                x = x.reshape(n, c, h // 2, 2, w // 2, 2).max((3, 5))
            stage += 1
        if name.startswith("conv"):
            windows = sliding_window_view(
                np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1))), (3, 3), (2, 3)
            )
            x = np.tensordot(windows, np.float64(kernel), ((1, 4, 5), (1, 2, 3)))
            x = x.transpose(0, 3, 1, 2) + bias[:, None, None]
        else:
            x = x.reshape(len(x), -1) @ kernel.T + bias
        x = x if name == "fc8" else np.maximum(x, 0)
    return x


def loaded_logits(path, **options):
    model, variables, metadata = vgg_jax.load(path, **options)
    mean = np.float32(metadata["preprocessing"]["mean_rgb"])
    return np.asarray(forward(model, variables, photos() - mean))


def bgr(images):
    return images[..., ::-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("description", "prepare"),
    [
        (SYMMETRIC, lambda x: (bgr(x) / 255 - 0.5) / 0.5),
        (VGG_FACE, lambda x: bgr(x) - np.array([93.594, 104.7624, 129.1863])),
        (
            {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "range": "0-1", "channels": "bgr"},
            lambda x: (bgr(x) / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3],
        ),
        (
            {"mean": np.float32([90, 100, 110]), "std": 50},
            lambda x: (x - [90, 100, 110]) / 50,
        ),
        ({"mean": np.array(0), "std": np.array(255.0)}, lambda x: x / 255),
        ("caffe", lambda x: bgr(x) - np.array([103.939, 116.779, 123.68])),
        (None, lambda x: (x - TORCHVISION_MEAN) / TORCHVISION_STD),
    ],
    ids=["-1 to 1", "VGG-Face", "BGR order", "one std", "0 to 1", "caffe", "torchvision"],
)
def test_logits(description, prepare, path, tensors):
    expected = numpy_logits(tensors, prepare(np.float64(photos())).transpose(0, 3, 1, 2))
    assert_close_to_largest(loaded_logits(path, preprocessing=description), expected, 1e-5)


def test_logits_of_torch(path, tensors):
    expected = torch_logits(tensors, 3 * [127.5], 3 * [127.5], bgr=True)
    assert_close_to_largest(loaded_logits(path, preprocessing=SYMMETRIC), expected, 1e-5)


def test_source_says_what_was_assumed(path):
    for description, text in (
        (
            None,
            "images RGB, 0-255, mean (123.675, 116.28, 103.53), std (58.395, 57.12, 57.375) "
            "(assumed from the layout)",
        ),
        (
            SYMMETRIC,
            "images BGR, 0-1, mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5) "
            "(passed: mean, std, range, channels)",
        ),
        (
            VGG_FACE,
            "images BGR, 0-255, mean (93.594, 104.762, 129.186), std (1, 1, 1) "
            "(passed: mean, channels; default: std, range)",
        ),
        (
            "caffe",
            "images BGR, 0-255, mean (103.939, 116.779, 123.68), std (1, 1, 1) (passed: caffe)",
        ),
    ):
        source = vgg_jax.load(path, preprocessing=description)[2]["source"]
        assert source.startswith("A in torchvision's layout")
        assert f"; image size {IMAGE_SIZE}; {text}; classes are numbers" in source
    assert "class names as passed" in vgg_jax.load(path, classes=NAMES)[2]["source"]


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("tf", "preprocessing is 'tf': expected one of caffe, torchvision, or a dict with mean"),
        (5, "preprocessing is 5: expected one of caffe"),
        ({"men": 5, "mean": 5}, "preprocessing has 'men': expected mean, std, range, channels"),
        ({}, "preprocessing without a mean: expected the mean"),
        ({"std": 58, "channels": "bgr"}, "std and channels without a mean: expected the mean"),
        ({"mean": (1, 2)}, r"mean is \(1, 2\): expected one finite number, or .* of 3 channels"),
        ({"mean": None}, "mean is None: expected one finite number"),
        ({"mean": "120"}, "mean is '120': expected one finite number"),
        ({"mean": True}, "mean is True: expected one finite number"),
        ({"mean": (1, 2, float("nan"))}, "nan.*: expected one finite number"),
        ({"mean": 120, "std": (1, float("inf"), 1)}, "std is .*inf.*: expected one finite number"),
        ({"mean": 120, "std": 0}, r"std is \(0.0, 0.0, 0.0\) .*: expected positive numbers"),
        ({"mean": 120, "std": (1, -1, 1)}, "std is .*: expected positive numbers"),
        (
            {"mean": 123, "range": "0-1"},
            "mean is .*123.* range is '0-1': expected numbers from 0 to 1",
        ),
        ({"mean": -123}, "mean is .*-123.* range is '0-255': expected numbers from 0 to 255"),
        ({"mean": 0.5, "std": 58, "range": "0-1"}, "std is .*58.*'0-1': expected .* at most 2"),
        ({"mean": 0.5, "std": 0.5}, "as if the images were in 0-1: expected a range"),
        ({"mean": 0.5}, "as if the images were in 0-1: expected a range"),
        ({"mean": 0}, "as if the images were in 0-1: expected a range"),
        ({"mean": (124, 116, 104), "std": (0.23, 0.22, 0.23)}, "on two scales: expected both"),
        ({"mean": 120, "range": "0-2"}, "range is '0-2': expected one of 0-1, 0-255"),
        ({"mean": 120, "range": (0, 255)}, r"range is \(0, 255\): expected one of 0-1, 0-255"),
        (
            {"mean": 120, "range": np.array("0-1")},
            r"range is array\(.*: expected one of 0-1, 0-255",
        ),
        ({"mean": 120, "channels": "BGR"}, "channels is 'BGR': expected one of rgb, bgr"),
    ],
)
def test_wrong_description(description, message, path):
    with pytest.raises(InputError, match=message):
        vgg_jax.load(path, preprocessing=description)


def test_wrong_image_size(path):
    with pytest.raises(InputError, match="image_size is '224': expected a number of pixels"):
        vgg_jax.load(path, image_size="224")


def test_small_mean_is_right_if_range_is_passed(path):
    mean = read(path, preprocessing={"mean": 0.5, "std": 0.5, "range": "0-255"}).preprocessing
    assert mean.mean_rgb == (0.5, 0.5, 0.5)


def test_layout_of_bgr_needs_channels(tensors, tmp_path):
    """A mean alone has two readings, even if it is the same for all channels."""
    path = tmp_path / "VGG_FACE.safetensors"
    save_file({f"{n}/{i}": a for n, arrays in tensors.items() for i, a in enumerate(arrays)}, path)
    with pytest.raises(
        InputError, match=r"mean is given without channels, and .*caffe's layout re"
    ):
        read(path, preprocessing={"mean": 120})
    mean = np.array([93.594, 104.7624, 129.1863])
    for channels, images in (("bgr", bgr(photos())), ("rgb", photos())):
        x = np.float64(images - mean).transpose(0, 3, 1, 2)
        actual = loaded_logits(path, preprocessing={"mean": mean, "channels": channels})
        assert_close_to_largest(actual, numpy_logits(tensors, x), 1e-5)


def test_file_that_names_its_images(path, tensors, tmp_path):
    own, features = tmp_path / "own.safetensors", tmp_path / "features.safetensors"
    save(own, read(path))
    with pytest.raises(
        InputError, match=r"preprocessing is \{.*\}, and .* names a mean of its own"
    ):
        read(own, preprocessing=SYMMETRIC)
    state = torchvision_state(tensors, "A")
    state |= {n: np.full_like(a, np.nan) for n, a in state.items() if n.startswith("classifier")}
    save_file(state, features)
    with pytest.raises(InputError, match="torchvision's IMAGENET1K_FEATURES: expected no prepro"):
        read(features, preprocessing=SYMMETRIC)
    with pytest.raises(InputError, match=r"preprocessing is \{.*\} and .* is a folder: expected"):
        vgg_jax.load(tmp_path, preprocessing=SYMMETRIC)


def grey_file(tensors, path, **header):
    """A net of one channel, in torchvision's layout."""
    kernel, bias = tensors["conv1_1"]
    grey = tensors | {"conv1_1": [kernel.sum(1, keepdims=True), bias]}
    metadata = {"vgg_jax": json.dumps({"in_channels": 1} | header)}
    save_file(torchvision_state(grey, "A"), path, metadata)
    return grey


@pytest.mark.slow
def test_grey_images(tensors, tmp_path):
    path = tmp_path / "grey.safetensors"
    grey = grey_file(tensors, path)
    for description, message in (
        (None, "has in_channels 1 and names no mean: expected the mean and the std"),
        ("caffe", "preprocessing is 'caffe' and the net's in_channels is 1: expected the mean"),
        ({"mean": (1, 2, 3)}, r"mean is \(1, 2, 3\): expected .* for each of 1 channels"),
        ({"mean": 120, "channels": "bgr"}, "channels is 'bgr' and the net's in_channels is 1"),
    ):
        with pytest.raises(InputError, match=message):
            read(path, preprocessing=description)
    model, variables, metadata = vgg_jax.load(path, preprocessing={"mean": 120, "std": 60})
    assert "images grey, 0-255, mean (120), std (60) (pass" in metadata["source"]
    images = photos()[..., :1]
    expected = numpy_logits(grey, (np.float64(images).transpose(0, 3, 1, 2) - 120) / 60)
    actual = forward(model, variables, images - metadata["preprocessing"]["mean_rgb"])
    assert_close_to_largest(actual, expected, 1e-5)


def test_grey_file_without_std(tensors, tmp_path):
    """torchvision's std, of three channels, made conv1_1 one of three channels."""
    path = tmp_path / "grey.safetensors"
    grey_file(tensors, path, mean_rgb=[120])
    with pytest.raises(InputError, match="names no std_rgb for its 1 channels: expected the metad"):
        read(path)
    grey_file(tensors, path, std_rgb=[60])
    with pytest.raises(InputError, match="names no mean_rgb for its 1 channels: expected the meta"):
        read(path)
    grey_file(tensors, path, mean_rgb=[120], std_rgb=[60])
    assert read(path).params["conv1_1"]["kernel"].shape == (3, 3, 1, 64)


def test_classes(path, tmp_path, capsys):
    own, file = tmp_path / "own.safetensors", tmp_path / "classes.txt"
    save(own, read(path))
    for source in (path, own):
        assert vgg_jax.load(source, classes=list(NAMES))[2]["classes"] == NAMES
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join((*NAMES[:-1], "Käfer", "", "")).encode())
    assert cli.main(["import", str(path), str(own), "--classes", str(file), "--overwrite"]) == 0
    assert read(own).classes == (*NAMES[:-1], "Käfer")
    assert "class names as passed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (NAMES[:-1], "classes has 9 names and the net has 10 classes: expected one name for each"),
        ((*NAMES[:-1], NAMES[0]), "classes has 'class a' more than once: expected another name"),
        ((*NAMES[:-1], ""), "the name of class 9 is empty"),
        (set(NAMES), "classes is .*: expected a list of names"),
        ("abcdefghij", "classes is 'abcdefghij': expected a list of names"),
        (range(10), r"classes is range\(0, 10\): expected a list of names"),
        (10, "classes is 10: expected a list of names"),
    ],
)
def test_wrong_classes(classes, message, path, tensors, tmp_path):
    with pytest.raises(InputError, match=message):
        vgg_jax.load(path, classes=classes)
    convs = {n: a for n, a in torchvision_state(tensors, "A").items() if n.startswith("features")}
    save_file(convs, tmp_path / "convs.safetensors")
    with pytest.raises(InputError, match="no fully connected layers and classes are given"):
        vgg_jax.load(tmp_path / "convs.safetensors", classes=classes)


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_wrong_classes_file(content, path, tmp_path, capsys):
    file = tmp_path / "classes.txt"
    if content:
        file.write_bytes(content)
    command = ["export", str(path), str(tmp_path / "out.safetensors"), "--classes", str(file)]
    assert cli.main(command) == 2
    assert "classes.txt cannot be read as a list of classes (" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["torchvision", "timm"])
def test_foreign_layout_keeps_meaning(layout, path, tmp_path, monkeypatch):
    """The header's mean and std are those of the file's tensors."""
    monkeypatch.setattr("vgg_jax.export.writer._PYTORCH_HEAD", (2, *FC))
    own, back = tmp_path / "own.safetensors", tmp_path / "back.safetensors"
    assert cli.main(["import", str(path), str(own), *SYMMETRIC_FLAGS]) == 0
    assert cli.main(["export", str(own), str(back), "--layout", layout]) == 0
    with safe_open(back, "numpy") as file:
        header = json.loads(file.metadata()["vgg_jax"])
    state = load_file(back)
    values = iter(state[name] for name in sorted(state, key=_position))
    arrays = {name: [next(values), next(values)] for name in random_tensors("A")}
    arrays = {n: [k.reshape(len(k), -1) if n[:2] == "fc" else k, b] for n, (k, b) in arrays.items()}
    x = (np.float64(photos()) - header["mean_rgb"]) / header["std_rgb"]
    actual = numpy_logits(arrays, x.transpose(0, 3, 1, 2))
    expected = loaded_logits(path, preprocessing=SYMMETRIC)
    assert_close_to_largest(actual, expected, 1e-5)
    assert_close_to_largest(loaded_logits(back), expected, 1e-5)
    assert header["std_rgb"] == pytest.approx(TORCHVISION_STD)


def _position(name):
    """Orders the tensors of torchvision and timm by layer; a weight is before its bias."""
    module, _, param = name.rpartition(".")
    group = ("features", "pre_logits", "classifier", "head").index(module.split(".")[0])
    return group, int("".join(filter(str.isdigit, module)) or 0), param == "bias"


@pytest.mark.slow
@pytest.mark.parametrize("file_format", ["onnx", "stablehlo", "savedmodel"])
def test_programs_have_the_description(file_format, path, tmp_path, capsys):
    if file_format == "onnx":
        pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")
    if file_format == "savedmodel":
        pytest.importorskip("tensorflow", reason="needs TensorFlow: pip install '.[savedmodel]'")
    out = tmp_path / f"net.{file_format}"
    assert cli.main(["export", str(path), str(out), *SYMMETRIC_FLAGS]) == 0
    assert "images BGR, 0-1, mean (0.5, 0.5, 0.5)" in capsys.readouterr().out
    actual = RUNNERS[file_format](out, photos().astype(np.uint8))
    assert_close_to_largest(actual, loaded_logits(path, preprocessing=SYMMETRIC), 1e-5)


@pytest.mark.slow
def test_predict_and_evaluate(path, tmp_path, capsys):
    """They give what the imported file gives. JSON on stdout is nothing but JSON."""
    data = Path(make_photo_folder(tmp_path / "photos", train=1, val=1))
    names = tmp_path / "classes.txt"
    classes = sorted(folder.name for folder in (data / "val").iterdir())
    names.write_text("\n".join([*classes, *NAMES[len(classes) :]]))
    flags, own = [*SYMMETRIC_FLAGS, "--classes", str(names)], tmp_path / "own.safetensors"
    assert cli.main(["import", str(path), str(own), *flags]) == 0
    capsys.readouterr()
    center = ["--protocol", "center"]
    lines, errors = [], []
    for file, more in ((path, flags), (own, [])):
        assert cli.main(["predict", str(file), str(data / "val"), "--json", *center, *more]) == 0
        out, err = capsys.readouterr()
        lines.append([json.loads(line) for line in out.splitlines()])
        errors.append(err)
    assert lines[0] == lines[1]
    assert {best["class"] for line in lines[0] for best in line["top"]} <= {*classes, *NAMES}
    assert f"{path}: A in torchvision's layout" in errors[0] and "images BGR" in errors[0]
    assert errors[1] == ""
    results = []
    for file, more in ((path, flags), (own, [])):
        folder = tmp_path / f"out{len(more)}"
        command = ["evaluate", str(file), str(data), "--out", str(folder), *center, *more]
        assert cli.main(command) == 0
        assert ("images BGR, 0-1" in capsys.readouterr().out) == (file is path)
        results.append(json.loads((folder / "evaluation.json").read_text())["loss"])
    assert results[0] == results[1]


def rounding(path, **options):
    return vgg_jax.load(path, **options)[2]["preprocessing"]["rounding"]


def test_rounding_follows_library(path, tensors, tmp_path):
    """PyTorch's nets are cropped as torchvision does, and stay so when they are imported."""
    own = tmp_path / "own.safetensors"
    save(own, read(path))
    assert rounding(path) == rounding(own) == rounding(path, preprocessing=SYMMETRIC)
    assert rounding(path) == "torchvision"
    assert rounding(path, preprocessing="caffe") == "nearest"
    caffe = tmp_path / "caffe.safetensors"
    state = {
        f"{name}.{param}": array
        for name, pair in tensors.items()
        for param, array in zip(("weight", "bias"), pair, strict=True)
    }
    save_file(state, caffe)
    assert rounding(caffe, preprocessing="caffe") == "nearest"
    assert rounding(caffe, preprocessing="torchvision") == "torchvision"
    # A net that was trained here keeps its crop in torchvision's layout.
    save(tmp_path / "t.safetensors", read(caffe, preprocessing="caffe"), "timm")
    assert rounding(tmp_path / "t.safetensors") == "nearest"


def test_rounding_of_older_file(path, tmp_path):
    """It was cropped to the nearest pixel, and still is."""
    own = tmp_path / "own.safetensors"
    save(own, read(path))
    with safe_open(own, "numpy") as file:
        header = json.loads(file.metadata()["vgg_jax"])
    for change, message in (({}, None), ({"rounding": "up"}, "rounding is 'up': expected one of")):
        changed = {name: value for name, value in header.items() if name != "rounding"} | change
        save_file(load_file(own), own, {"vgg_jax": json.dumps(changed)})
        if message is None:
            assert rounding(own) == "nearest"
        else:
            with pytest.raises(InputError, match=message):
                read(own)


def test_import_of_own_file_assumes_nothing(path, tmp_path, capsys):
    save(tmp_path / "own.safetensors", read(path))
    capsys.readouterr()
    command = ["import", str(tmp_path / "own.safetensors"), str(tmp_path / "again.safetensors")]
    assert cli.main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_flags_exclude_each_other(path, tmp_path, capsys):
    flags = ["--preprocessing", "caffe", "--std", "1"]
    assert cli.main(["import", str(path), str(tmp_path / "out.safetensors"), *flags]) == 2
    assert "--preprocessing caffe with --std: expected a name or" in capsys.readouterr().err
