import hashlib
import os
from pathlib import Path

import pytest

from tests.helpers.tiny_data import (
    SEED,
    check_divided,
    check_order,
    encode,
    list_examples,
    noise,
)
from vgg_jax.data import file_split, open_split, open_train_val
from vgg_jax.errors import InputError


def test_folder_with_splits(folder):
    train, validation = open_train_val(str(folder))
    assert (train.size, train.classes) == (13, ("ants", "bees"))
    assert (validation.size, validation.classes) == (5, ("ants", "bees"))
    check_order(train)
    for source, split in ((train, "train"), (validation, "val")):
        for example in list_examples(source, SEED):
            path = source.file_name(int(example["index"]))
            assert path.startswith(str(folder / split / source.classes[example["label"]]))
            assert Path(path).read_bytes() == example["encoded"]


def test_storage_of_class_folders_stays(tmp_path):
    """A run of an older version resumes, so the digest of its names is that of 0.1.0."""
    for path in ("ants/1.png", "bees/1.png"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_bytes(encode(noise(5, 6)))
    digest = hashlib.sha256(b"ants/1.png\0bees/1.png").hexdigest()[:16]
    assert open_split(str(tmp_path), "train").storage == f"folder, names {digest}"


def test_folder_without_splits_is_divided(folder):
    train, validation = open_train_val(str(folder / "train"), validation_fraction=0.25)
    assert (train.size, validation.size) == (10, 3)
    check_divided(train, validation, 13)
    check_order(train)
    example = list_examples(validation)[1]
    assert Path(validation.file_name(int(example["index"]))).read_bytes() == example["encoded"]


def test_train_val_does_not_open_test_split(folder):
    (folder / "test" / "ants").mkdir(parents=True)
    (folder / "test" / "ants" / "broken.jpg").write_bytes(b"no image")
    open_train_val(str(folder))
    with pytest.raises(InputError, match=r"broken\.jpg"):
        open_split(str(folder), "test")


def test_folder_with_unusual_and_hidden_names(tmp_path):
    names = [
        b"caf\xc3\xa9 \xe8\x9a\x82.png",
        b"two\nlines.png",
        b"latin\xe9.png",
        b"no extension",
        b"photo.txt",
    ]
    class_folder = tmp_path / "ünïts"
    class_folder.mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "README").write_text("beside the class folders")
    encoded = encode(noise(5, 6))
    for name in names:
        Path(class_folder, os.fsdecode(name)).write_bytes(encoded)
    for name in (".DS_Store", "Thumbs.db"):
        (class_folder / name).write_text("hidden")
    source = open_split(str(tmp_path), "train")
    assert source.classes == ("ünïts",)
    file_names = map(source.file_name, range(source.size))
    assert [os.fsencode(os.path.basename(name)) for name in file_names] == sorted(names)
    assert all(example["encoded"] == encoded for example in list_examples(source))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_folder_ignores_extensions(tmp_path, format):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.JPEG").write_bytes(encode(noise(5, 6), format))
    assert open_split(str(tmp_path), "train").size == 1


def write_other_files(folder):
    """Writes five files that are not images, and returns their names."""
    (folder / "ants" / "notes.jpg").write_text("no image")
    (folder / "ants" / "empty.jpg").write_bytes(b"")
    (folder / "bees" / "sub").mkdir()
    (folder / "bees" / "link.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "bees" / "pipe.jpg")
    return ["ants/notes.jpg", "ants/empty.jpg", "bees/sub", "bees/link.jpg", "bees/pipe.jpg"]


def test_folder_names_files_that_are_no_images(folder):
    names = write_other_files(folder / "train")
    with pytest.raises(InputError, match=r"5 of 18 files .* are not images") as error:
        open_split(str(folder), "train")
    message = str(error.value)
    assert all(str(folder / "train" / name) in message for name in names)
    assert "--skip-bad" in message


def test_folder_skips_files_that_are_no_images(folder):
    write_other_files(folder / "train")
    source = open_split(str(folder), "train", skip_bad=True)
    assert (source.size, len(source.skipped)) == (13, 5)
    labels = sorted(example["label"] for example in list_examples(source))
    assert labels == [0] * 7 + [1] * 6
    assert len(open_train_val(str(folder), skip_bad=True)[0].skipped) == 5


def test_folder_names_ten_files_at_most(folder):
    for i in range(30):
        (folder / "train" / "ants" / f"bad{i:02}.jpg").write_text("no image")
    with pytest.raises(InputError, match="30 of 43 files") as error:
        open_train_val(str(folder))
    assert "bad09" in str(error.value) and "bad10" not in str(error.value)


def test_folder_labels_with_many_tasks(folder, monkeypatch):
    """The folder has more files than one task of a thread looks at."""
    monkeypatch.setattr(file_split, "FILES_PER_TASK", 3)
    (folder / "train" / "ants" / "2b.png").write_text("no image")
    source = open_split(str(folder), "train", skip_bad=True)
    examples = list_examples(source)
    assert len(examples) == 13
    for example in examples:
        assert (example["label"] == 1) == ("bees" in source.file_name(int(example["index"])))
    assert "2b.png" not in "".join(map(source.file_name, range(13)))


def test_folder_with_class_without_images(folder):
    (folder / "train" / "crickets").mkdir()
    with pytest.raises(InputError, match="crickets' has no images"):
        open_train_val(str(folder))
    (folder / "train" / "crickets" / "x.jpg").write_text("no image")
    with pytest.raises(InputError, match="crickets' has no images"):
        open_train_val(str(folder), skip_bad=True)


def test_folder_with_unknown_validation_class(folder):
    os.rename(folder / "val" / "bees", folder / "val" / "wasps")
    with pytest.raises(InputError, match="wasps' is not one of the 2 training classes"):
        open_train_val(str(folder))


def test_folder_without_data(tmp_path, folder):
    message = f"no folder '{tmp_path}/nowhere': expected {tmp_path}/nowhere/<class>/"
    with pytest.raises(InputError, match=message):
        open_train_val(f"{tmp_path}/nowhere")
    with pytest.raises(InputError, match=r"no folder './nowhere'"):
        open_train_val("./nowhere")
    message = (
        r"no labels for the 7 images of .*ants', .*expected .*/<class>/\*.jpg, or a label file"
    )
    with pytest.raises(InputError, match=message):
        open_train_val(str(folder / "train" / "ants"))
    os.rename(folder / "train", folder / "test")
    with pytest.raises(InputError, match=r"has no split 'train': expected one of val, test"):
        open_train_val(str(folder))


def test_folder_with_a_gif_among_photos(shared_data):
    train, validation = open_train_val(str(shared_data / "ants-bees"))
    assert train.size + validation.size == 398
    assert (train.classes, train.skipped) == (("ants", "bees"), ())
    assert any(train.file_name(i).endswith("imageNotFound.gif") for i in range(train.size))
