import os
from pathlib import Path

import pytest

from tests.helpers.tiny_data import SEED, check_divided, check_order, encode, listed, noise
from vgg_jax.data import folder as folder_module
from vgg_jax.data import open_split, open_train_val
from vgg_jax.errors import InputError


def test_folder_with_splits(folder):
    train, validation = open_train_val(str(folder))
    assert (train.size, validation.size, train.classes, validation.classes) == (
        13,
        5,
        ("ants", "bees"),
        ("ants", "bees"),
    )
    check_order(train)
    for source, split in ((train, "train"), (validation, "val")):
        for example in listed(source, SEED):
            path = source.file_name(int(example["index"]))
            assert path.startswith(str(folder / split / source.classes[example["label"]]))
            assert Path(path).read_bytes() == example["encoded"]


def test_training_never_opens_the_test_split(folder):
    (folder / "test" / "ants").mkdir(parents=True)
    (folder / "test" / "ants" / "broken.jpg").write_bytes(b"no image")
    open_train_val(str(folder))
    with pytest.raises(InputError, match=r"broken\.jpg"):
        open_split(str(folder), "test")


def test_folder_without_splits_is_divided(folder):
    train, validation = open_train_val(str(folder / "train"), validation_fraction=0.25)
    assert (train.size, validation.size) == (10, 3)
    check_divided(train, validation, 13)
    check_order(train)
    example = listed(validation)[1]
    assert Path(validation.file_name(int(example["index"]))).read_bytes() == example["encoded"]


def test_strange_names_are_read_and_hidden_files_are_not(tmp_path):
    names = [
        b"caf\xc3\xa9 \xe8\x9a\x82.png",
        b"two\nlines.png",
        b"latin\xe9.png",
        b"no extension",
        b"photo.txt",
    ]
    (tmp_path / "ünïts").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "README").write_text("beside the class folders")
    for name in names:
        with open(os.path.join(os.fsencode(tmp_path / "ünïts"), name), "wb") as file:
            file.write(encode(noise(5, 6)))
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / "ünïts" / name).write_text("hidden")
    source = open_split(str(tmp_path), "train")
    assert source.classes == ("ünïts",)
    assert [
        os.fsencode(os.path.basename(source.file_name(i))) for i in range(source.size)
    ] == sorted(names)
    assert all(example["encoded"] == encode(noise(5, 6)) for example in listed(source))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_an_image_is_known_by_its_bytes(tmp_path, format):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.JPEG").write_bytes(encode(noise(5, 6), format))
    assert open_split(str(tmp_path), "train").size == 1


def bad_files(folder):
    (folder / "ants" / "notes.jpg").write_text("no image")
    (folder / "ants" / "empty.jpg").write_bytes(b"")
    (folder / "bees" / "sub").mkdir()
    (folder / "bees" / "link.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "bees" / "pipe.jpg")
    return ["ants/notes.jpg", "ants/empty.jpg", "bees/sub", "bees/link.jpg", "bees/pipe.jpg"]


def test_files_that_are_no_images_are_refused_by_name(folder):
    names = bad_files(folder / "train")
    with pytest.raises(InputError, match=r"5 of 18 files .* are not images") as error:
        open_split(str(folder), "train")
    assert all(
        str(folder / "train" / name) in str(error.value) for name in names
    ) and "--skip-bad" in str(error.value)


def test_files_that_are_no_images_are_skipped_and_counted(folder):
    bad_files(folder / "train")
    source = open_split(str(folder), "train", skip_bad=True)
    assert (source.size, len(source.skipped)) == (13, 5)
    assert sorted(example["label"] for example in listed(source)) == [0] * 7 + [1] * 6
    assert len(open_train_val(str(folder), skip_bad=True)[0].skipped) == 5


def test_only_ten_bad_files_are_shown(folder):
    for i in range(30):
        (folder / "train" / "ants" / f"bad{i:02}.jpg").write_text("no image")
    with pytest.raises(InputError, match="30 of 43 files") as error:
        open_train_val(str(folder))
    assert "bad09" in str(error.value) and "bad10" not in str(error.value)


def test_many_files_keep_their_labels(folder, monkeypatch):
    """More files than one thread looks at in one go."""
    monkeypatch.setattr(folder_module, "SNIFFED_AT_ONCE", 3)
    (folder / "train" / "ants" / "2b.png").write_text("no image")
    source = open_split(str(folder), "train", skip_bad=True)
    assert [
        (example["label"] == 1) == ("bees" in source.file_name(int(example["index"])))
        for example in listed(source)
    ] == [True] * 13
    assert "2b.png" not in "".join(map(source.file_name, range(13)))


def test_a_class_folder_without_images(folder):
    (folder / "train" / "crickets").mkdir()
    with pytest.raises(InputError, match="crickets' has no images"):
        open_train_val(str(folder))
    (folder / "train" / "crickets" / "x.jpg").write_text("no image")
    with pytest.raises(InputError, match="crickets' has no images"):
        open_train_val(str(folder), skip_bad=True)


def test_a_validation_class_that_training_does_not_have(folder):
    os.rename(folder / "val" / "bees", folder / "val" / "wasps")
    with pytest.raises(InputError, match="wasps"):
        open_train_val(str(folder))


def test_folders_that_hold_no_data(tmp_path, folder):
    with pytest.raises(
        InputError, match=f"no folder '{tmp_path}/nowhere': expected {tmp_path}/nowhere/<class>/"
    ):
        open_train_val(f"{tmp_path}/nowhere")
    with pytest.raises(InputError, match=r"no folder './nowhere'"):
        open_train_val("./nowhere")
    with pytest.raises(
        InputError,
        match=r"no images under .*: expected .*/<class>/\*.jpg; pass another folder as DATA",
    ):
        open_train_val(str(folder / "train" / "ants"))
    os.rename(folder / "train", folder / "test")
    with pytest.raises(InputError, match=r"no training images under .* beside 'val'"):
        open_train_val(str(folder))


def test_a_real_folder_with_a_stray(shared_data):
    train, validation = open_train_val(str(shared_data / "ants-bees"))
    assert (train.size + validation.size, train.classes, train.skipped) == (
        398,
        ("ants", "bees"),
        (),
    )
    assert any(train.file_name(i).endswith("imageNotFound.gif") for i in range(train.size))
