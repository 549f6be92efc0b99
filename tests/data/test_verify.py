"""Search for unreadable images, and lists of images to exclude."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.corrupt_images import CORRUPT, make_folder
from tests.helpers.tiny_data import TINY_TRAIN, indices
from vgg_jax import cli
from vgg_jax.data import (
    eval_batches,
    open_split,
    open_train_val,
    read_exclude_list,
    verify_images,
    write_exclude_list,
)
from vgg_jax.errors import InputError


def test_verify_then_exclude(tmp_path, capsys):
    """The list holds wherever the folder is, and however its path is written."""
    root = make_folder(tmp_path / "data", *CORRUPT)
    (tmp_path / "data" / "ants" / "text.jpg").write_text("no image")
    (tmp_path / "data" / "ants" / "two\nlines \udce9.jpg").write_bytes(CORRUPT["cut.jpg"])
    path = str(tmp_path / "bad.jsonl")
    assert cli.main(["verify-data", root, "--out", path]) == 3
    output = capsys.readouterr().out
    assert "train: 8 of 18 images cannot be read" in output and "--exclude" in output
    expected = [*(f"ants/{name}" for name in (*CORRUPT, "text.jpg")), "ants/two\nlines \udce9.jpg"]
    exclude = read_exclude_list(path)
    assert exclude == tuple(sorted(expected))
    os.rename(root, tmp_path / "moved")
    train, validation = open_train_val(str(tmp_path / "moved") + "/", exclude=exclude)
    assert train.size + validation.size == 10
    for source in (train, validation):
        batches = eval_batches(source, TINY_TRAIN, 4)
        assert sum(batch["mask"].sum() for batch in batches) == source.size


def test_verify_gives_reasons(tmp_path):
    root = make_folder(tmp_path / "data", "cut.jpg", "bomb.png")
    ((split, count, bad),) = verify_images(root)
    assert (split, count) == ("train", 12)
    assert [image.file for image in bad] == ["ants/bomb.png", "ants/cut.jpg"]
    assert bad[0].reason == "it has more than 178,956,970 pixels"
    assert "nvalid JPEG data" in bad[1].reason


def test_verify_names_what_is_no_file(tmp_path):
    root = Path(make_folder(tmp_path / "data"))
    (root / "ants" / "empty.jpg").touch()
    (root / "ants" / "gone.jpg").symlink_to("nowhere.jpg")
    (root / "ants" / "more").mkdir()
    (root / "ants" / "text.jpg").write_text("no image")
    ((_, _, bad),) = verify_images(str(root))
    reasons = {image.file: image.reason for image in bad}
    assert reasons["ants/empty.jpg"] == "an empty file, or one that cannot be opened"
    assert reasons["ants/gone.jpg"] == "a link to 'nowhere.jpg', which does not exist"
    assert reasons["ants/more"] == "a folder"
    assert reasons["ants/text.jpg"].startswith("not an image")


def test_verify_intact_data(tmp_path, prepared):
    path = tmp_path / "bad.jsonl"
    assert cli.main(["verify-data", make_folder(tmp_path / "data"), "--out", str(path)]) == 0
    assert path.read_text() == ""
    for folder in prepared.values():
        assert list(verify_images("numbers", data_dir=folder)) == [("train", 23, [])]


def test_verify_writes_list_before_error(tmp_path, capsys):
    make_folder(tmp_path / "data" / "train", "cut.jpg")
    make_folder(tmp_path / "data" / "val")
    shutil.rmtree(tmp_path / "data" / "val" / "ants")
    (tmp_path / "data" / "val" / "ants").mkdir()
    path = str(tmp_path / "list")
    assert cli.main(["verify-data", str(tmp_path / "data"), "--out", path]) == 2
    assert "ants' has no images" in capsys.readouterr().err
    assert read_exclude_list(path) == ("train/ants/cut.jpg",)


@pytest.mark.parametrize("label_file", [None, "val.csv", "test.csv"])
def test_verify_needs_no_labels(tmp_path, label_file):
    """Kaggle's test splits have none, and wrong labels do not matter."""
    root = tmp_path / "data"
    make_folder(root / "train", "cut.jpg")
    make_folder(tmp_path / "flat", "cut.jpg")
    os.rename(tmp_path / "flat" / "bees", root / "val")
    os.rename(tmp_path / "flat" / "ants", root / "test")
    if label_file:
        (root / label_file).write_text("0.jpg,wasps\n")
    results = [
        (split, count, [image.file for image in bad])
        for split, count, bad in verify_images(str(root))
    ]
    assert results == [
        ("train", 11, ["train/ants/cut.jpg"]),
        ("val", 5, []),
        ("test", 6, ["test/cut.jpg"]),
    ]


def test_verify_photos_without_classes(tmp_path):
    root = Path(make_folder(tmp_path / "data", "cut.jpg")) / "ants"
    ((split, count, bad),) = verify_images(str(root))
    assert (split, count, [image.file for image in bad]) == ("train", 6, ["cut.jpg"])
    shutil.rmtree(root)
    root.mkdir()
    with pytest.raises(InputError, match="no images under"):
        list(verify_images(str(root)))


