"""Folders as people have them: other names of splits, notes, nested and empty folders, links."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vgg_jax.data import open_split, open_train_val, split_names
from vgg_jax.errors import InputError


def fill(root: Path, *classes: str, count: int = 3) -> None:
    """Writes class folders, each with images of one colour."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(np.full((8, 9, 3), number * 50 + i, np.uint8))
            image.save(root / name / f"{i}.png")


def sizes(root) -> tuple[int, int]:
    train, validation = open_train_val(str(root))
    return train.size, validation.size


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val"),
        ("Training", "Testing"),
        ("TRAIN", "Validation"),
        ("train", "valid"),
        ("training_set", "test_set"),
        ("train", "Valid Set"),
    ],
)
def test_folder_with_other_names_of_splits(tmp_path, names):
    train, other = names
    fill(tmp_path / train, "ants", "bees", count=5)
    fill(tmp_path / other, "ants", "bees", count=2)
    kind = "test" if other.lower().startswith("test") else "val"
    assert open_split(str(tmp_path), "train").size == 10
    assert open_split(str(tmp_path), kind).size == 4
    # Without a validation split, one of the training images is held out.
    assert sizes(tmp_path) == ((9, 1) if kind == "test" else (10, 4))


def test_folder_with_two_names_of_a_split(tmp_path):
    fill(tmp_path / "train", "ants", "bees")
    fill(tmp_path / "val", "ants", "bees")
    fill(tmp_path / "Valid", "ants", "bees")
    with pytest.raises(
        InputError, match=r"'Valid' and 'val' .* both names of the validation split"
    ):
        sizes(tmp_path)


def test_folder_with_a_class_named_train(tmp_path):
    fill(tmp_path, "bus", "car", "train", count=4)
    assert open_split(str(tmp_path), "train").classes == ("bus", "car", "train")


def test_folder_with_classes_beside_a_split(tmp_path):
    fill(tmp_path, "cats", "dogs")
    fill(tmp_path / "test", "cats", "dogs")
    with pytest.raises(InputError, match=r"'cats', 'dogs'.*'test'.* expected .*/train; move them"):
        sizes(tmp_path)


def test_folder_with_one_split_only(tmp_path):
    fill(tmp_path / "val", "ants", "bees")
    assert split_names(str(tmp_path)) == ("val",)
    assert open_split(str(tmp_path), "validation").classes == ("ants", "bees")


def test_folder_with_validation_split_beside_photos_without_labels(tmp_path):
    """Without a training split, the classes are those of the validation split."""
    fill(tmp_path / "val", "ants", "bees")
    fill(tmp_path, "test")
    assert open_split(str(tmp_path), "val").classes == ("ants", "bees")


NOTES = (
    *("IMG_1.xmp", "IMG_1.AAE", "IMG_1.MOV"),
    *("desktop.ini", "Thumbs.db", "._0.png", "labels.csv", "README", "notes.txt"),
    *("@eaDir/0.png", "__MACOSX/x", ".ipynb_checkpoints/0.png"),
)


def test_folder_skips_notes_with_one_line(tmp_path, caplog):
    fill(tmp_path, "ants", "bees", count=5)
    for name in NOTES:
        path = tmp_path / "ants" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"no image")
    for name in ("__MACOSX", "@eaDir", ".ipynb_checkpoints"):
        (tmp_path / name).mkdir()
    with caplog.at_level("INFO", "vgg_jax"):
        assert sizes(tmp_path) == (9, 1)
    assert caplog.text.count("skipped beside the images") == 1
    assert "15 files that are notes, hidden or of the system" in caplog.text


@pytest.mark.parametrize("split", ["train", "val"])
def test_folder_with_nested_classes(tmp_path, split):
    fill(tmp_path / "train", "ants", "bees")
    fill(tmp_path / "val", "ants", "bees")
    (tmp_path / split / "ants").rename(tmp_path / "inner")
    (tmp_path / split / "ants").mkdir()
    (tmp_path / "inner").rename(tmp_path / split / "ants" / "inner")
    for skip_bad in (False, True):
        with pytest.raises(InputError) as error:
            open_train_val(str(tmp_path), skip_bad=skip_bad)
        assert "inner" in str(error.value) and "<class>" in str(error.value)
        assert "remove" not in str(error.value)


