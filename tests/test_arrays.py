"""Images and labels in memory: what is refused, and the crops against those of files."""

import dataclasses
import os
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest

import vgg_jax
from tests.helpers.tiny_data import TINY_TRAIN, encode, noise
from vgg_jax import IMAGENET, InputError, cli
from vgg_jax.array_batches import (
    crop_function,
    epoch_order,
    eval_batches,
    measure_colours,
    rescaled_images,
    train_batches,
)
from vgg_jax.arrays import (
    check_arrays,
    default_settings,
    open_npz_split,
    read_npz,
    train_val_sources,
    whole_source,
)
from vgg_jax.configs.evaluation import ROUNDINGS
from vgg_jax.input_data import open_train_val, resolve_config, split_names

IMAGES = np.stack([noise(20, 30, seed) for seed in range(13)])
LABELS = np.arange(13) % 3


def source_arrays():
    return check_arrays(IMAGES, LABELS, "x")


def source_of(images=IMAGES, labels=LABELS):
    return whole_source(check_arrays(images, labels, "x"), "x train")


@pytest.mark.parametrize(
    "images, message",
    [
        (IMAGES / 255, r"float64 from 0 to 1: .*pass np.round\(images \* 255\).astype"),
        (np.float32(IMAGES) * 0.9, "float32 from .*: expected uint8 from 0 to 255; pass np.round"),
        (IMAGES - 128.0, "the mean not subtracted"),
        (np.where(IMAGES > 9, np.nan, 9.0), "hold NaN or infinity"),
        (np.int64(IMAGES) * 2, "int64 from .* expected uint8 from 0 to 255"),
        (IMAGES > 9, "of type bool: expected uint8"),
        (np.moveaxis(IMAGES, -1, 1), r"channels last; pass np.moveaxis\(images, 1, -1\)"),
        (IMAGES[..., [0, 1, 2, 0]], r"have the shape \(13, 20, 30, 4\): expected uint8 \(N, H, W"),
        (IMAGES[0, 0], r"have the shape \(30, 3\)"),
        (IMAGES[:0], "expected at least one image"),
        ([IMAGES[0], IMAGES[0, :9]], "are no array .*: expected uint8"),
        ([object()] * 13, r"are Python objects \(object\), perhaps with missing values"),
    ],
    ids=lambda value: None if isinstance(value, str) else "images",
)
def test_wrong_images_are_refused(images, message):
    with pytest.raises(InputError, match=f"the images of mine.*{message}"):
        check_arrays(images, LABELS, "mine")


@pytest.mark.parametrize(
    "labels, message",
    [
        (LABELS - 1, "from -1 to 1: expected numbers from 0 to K - 1"),
        (LABELS + 0.5, "no whole numbers, or hold NaN"),
        (np.where(LABELS, np.nan, 1.0), "no whole numbers, or hold NaN"),
        (np.where(LABELS, np.inf, 1.0), "no whole numbers, or hold NaN or infinity"),
        (
            np.array(["ant", None] * 6, object),
            r"Python objects \(NoneType, str\), perhaps",
        ),
        (LABELS * 10_000, r"with 3 different values: .*pass np.unique\(labels, return_inverse"),
        (np.eye(3)[LABELS], r"have the shape \(13, 3\): .*pass labels.argmax\(1\)"),
        (3, r"have the shape \(\): expected class numbers"),
        ([[1], [2, 3]], "are no array"),
        (LABELS * 1j, "of type complex128"),
    ],
    ids=lambda value: None if isinstance(value, str) else "labels",
)
def test_wrong_labels_are_refused(labels, message):
    with pytest.raises(InputError, match=f"the labels of mine.*{message}"):
        check_arrays(IMAGES, labels, "mine")


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="mine: 13 images and 12 labels; expected one label"):
        check_arrays(IMAGES, LABELS[1:], "mine")
    with pytest.raises(InputError, match="from 0 to 2: expected numbers from 0 to 1"):
        check_arrays(IMAGES, LABELS, "mine", ["a", "b"])
    with pytest.raises(InputError, match="'wasp': expected some of the 2 classes, such as 'ant'"):
        check_arrays(IMAGES, ["wasp"] * 13, "mine", ["ant", "bee"])
    with pytest.raises(InputError, match=r"the classes of mine are <U3 \(1, 2\): expected one"):
        check_arrays(IMAGES, LABELS, "mine", [["ant", "bee"]])
    one_class = check_arrays(IMAGES, LABELS * 0, "mine")
    with pytest.raises(InputError, match="all labels of mine are '0': expected at least two"):
        train_val_sources(one_class, None, "mine")
    with pytest.raises(InputError, match=r"the validation labels of mine are up to 2: .* 0 to 1"):
        train_val_sources(check_arrays(IMAGES, LABELS % 2, "x"), source_arrays(), "mine")
    one_each = check_arrays(IMAGES, np.arange(13), "mine")
    with pytest.raises(InputError, match=r"no image of mine train can be held out .* 13 class"):
        train_val_sources(one_each, None, "mine")


