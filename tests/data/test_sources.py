import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.data.tiny_data import NUMBERS, colour, encode, noise
from vgg_jax.data import decode, open_split, open_splits
from vgg_jax.data import folder as folder_module
from vgg_jax.data import sources as sources_module
from vgg_jax.data.pipeline import epoch_seed
from vgg_jax.data.splits import shuffle
from vgg_jax.errors import InputError

SEED = tf.constant([3, 4], tf.int64)


def listed(source, seed=None, start=0):
    return list(source.examples(seed, start).as_numpy_iterator())


def indices(source, seed=None, start=0):
    return [int(example["index"]) for example in listed(source, seed, start)]


def check_order(source):
    """In order without a seed; with one shuffled, another with another seed, and the same from anywhere."""
    ordered, shuffled = indices(source), indices(source, SEED)
    assert ordered == sorted(shuffled) != shuffled
    assert indices(source, SEED + 1) not in (ordered, shuffled)
    assert indices(source, None, 5) == ordered[5:]
    for start in (1, source.size - 1, source.size):
        assert indices(source, SEED, start) == shuffled[start:]


def test_orders_are_as_good_as_numpys():
    """tf.random.experimental.index_shuffle is not: of its orders every 256th is the same, and they correlate with each other."""
    size, epochs = 45000, 20
    positions = tf.range(size, dtype=tf.int64)
    orders = np.stack([shuffle(positions, epoch_seed(0, 0, tf.constant(epoch, tf.int64)), size).numpy() for epoch in range(epochs)])
    assert all(len(set(order)) == size for order in orders)
    assert np.abs(np.corrcoef(orders) - np.eye(epochs)).max() < 5 / np.sqrt(size)
    assert max(abs(np.corrcoef(order[:-1], order[1:])[0, 1]) for order in orders) < 5 / np.sqrt(size)
    in_batch = (orders[:, : size // 32 * 32] < size // 2).reshape(-1, 32).sum(1)  # of two classes in sorted folders
    assert abs(in_batch.var() / (32 / 4) - 1) < 0.05
    seven = {tuple(shuffle(positions[:7], epoch_seed(0, 0, tf.constant(epoch, tf.int64)), 7).numpy()) for epoch in range(300)}
    assert len(seven) > 280  # of 5,040, drawn 300 times: 291 expected
    assert shuffle(positions[:1], tf.constant([1, 2], tf.int64), 1).numpy().tolist() == [0]


def check_divided(train, validation, size):
    assert len(indices(train)) == train.size and len(indices(validation)) == validation.size
    assert sorted(indices(train) + indices(validation)) == list(range(size))


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    source = open_split("digits", "train")
    assert (source.size, source.classes, source.skipped) == (1797, tuple("0123456789"), 0)
    assert source.file_name(17) == "digits train record 17"
    images, targets = load_digits(return_X_y=True)
    for example in listed(source)[::100]:
        i = example["index"]
        assert example["label"] == targets[i]
        np.testing.assert_allclose(decode(example["encoded"])[..., 1].numpy().ravel() * (16 / 255), images[i], atol=0.04)


def test_digits_order_and_division():
    train, validation = open_splits("digits")
    assert (train.size, validation.size) == (1617, 180)
    check_divided(train, validation, 1797)
    check_order(validation)
    assert indices(validation) == indices(open_splits("digits")[1])
    assert indices(validation) != indices(open_splits("digits", seed=1)[1])


def test_the_division_is_frozen():
    """A resumed run must not validate on what it has trained on: this list was printed once and does not depend on numpy's version."""
    assert indices(open_splits("digits", seed=0)[1])[:5] == FROZEN


FROZEN = [10, 17, 26, 32, 36]


def test_division_takes_at_least_one_image_and_leaves_one(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(encode(noise(4, 4)))
    assert [source.size for source in open_splits(str(tmp_path), validation_fraction=0.0)] == [1, 0]
    with pytest.raises(InputError, match="no image is left to train on"):
        open_splits(str(tmp_path))
    (tmp_path / "a" / "2.png").write_bytes(encode(noise(4, 4)))
    assert [source.size for source in open_splits(str(tmp_path), validation_fraction=0.01)] == [1, 1]


def test_folder_with_splits(folder):
    train, validation = open_splits(str(folder))
    assert (train.size, validation.size, train.classes, validation.classes) == (13, 5, ("ants", "bees"), ("ants", "bees"))
    check_order(train)
    for source, split in ((train, "train"), (validation, "val")):
        for example in listed(source, SEED):
            path = source.file_name(int(example["index"]))
            assert path.startswith(str(folder / split / source.classes[example["label"]]))
            assert Path(path).read_bytes() == example["encoded"]


@pytest.mark.parametrize("name", ["validation", "val", "valid"])
def test_validation_goes_by_three_names(folder, name):
    os.rename(folder / "val", folder / name)
    assert open_splits(str(folder))[1].size == 5
    assert [open_split(str(folder), alias).size for alias in ("validation", "val", "valid")] == [5, 5, 5]


def test_training_never_opens_the_test_split(folder):
    (folder / "test" / "ants").mkdir(parents=True)
    (folder / "test" / "ants" / "broken.jpg").write_bytes(b"no image")
    open_splits(str(folder))
    with pytest.raises(InputError, match=r"broken\.jpg"):
        open_split(str(folder), "test")


def test_folder_without_splits_is_divided(folder):
    train, validation = open_splits(str(folder / "train"), validation_fraction=0.25)
    assert (train.size, validation.size) == (10, 3)
    check_divided(train, validation, 13)
    check_order(train)
    example = listed(validation)[1]
    assert Path(validation.file_name(int(example["index"]))).read_bytes() == example["encoded"]


def test_strange_names_are_read_and_hidden_files_are_not(tmp_path):
    names = [b"caf\xc3\xa9 \xe8\x9a\x82.png", b"two\nlines.png", b"latin\xe9.png", b"no extension", b"photo.txt"]
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
    assert [os.fsencode(os.path.basename(source.file_name(i))) for i in range(source.size)] == sorted(names)
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
    assert all(str(folder / "train" / name) in str(error.value) for name in names) and "--skip-bad" in str(error.value)


def test_files_that_are_no_images_are_skipped_and_counted(folder):
    bad_files(folder / "train")
    source = open_split(str(folder), "train", skip_bad=True)
    assert (source.size, source.skipped) == (13, 5)
    assert sorted(example["label"] for example in listed(source)) == [0] * 7 + [1] * 6
    assert open_splits(str(folder), skip_bad=True)[0].skipped == 5


def test_only_ten_bad_files_are_shown(folder):
    for i in range(30):
        (folder / "train" / "ants" / f"bad{i:02}.jpg").write_text("no image")
    with pytest.raises(InputError, match="30 of 43 files") as error:
        open_splits(str(folder))
    assert "bad09" in str(error.value) and "bad10" not in str(error.value)


def test_many_files_keep_their_labels(folder, monkeypatch):
    """More files than one thread looks at in one go."""
    monkeypatch.setattr(folder_module, "SNIFFED_AT_ONCE", 3)
    (folder / "train" / "ants" / "2b.png").write_text("no image")
    source = open_split(str(folder), "train", skip_bad=True)
    assert [(example["label"] == 1) == ("bees" in source.file_name(int(example["index"]))) for example in listed(source)] == [True] * 13
    assert "2b.png" not in "".join(map(source.file_name, range(13)))


def test_a_class_folder_without_images(folder):
    (folder / "train" / "crickets").mkdir()
    with pytest.raises(InputError, match="crickets' has no images"):
        open_splits(str(folder))
    (folder / "train" / "crickets" / "x.jpg").write_text("no image")
    with pytest.raises(InputError, match="crickets' has no images"):
        open_splits(str(folder), skip_bad=True)


def test_a_validation_class_that_training_does_not_have(folder):
    os.rename(folder / "val" / "bees", folder / "val" / "wasps")
    with pytest.raises(InputError, match="wasps"):
        open_splits(str(folder))


def test_folders_that_hold_no_data(tmp_path, folder):
    with pytest.raises(InputError, match=f"no folder '{tmp_path}/nowhere': expected {tmp_path}/nowhere/<class>/"):
        open_splits(f"{tmp_path}/nowhere")
    with pytest.raises(InputError, match=r"no folder './nowhere'"):
        open_splits("./nowhere")
    with pytest.raises(InputError, match=r"no images under .*: expected .*/<class>/\*.jpg; pass another folder as DATA"):
        open_splits(str(folder / "train" / "ants"))
    os.rename(folder / "train", folder / "test")
    with pytest.raises(InputError, match=r"no training images under .* beside 'val'"):
        open_splits(str(folder))


def test_a_split_that_is_not_there(folder, prepared):
    with pytest.raises(InputError, match="no split 'test': expected one of train, val"):
        open_split(str(folder), "test")
    with pytest.raises(InputError, match="no split 'validation' or 'val' or 'valid': expected one of train"):
        open_split("digits", "val")
    with pytest.raises(InputError, match="'numbers' has no split 'dev': expected one of train"):
        open_split("numbers", "dev", data_dir=prepared["tfrecord"])


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_prepared_records(prepared, file_format):
    source = open_split("numbers:1.2.3", "train", data_dir=prepared[file_format])
    assert (source.size, source.classes) == (NUMBERS, ("a", "b", "c"))
    assert source.file_name(17) == "numbers:1.2.3 train record 17"
    check_order(source)
    pixels = [decode(example["encoded"]).numpy() for example in listed(source)]
    written = [image[0, 0, 0] // 10 for image in pixels]
    assert sorted(written) == list(range(NUMBERS)) and written != sorted(written)  # TFDS shuffles what it prepares
    assert [example["label"] for example in listed(source)] == [number % 3 for number in written]
    np.testing.assert_array_equal(pixels[2], colour(written[2]))
    by_index = dict(enumerate(example["encoded"] for example in listed(source)))
    assert all(by_index[example["index"]] == example["encoded"] for example in listed(source, SEED))


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_prepared_records_are_divided(prepared, file_format):
    train, validation = open_splits("numbers", data_dir=prepared[file_format], validation_fraction=0.3)
    assert (train.size, validation.size) == (16, 7)
    check_divided(train, validation, NUMBERS)
    check_order(train)


def test_both_formats_hold_the_same(prepared):
    one, other = (open_split("numbers", "train", data_dir=prepared[each]) for each in ("tfrecord", "array_record"))
    assert listed(one) == listed(other)


def test_the_newest_version_and_the_only_configuration(prepared, tmp_path):
    for target in ("numbers/1.10.0", "numbers/1.9.0", "faces/small/1.0.0"):
        os.makedirs(tmp_path / target)
        for name in os.listdir(os.path.join(prepared["tfrecord"], "numbers", "1.2.3")):
            os.symlink(os.path.join(prepared["tfrecord"], "numbers", "1.2.3", name), tmp_path / target / name)
    assert sources_module.record_splits("numbers", str(tmp_path), False).keys() == {"train"}
    assert folder_of("numbers", tmp_path) == str(tmp_path / "numbers/1.10.0")
    assert folder_of("numbers:1.9.0", tmp_path) == str(tmp_path / "numbers/1.9.0")
    assert folder_of("numbers:1.2.3", tmp_path) is None
    assert folder_of("faces", tmp_path) == folder_of("faces/small", tmp_path) == str(tmp_path / "faces/small/1.0.0")
    assert open_split("faces/small", "train", data_dir=str(tmp_path)).size == NUMBERS
    os.rename(tmp_path / "numbers", tmp_path / "faces" / "large")
    with pytest.raises(InputError, match=r"several configurations .*large, small.*faces/large"):
        open_splits("faces", data_dir=str(tmp_path))


def folder_of(name, root):
    from vgg_jax.data.records import _prepared

    return _prepared(name, str(root))


def test_a_name_that_is_not_prepared(prepared, tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=f"no prepared data set 'mnist' under '{prepared['tfrecord']}' .*numbers.*--download, or --data-dir"
    ):
        open_splits("mnist", data_dir=prepared["tfrecord"])
    with pytest.raises(InputError, match=r"'imagenette/320px' .*no such folder"):
        open_splits("imagenette/320px", data_dir=str(tmp_path / "nowhere"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=f"'mnist' under '{tmp_path}'"):
        open_splits("mnist")
    with pytest.raises(InputError, match="data is 'no/such:name': expected 'digits', an image folder"):
        open_splits("no/such:name")


def test_an_unknown_name_is_not_downloaded(tmp_path):
    with pytest.raises(InputError, match="'no_such_data_set': TensorFlow Datasets knows no such name"):
        open_splits("no_such_data_set", data_dir=str(tmp_path), download=True)


def test_a_missing_file_of_a_prepared_set(prepared, tmp_path):
    os.makedirs(tmp_path / "numbers/1.2.3")
    for name in sorted(os.listdir(os.path.join(prepared["tfrecord"], "numbers", "1.2.3"))):
        if "00002-of" not in name:
            os.symlink(os.path.join(prepared["tfrecord"], "numbers", "1.2.3", name), tmp_path / "numbers/1.2.3" / name)
    with pytest.raises(InputError, match=r"1 of 4 files of numbers train are missing, the first is .*00002-of-00004"):
        open_splits("numbers", data_dir=str(tmp_path))


@pytest.mark.parametrize("folder_name", ["tfds", "tfds-array-record"])
def test_cifar10(shared_data, folder_name):
    source = open_split("cifar10", "test", data_dir=str(shared_data / folder_name))
    assert (source.size, len(source.classes)) == (10000, 10)
    reference = open_split("cifar10", "test", data_dir=str(shared_data / "tfds"))
    first, expected = (list(each.examples(None, 0).take(3).as_numpy_iterator()) for each in (source, reference))
    assert first == expected


def test_a_real_folder_with_a_stray(shared_data):
    train, validation = open_splits(str(shared_data / "ants-bees"))
    assert (train.size + validation.size, train.classes, train.skipped) == (398, ("ants", "bees"), 0)
    assert any(train.file_name(i).endswith("imageNotFound.gif") for i in range(train.size))