def test_folder_below_another_folder(tmp_path):
    """An archive unpacks to data/data/train."""
    fill(tmp_path / "data" / "train", "ants", "bees")
    with pytest.raises(InputError, match=r"'train'.*: pass .*/data' as DATA"):
        sizes(tmp_path)


@pytest.mark.parametrize("empty", ["", "ants", ".git"])
def test_folder_with_empty_validation_split(tmp_path, empty):
    fill(tmp_path / "train", "ants", "bees")
    (tmp_path / "val" / empty).mkdir(parents=True)
    with pytest.raises(InputError, match="val"):
        sizes(tmp_path)
    with pytest.raises(InputError, match="no images"):
        open_split(str(tmp_path), "val")


def test_folder_with_photos_without_labels(tmp_path):
    fill(tmp_path / "train", "ants", "bees", count=5)
    fill(tmp_path, "test")
    assert sizes(tmp_path) == (9, 1)  # the test split is not read
    with pytest.raises(
        InputError, match=r"no labels for the 3 images of .*test', which can only be predicted"
    ):
        open_split(str(tmp_path), "test")


@pytest.mark.parametrize("name", ["wasps", "St. Bernard"])
def test_folder_with_dangling_class_folder(tmp_path, name):
    fill(tmp_path, "ants", "bees")
    (tmp_path / name).symlink_to("/nowhere/x")
    with pytest.raises(InputError, match=f"{name}' is a link to '/nowhere/x', which cannot be"):
        sizes(tmp_path)


def test_folder_with_dangling_notes(tmp_path):
    fill(tmp_path, "ants", "bees")
    for name in ("list.txt", "README", "poster.jpg", ".hidden"):
        (tmp_path / name).symlink_to("/nowhere/x")
    assert sizes(tmp_path) == (5, 1)


def test_folder_with_linked_class_folder(tmp_path):
    fill(tmp_path / "elsewhere", "ants")
    fill(tmp_path / "data", "bees")
    (tmp_path / "data" / "ants").symlink_to(tmp_path / "elsewhere" / "ants")
    assert open_split(str(tmp_path / "data"), "train").size == 6


def test_folder_with_one_class(tmp_path):
    fill(tmp_path, "ants")
    with pytest.raises(InputError, match="only one class, 'ants': expected at least two"):
        sizes(tmp_path)


def test_folder_with_names_of_two_unicode_forms(tmp_path):
    composed = unicodedata.normalize("NFC", "été")
    decomposed = unicodedata.normalize("NFD", "été")
    fill(tmp_path / "one", composed, decomposed)
    with pytest.raises(InputError, match="differ only in their Unicode form") as error:
        sizes(tmp_path / "one")
    assert str(error.value).isascii()
    fill(tmp_path / "two" / "train", composed, "hiver")
    fill(tmp_path / "two" / "val", decomposed, "hiver")
    with pytest.raises(InputError, match="only in its Unicode form"):
        sizes(tmp_path / "two")


@pytest.mark.parametrize("format", ["TIFF", "PPM", "AVIF", "JPEG2000"])
def test_folder_with_other_formats(tmp_path, format):
    fill(tmp_path, "ants", "bees")
    Image.new("RGB", (9, 8)).save(tmp_path / "ants" / "x", format)
    assert open_split(str(tmp_path), "train").size == 7