def test_arrays_are_converted(caplog):
    expected = check_arrays(IMAGES, LABELS, "x")
    assert expected.classes == ("0", "1", "2")
    for images in (np.float32(IMAGES), np.int64(IMAGES), IMAGES.tolist(), jax.numpy.array(IMAGES)):
        np.testing.assert_array_equal(check_arrays(images, LABELS, "x").images, IMAGES)
    for labels in (LABELS[:, None], LABELS.astype(float), LABELS.tolist(), np.uint8(LABELS)):
        np.testing.assert_array_equal(check_arrays(IMAGES, labels, "x").labels, LABELS)
    names = np.array(["bee", "ant", "wasp"])[LABELS]
    objects = (names.astype(object), names.astype("S").astype(object))  # of pandas, of h5py
    for labels in (names, names.astype("S"), names.tolist(), *objects):
        arrays = check_arrays(IMAGES, labels, "x")
        assert arrays.classes == ("ant", "bee", "wasp")
        assert arrays.labels[:3].tolist() == [1, 0, 2]
    for grey in (IMAGES[..., 0], IMAGES[..., :1]):
        assert check_arrays(grey, LABELS, "x").images.shape == (13, 20, 30, 1)
    for classes in (names[:3], names[:3].astype("S"), names[:3].astype(object), names[:3].tolist()):
        arrays = check_arrays(IMAGES, LABELS, "x", classes)
        assert arrays.classes == ("bee", "ant", "wasp")
        assert set(map(type, arrays.classes)) == {str}
    assert not caplog.text
    check_arrays(IMAGES // 255, LABELS, "x")
    assert "from 0 to 1, all but black" in caplog.text


def test_held_out_part_of_arrays():
    arrays = check_arrays(IMAGES, LABELS, "x")
    train, validation = train_val_sources(arrays, None, "x", validation_fraction=0.3)
    assert sorted([*train.indices, *validation.indices]) == list(range(13))
    assert np.bincount(validation.labels).tolist() == [2, 1, 1]
    assert train.storage == validation.storage
    assert validation.file_name(7) == "x train 7"
    other = train_val_sources(check_arrays(IMAGES + 1, LABELS, "x"), None, "x")[0]
    assert other.storage != train.storage


def batches_of_files(folder, images, config):
    """The batches that TensorFlow makes of the same images as files."""
    from vgg_jax.data import eval_batches, open_split

    for i, image in enumerate(images):
        path = folder / "ab"[i >= 7] / f"{i:02d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(image))
    return list(eval_batches(open_split(str(folder), "train"), config, 5))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(20, 30), (45, 61), (33, 32)])