def test_verify_class_that_training_lacks(tmp_path):
    make_folder(tmp_path / "train")
    make_folder(tmp_path / "val", "cut.jpg")
    os.rename(tmp_path / "val" / "ants", tmp_path / "val" / "wasps")
    _, (_, _, bad) = verify_images(str(tmp_path))
    assert [image.file for image in bad] == ["val/wasps/cut.jpg"]


def test_verify_list_with_wrong_labels(tmp_path):
    root = Path(make_folder(tmp_path / "data", "cut.jpg"))
    lines = "bees/0.png,ants,train\nbees/0.png,bees,train\nants/cut.jpg,wasps,val\n"
    (root / "list.csv").write_text(lines)
    results = {split: bad for split, _, bad in verify_images(str(root / "list.csv"))}
    assert results["train"] == []
    assert [image.file for image in results["validation"]] == ["ants/cut.jpg"]


def test_verify_expands_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_folder(tmp_path / "data", "cut.jpg")
    ((_, _, bad),) = verify_images("~/data")
    assert [image.file for image in bad] == ["ants/cut.jpg"]


def test_exclude_records(prepared):
    for folder in prepared.values():
        options = {"data_dir": folder, "validation_fraction": 0.3}
        whole, _ = open_train_val("numbers", **options)
        exclude = ("numbers train record 4", "numbers train record 22")
        train, validation = open_train_val("numbers", **options, exclude=exclude)
        assert train.size + validation.size == 21
        expected = [i for i in range(23) if i not in (4, 22)]
        assert sorted(indices(train) + indices(validation)) == expected
        assert train.storage != whole.storage  # a run with another list is another run


def test_exclude_list_of_another_split(tmp_path):
    make_folder(tmp_path / "data" / "train")
    make_folder(tmp_path / "data" / "val")
    make_folder(tmp_path / "data" / "test", "cut.jpg")
    root, path = str(tmp_path / "data"), str(tmp_path / "list")
    assert cli.main(["verify-data", root, "--out", path]) == 3
    exclude = read_exclude_list(path)
    assert exclude == ("test/ants/cut.jpg",)
    assert open_train_val(root, exclude=exclude)[0].size == 10
    assert open_split(root, "test", exclude=exclude).size == 10


def test_exclude_list_of_the_test_split_of_a_list(tmp_path):
    root = Path(make_folder(tmp_path / "data", "cut.jpg"))
    lines = [f"{name}/{i}.png,{name},train\n" for name in ("ants", "bees") for i in range(5)]
    (root / "list.csv").write_text("".join([*lines, "ants/cut.jpg,ants,test\n"]))
    data, path = str(root / "list.csv"), str(tmp_path / "bad.jsonl")
    assert cli.main(["verify-data", data, "--out", path]) == 3
    exclude = read_exclude_list(path)
    assert exclude == ("ants/cut.jpg",)
    train, validation = open_train_val(data, exclude=exclude)
    assert train.size + validation.size == 10
    with pytest.raises(InputError, match="none of the 1 images to exclude"):
        open_train_val(data, exclude=("train/x.jpg",))


def test_exclude_list_of_other_data(tmp_path):
    root = make_folder(tmp_path / "data")
    message = r"none of the 1 images to exclude, for example 'ants/x.jpg', is in .*data"
    with pytest.raises(InputError, match=message):
        open_train_val(root, exclude=("ants/x.jpg",))


def test_exclude_list_round_trip(tmp_path):
    ((_, _, bad),) = verify_images(make_folder(tmp_path / "data", *CORRUPT))
    path = tmp_path / "list"
    write_exclude_list(str(path), bad)
    assert read_exclude_list(str(path)) == tuple(sorted(image.file for image in bad))
    reasons = [json.loads(line)["reason"] for line in path.read_text().splitlines()]
    assert reasons == [image.reason for image in bad]


@pytest.mark.parametrize(
    "content", ["no JSON\n", '{"name": 1}\n', "[1]\n", '{"file": 3}\n', "\xff"]
)
def test_read_exclude_list_of_other_content(content, tmp_path):
    (tmp_path / "list").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="expected the list that `vgg-jax verify-data` writes"):
        read_exclude_list(str(tmp_path / "list"))


def test_train_with_missing_exclude_list(tmp_path, capsys):
    path = str(tmp_path / "nowhere")
    assert cli.main(["train", "digits", "--exclude", path, "--no-compilation-cache"]) == 2
    assert "nowhere (No such file or directory)" in capsys.readouterr().err


def test_verify_data_replaces_no_other_file(folder, tmp_path, capsys):
    photo = folder / "train" / "ants" / "0.png"
    content = photo.read_bytes()
    for out in (photo, tmp_path, tmp_path / "nowhere" / "list"):
        assert cli.main(["verify-data", str(folder), "--out", str(out)]) == 2
    assert photo.read_bytes() == content
    assert "is not a list of verify-data" in capsys.readouterr().err