def test_folder_names_heic_photos(tmp_path):
    fill(tmp_path, "ants", "bees")
    (tmp_path / "ants" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(InputError, match=r"IMG_1\.HEIC'; .*convert HEIC photos to JPEG"):
        sizes(tmp_path)


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_folder_named_as_a_data_set(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / name, "ants", "bees", count=5)
    with pytest.raises(
        InputError, match=f"'{name}' is a data set and also a folder here.*./{name}"
    ):
        open_train_val(name)
    assert open_split(f"./{name}", "train").classes == ("ants", "bees")


def test_folder_that_is_the_prepared_data_set(prepared, monkeypatch):
    monkeypatch.chdir(prepared["tfrecord"])
    assert open_split("numbers", "train", data_dir=prepared["tfrecord"]).classes == tuple("abc")
    assert open_split("numbers", "train", data_dir=os.curdir).size == 23


@pytest.mark.parametrize(
    "names",
    [("train", "test1"), ("train_images", "test_images"), ("train2017", "val2017"), ("images",)],
)
def test_folder_with_parts_of_a_data_set(tmp_path, names):
    """The folders are no classes, as in Kaggle's Dogs vs Cats."""
    fill(tmp_path, *names)
    with pytest.raises(InputError, match="named like parts of a data set"):
        open_split(str(tmp_path), "train")


@pytest.mark.parametrize("label_file", ["train.csv", "labels.txt"])
def test_parts_with_labels_in_a_file(tmp_path, caplog, label_file):
    """Dogs vs Cats, with the file that the message above asks for."""
    fill(tmp_path, "train", "test1", count=4)
    lines = "".join(f"{i}.png,{('cat', 'dog')[i % 2]}\n" for i in range(4))
    (tmp_path / label_file).write_text(lines)
    with caplog.at_level("INFO", "vgg_jax"):
        source = open_split(str(tmp_path), "train")
    assert (source.size, source.classes) == (4, ("cat", "dog"))
    assert split_names(str(tmp_path)) == ("train",)
    assert f"ignored beside the splits of {tmp_path}: 'test1'" in caplog.text


@pytest.mark.parametrize(
    "names",
    [
        ("freight train", "passenger train"),
        ("with_masks", "without_masks"),
        ("A-Images", "b images"),
    ],
)
def test_classes_with_names_of_parts(tmp_path, names):
    fill(tmp_path, *names)
    assert open_split(str(tmp_path), "train").classes == names


@pytest.mark.parametrize(
    "names",
    [
        ("dogs_train", "dogs_test"),
        ("my_train_images", "my_test_images"),
        ("freight train", "train"),
        ("HAM_images_part_1", "HAM_images_part_2"),
        ("DIV2K_train",),
    ],
)
def test_parts_with_names_like_classes(tmp_path, names):
    fill(tmp_path, *names)
    with pytest.raises(InputError, match="named like parts of a data set"):
        open_split(str(tmp_path), "train")


def test_classes_with_names_of_parts_hold_images(tmp_path):
    for name in ("left_images", "right_images"):
        fill(tmp_path / name, "ants", "bees")
    with pytest.raises(InputError, match=r"pass .*/left_images' as DATA"):
        open_split(str(tmp_path), "train")


def test_folder_above_the_classes(tmp_path):
    """As in Stanford Dogs, which has the same folders for photos and for boxes."""
    for name in ("ants", "bees"):
        (tmp_path / "Annotation" / name).mkdir(parents=True)
        (tmp_path / "Annotation" / name / "1").write_text("<annotation>")
    fill(tmp_path / "Images", "ants", "bees")
    with pytest.raises(InputError, match=r"pass .*/Images' as DATA"):
        open_split(str(tmp_path), "train")


def test_class_that_differs_in_capital_letters(tmp_path):
    fill(tmp_path / "train", "ants", "bees")
    fill(tmp_path / "val", "Ants", "bees")
    with pytest.raises(InputError, match="differs from the training class 'ants' only in capital"):
        open_split(str(tmp_path), "val")


def test_folder_with_images_in_two_levels(tmp_path):
    fill(tmp_path, "ants", "bees")
    fill(tmp_path / "ants", "more")
    for skip_bad in (False, True):
        with pytest.raises(InputError, match=r"ants/more' is a folder with images.*move them up"):
            open_split(str(tmp_path), "train", skip_bad=skip_bad)


def test_folder_with_images_in_no_class(tmp_path, caplog):
    fill(tmp_path, "ants", "bees")
    Image.new("RGB", (9, 8)).save(tmp_path / "loose.png")
    assert open_split(str(tmp_path), "train").size == 6
    assert "1 images of" in caplog.text and "lie in no class folder" in caplog.text


def test_data_that_is_a_file(tmp_path):
    (tmp_path / "photos.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"photos\.zip' is a file: expected a folder .* unpack"):
        open_split(str(tmp_path / "photos.zip"), "train")