def test_centre_crops_equal_those_of_files(shape, tmp_path):
    images = np.stack([noise(*shape, seed) for seed in range(13)])
    expected = batches_of_files(tmp_path, images, TINY_TRAIN)
    crop = crop_function(TINY_TRAIN, IMAGENET)
    actual = list(eval_batches(source_of(images), 5))
    assert len(actual) == len(expected) == 3
    for one, other in zip(actual, expected, strict=True):
        assert one["index"].tolist() == other["index"].tolist()
        assert one["mask"].tolist() == other["mask"].tolist()
        cropped = np.asarray(crop({k: v for k, v in one.items() if k != "index"})["image"])
        difference = np.abs(cropped.astype(int) - other["image"])
        assert difference.max() <= 1 and np.mean(difference > 0) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rescaled_images_equal_those_of_files(rounding, tmp_path):
    from vgg_jax.data import open_split
    from vgg_jax.data import rescaled_images as rescaled_files

    batches_of_files(tmp_path, IMAGES, TINY_TRAIN)
    files = rescaled_files(open_split(str(tmp_path), "train"), (33, 25), True, rounding)
    arrays = rescaled_images(source_of(), (33, 25), rounding)
    for actual, expected in zip(arrays, files, strict=True):
        assert actual["index"] == expected["index"]
        for one, other in zip(actual["scaled"], expected["scaled"], strict=True):
            assert one.shape == other.shape
            assert np.abs(one.astype(int) - other).max() <= 1
    with pytest.raises(InputError, match="images of 20x30 pixels have more than"):
        next(rescaled_images(source_of(), (5000,)))


def test_colours_equal_those_of_files(tmp_path):
    from vgg_jax.data import measure_colours as measure_files
    from vgg_jax.data import open_split

    batches_of_files(tmp_path, IMAGES, TINY_TRAIN)
    expected = vars(measure_files(open_split(str(tmp_path), "train")))
    for name, value in vars(measure_colours(source_of())).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-9, err_msg=name)
    grey = measure_colours(source_of(IMAGES[..., 1]))
    np.testing.assert_allclose(grey.pixel_mean, IMAGES[..., 1].mean())


def training_batches(config, images=IMAGES, **position):
    crop = crop_function(config, IMAGENET)
    result = []
    for batch in train_batches(source_of(images, LABELS), config, **position):
        cropped = crop({name: array for name, array in batch.items() if name != "index"})
        result.append({name: np.asarray(array) for name, array in cropped.items()} | batch)
    return result


def test_training_batches_resume():
    batches = training_batches(TINY_TRAIN)
    assert len(batches) == 3 * 4
    for epoch in range(3):
        part = batches[4 * epoch : 4 * epoch + 4]
        indices = np.concatenate([batch["index"] for batch in part])
        assert sorted(indices) == [-1, -1, -1, *range(13)]
        for batch in part:
            assert not batch["image"][~batch["mask"]].any()
            expected = np.where(batch["mask"], batch["index"] % 3, 0)
            np.testing.assert_array_equal(batch["label"], expected)
    for epoch, first in ((0, 2), (1, 0), (2, 3)):
        resumed = training_batches(TINY_TRAIN, first_epoch=epoch, first_batch=first)
        for actual, expected in zip(resumed, batches[4 * epoch + first :], strict=True):
            for name in expected:
                np.testing.assert_array_equal(actual[name], expected[name], name)
    rows = training_batches(TINY_TRAIN, rows=np.array([1, 3]))
    for part, whole in zip(rows, batches, strict=True):
        for name in whole:
            np.testing.assert_array_equal(part[name], whole[name][[1, 3]], name)


@pytest.mark.slow
def test_training_crops_are_crops_of_the_rescaled_image():
    """Each is at some offset of the rescaled image, mirrored or not. All offsets occur."""
    images = np.repeat(noise(20, 30)[None], 13, 0)
    config = dataclasses.replace(TINY_TRAIN, scale=(36,), epochs=40, colour_shift=0.0)
    (rescaled,) = next(rescaled_images(source_of(images), (36,)))["scaled"]
    rescaled = rescaled[0].astype(int)
    assert rescaled.shape == (36, 54, 3)
    found = []
    for batch in training_batches(config, images):
        for crop in batch["image"][batch["mask"]].astype(int):
            differences = {
                (y, x, mirrored): np.abs(
                    rescaled[y : y + 32, x : x + 32] - (crop[:, ::-1] if mirrored else crop)
                ).max()
                for y in range(5)
                for x in range(23)
                for mirrored in (False, True)
            }
            best = min(differences, key=differences.get)
            assert differences[best] <= 1
            found.append(best)
    ys, xs, flips = map(np.array, zip(*found, strict=True))
    assert np.bincount(ys).min() > 60 and set(xs) == set(range(23))  # 104 and 23 expected of 520
    assert abs(flips.mean() - 0.5) < 0.1


def test_draws_depend_on_the_configuration():
    centre = dataclasses.replace(
        TINY_TRAIN, crop="centre", flip=False, colour_shift=0.0, scale=(36,), epochs=1
    )
    cropped = crop_function(centre, IMAGENET)
    (whole,) = eval_batches(source_of(), 13)
    expected = np.asarray(cropped({k: v for k, v in whole.items() if k != "index"})["image"])
    for batch in training_batches(centre):
        mask = batch["mask"]
        np.testing.assert_array_equal(batch["image"][mask], expected[batch["index"][mask]])
    shifted = training_batches(dataclasses.replace(TINY_TRAIN, epochs=40))
    shifts = np.concatenate([batch["colour_shift"][batch["mask"]] for batch in shifted])
    assert len(np.unique(shifts, axis=0)) == len(shifts) == 520
    basis = np.array(IMAGENET.eigenvectors)
    alphas = shifts @ basis / np.sqrt(IMAGENET.eigenvalues)
    np.testing.assert_allclose(alphas.std(0), 0.1, rtol=0.15)
    np.testing.assert_allclose(alphas.mean(0), 0, atol=0.02)


def test_orders_of_epochs_do_not_correlate():
    places = np.stack([np.argsort(epoch_order(45_000, 0, epoch)) for epoch in range(8)])
    assert np.abs(np.corrcoef(places) - np.eye(8)).max() < 5 / np.sqrt(45_000)
    # Printed once: another version of numpy must not change the order of a resumed run.
    assert epoch_order(8, 3, 1).tolist() == [3, 0, 4, 6, 2, 7, 1, 5]


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize(
    "keys",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
        ("X_train", "Y_train", "X_test", "Y_test"),
        ("images", "labels", "test_images", "test_labels"),
    ],
)
def test_npz_splits(keys, tmp_path):
    labels = np.uint8(LABELS)[:, None]
    values = (IMAGES, labels, IMAGES[:4], labels[:4])
    path = save(tmp_path / "x.npz", **dict(zip(keys, values, strict=True)))
    splits = read_npz(path)
    assert {name: len(split.labels) for name, split in splits.items()} == {"train": 13, "test": 4}
    assert open_npz_split(path, "test").size == 4
    with pytest.raises(InputError, match=r"has no split 'val': expected one of train, test"):
        open_npz_split(path, "val")


def test_npz_with_validation_and_class_names(tmp_path):
    values = {"train_images": IMAGES, "train_labels": LABELS, "val_images": IMAGES[:2]}
    path = save(tmp_path / "x.npz", **values, val_labels=LABELS[:2], classes=["a", "b", "c", "d"])
    assert read_npz(path)["validation"].classes == ("a", "b", "c", "d")
    assert open_npz_split(path, "valid").size == 2
    path = save(tmp_path / "y.npz", **values, val_labels=LABELS[:2], classes=[b"a", b"b", b"c"])
    assert read_npz(path)["validation"].classes == ("a", "b", "c")


def test_npz_classes_are_those_of_the_training(tmp_path):
    names = np.array(["a", "b", "c"])
    values = {"x": IMAGES, "y": names[LABELS], "x_val": IMAGES[:2], "y_val": names[:2]}
    path = save(tmp_path / "x.npz", **values, x_test=IMAGES, y_test=["d"] * 13)
    splits = read_npz(path, ["train", "validation"])
    assert [split.classes for split in splits.values()] == [("a", "b", "c")] * 2
    with pytest.raises(InputError, match="npz test have 'd': expected some of the 3 classes"):
        open_npz_split(path, "test")


def test_npz_small_splits_of_many_classes(tmp_path):
    images, numbers = np.full((100, 2, 2), 9, np.uint8), [3, 50, 99]
    test = {"x_test": images[:3], "y_test": numbers}
    with_train = save(tmp_path / "x.npz", x_train=images, y_train=np.arange(100), **test)
    for path in (with_train, save(tmp_path / "test.npz", **test)):
        source = open_npz_split(path, "test")
        assert source.labels.tolist() == numbers
        assert source.classes == tuple(map(str, range(100)))
    path = save(tmp_path / "dates.npz", x_test=images, y_test=np.arange(100) + 20_240_101)
    with pytest.raises(InputError, match=r"from 20240101 to .*: expected numbers from 0 to 99"):
        open_npz_split(path, "test")


def test_npz_training_does_not_read_the_test_split(tmp_path):
    """Test labels of -1 are common, where only the authors of the data know them."""
    values = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES, "y_test": LABELS * 0 - 1}
    path = save(tmp_path / "x.npz", **values)
    config, arrays = resolve_config(path, None, None, {})
    train, validation = open_train_val(config, arrays=arrays, version=2)
    assert train.size + validation.size == 13
    assert split_names(path, data_dir=None, download=False) == ("train", "test")
    with pytest.raises(InputError, match=r"the labels of .*npz test are from -1 to -1"):
        open_npz_split(path, "test")


def test_npz_that_cannot_be_used(tmp_path):
    path = save(tmp_path / "x.npz", pixels=IMAGES, targets=LABELS)
    with pytest.raises(InputError, match=r"has the arrays pixels, targets: .* x_train and y_train"):
        read_npz(path)
    path = save(tmp_path / "x.npz", images=np.array([IMAGES[0], None], object), labels=[0, 1])
    with pytest.raises(InputError, match=r"or holds Python objects\): .* numbers or texts"):
        read_npz(path)
    for name, content in {"text": b"hello", "cut": (tmp_path / "x.npz").read_bytes()[:99]}.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
        with pytest.raises(InputError, match=f"{name}.npz' cannot be read"):
            read_npz(tmp_path / f"{name}.npz")
    np.save(tmp_path / "one.npy", IMAGES)
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(InputError, match="it holds a single array"):
        read_npz(tmp_path / "one.npz")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps({"images": 1}))
    with pytest.raises(InputError, match=r"pickle.npz' cannot be read \(it is no .npz file"):
        read_npz(tmp_path / "pickle.npz")
    with pytest.raises(InputError, match=r"no file .*missing.npz"):
        read_npz(tmp_path / "missing.npz")


def test_default_settings_follow_the_size():
    assert default_settings(np.empty((1, 28, 28))) == default_settings(np.empty((1, 32, 32, 3)))
    assert default_settings(IMAGES)["scale"] == (32, 40)
    assert default_settings(np.empty((1, 64, 70, 3)))["image_size"] == 64
    assert default_settings(np.empty((1, 128, 100, 3))) == {"image_size": 100}
    assert default_settings(np.empty((1, 300, 300, 3))) == {"image_size": 224}


PROGRAM = """
import sys
import numpy as np
sys.modules["tensorflow"] = None  # an import raises ImportError
import vgg_jax
from tests.helpers.tiny import SHALLOW
vgg_jax.CONFIGS["shallow"] = SHALLOW
rng = np.random.default_rng(0)
labels = np.arange(24) % 2
images = rng.integers(0, 100, (24, 18, 18), np.uint8)
images[labels == 1] += 100
settings = dict(net="shallow", image_size=16, scale=(18, 20), fc=(8, 8), batch_size=8, epochs=2)
workdir = sys.argv[1]
result = vgg_jax.fit((images, labels), workdir, statistics="measure", **settings)
assert len(result.history) == 2 and result.history[0]["validation"]["count"] == 2
again = vgg_jax.fit((images, labels), workdir, statistics="measure", **settings)
assert again.history == result.history
results = vgg_jax.evaluate(*vgg_jax.load(workdir), (images, labels))
assert results["count"] == 24
assert not [name for name in sys.modules if name.startswith("tensorflow.")]
"""


def test_folder_called_arrays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, image in enumerate(IMAGES):
        path = tmp_path / "arrays" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(image))
    train, validation = open_train_val(vgg_jax.preset("arrays"), version=2)
    assert train.size + validation.size == len(IMAGES)
    config, _ = resolve_config((IMAGES, LABELS), None, None, {})
    with pytest.raises(InputError, match="data is '<arrays>': expected the arrays that the run"):
        open_train_val(config, version=2)


@pytest.mark.slow
def test_arrays_need_no_tensorflow(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


SMALL = [
    *("--net", "shallow", "--image-size", "16", "--scale", "18"),
    *("--fc", "8", "8", "--batch-size", "8", "--epochs", "1"),
]
FROZEN = ["--freeze", "conv", "--cache-features", "--crop", "centre", "--no-flip"]


@pytest.fixture
def npz(tmp_path, monkeypatch, small_nets):
    """A file with 24 training and 6 test images, in the current folder."""
    monkeypatch.chdir(tmp_path)
    labels = np.arange(24) % 2
    images = np.random.default_rng(0).integers(0, 100, (24, 18, 18), np.uint8)
    images[labels == 1] += 100
    return save("x.npz", x_train=images, y_train=labels, x_test=images[:6], y_test=labels[:6])


@pytest.mark.slow
def test_commands_take_npz(npz, capsys):
    command = ["train", npz, *SMALL, "--workdir", "run", "--no-compilation-cache"]
    assert cli.main(command) == 0
    assert "x.npz: 22 training and 2 validation images of 2 classes" in capsys.readouterr().out
    assert cli.main(command) == 0
    assert "nothing to train" in capsys.readouterr().out
    for split, count in (("val", 2), ("test", 6)):
        assert cli.main(["evaluate", "run", "--split", split, "--no-compilation-cache"]) == 0
        assert f"{count} images" in capsys.readouterr().out
    assert cli.main(["statistics", npz]) == 0
    assert "x.npz train: 24 images" in capsys.readouterr().out
    assert cli.main(["verify-data", npz]) == 2
    assert "expected an image folder" in capsys.readouterr().err
    assert cli.main(["train", npz, *SMALL, *FROZEN, "--colour-shift", "0"]) == 2
    assert "cache_features is set and the data are arrays" in capsys.readouterr().err
    os.rename(npz, "moved.npz")
    assert cli.main(["evaluate", "run", "--no-compilation-cache"]) == 2
    assert "no file 'x.npz'" in capsys.readouterr().err


@pytest.mark.slow
def test_fit_and_evaluate_arrays(npz, capsys):
    splits = read_npz(npz)
    train, test = ((splits[name].images, splits[name].labels) for name in ("train", "test"))
    settings = {"net": "shallow", "image_size": 16, "scale": (16,), "fc": (8, 8), "epochs": 1}
    names = np.array(["ant", "bee"])
    result = vgg_jax.fit(
        (train[0], names[train[1]]), "run", validation=(test[0], names[test[1]]), **settings
    )
    assert result.history[0]["train"]["count"] == 24
    assert result.history[0]["validation"]["count"] == 6
    net = vgg_jax.load("run")
    assert net[2]["classes"] == ("ant", "bee")
    by_name, by_number, by_file = (
        vgg_jax.evaluate(*net, data, "test", protocol="center")
        for data in ((test[0], names[test[1]]), test, npz)
    )
    for results in (by_number, by_file):
        assert results["loss"] == by_name["loss"] and results["count"] == 6
    with pytest.raises(InputError, match="was trained on arrays in memory: pass data"):
        vgg_jax.evaluate(*net)
    with pytest.raises(InputError, match="the labels of the data are from 0 to 2"):
        vgg_jax.evaluate(*net, (test[0], [0, 1, 2, 0, 0, 0]))
    with pytest.raises(InputError, match=r"storage is .* in run\.json"):
        vgg_jax.fit((255 - train[0], names[train[1]]), "run", validation=test, **settings)


@pytest.mark.parametrize(
    "data, options, message",
    [
        (3, {}, r"the data is int: expected arrays \(images, labels\)"),
        ((IMAGES,), {}, "the data is 1 items"),
        ((IMAGES, LABELS), {"validation": IMAGES}, "validation is ndarray"),
        ("photos", {"validation": (IMAGES, LABELS)}, "validation is passed and the data is 'pho"),
        (TINY_TRAIN, {"classes": ["a"]}, "classes is passed with a TrainConfig"),
        (TINY_TRAIN, {"epochs": 3}, "epochs is passed with a TrainConfig"),
        ((IMAGES, LABELS), {"epocs": 3}, "epocs"),
        ((IMAGES, LABELS), {"data": "photos"}, "data is no setting"),
        ("photos", {"data": "photos"}, "data is no setting"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_fit_refuses_arguments_that_do_not_fit(data, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        vgg_jax.fit(data, tmp_path / "run", **options)
