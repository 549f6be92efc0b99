import os
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.tiny_data import (
    NUMBERS,
    SEED,
    check_divided,
    check_order,
    colour,
    list_examples,
)
from vgg_jax.data import decode, open_split, open_train_val, tfds
from vgg_jax.data.splits import epoch_seeds
from vgg_jax.data.tfds import find_prepared, record_splits
from vgg_jax.division import BY_A_BUFFER
from vgg_jax.errors import InputError

FORMATS = ("tfrecord", "array_record")


def link_prepared(prepared, target, without="nothing"):
    """Links the files of the prepared data set into another folder."""
    source = os.path.join(prepared["tfrecord"], "numbers", "1.2.3")
    os.makedirs(target)
    for name in os.listdir(source):
        if without not in name:
            os.symlink(os.path.join(source, name), target / name)


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FORMATS)
def test_records_equal_what_was_prepared(prepared, file_format):
    source = open_split("numbers:1.2.3", "train", data_dir=prepared[file_format])
    assert (source.size, source.classes) == (NUMBERS, ("a", "b", "c"))
    assert source.file_name(17) == "numbers:1.2.3 train record 17"
    check_order(source)
    examples = list_examples(source)
    pixels = [decode(example["encoded"]).numpy() for example in examples]
    numbers = [image[0, 0, 0] // 10 for image in pixels]
    # TFDS shuffles the records that it prepares.
    assert sorted(numbers) == list(range(NUMBERS)) and numbers != sorted(numbers)
    assert [example["label"] for example in examples] == [number % 3 for number in numbers]
    np.testing.assert_array_equal(pixels[2], colour(numbers[2]))
    for example in list_examples(source, SEED):
        assert examples[example["index"]]["encoded"] == example["encoded"]


@pytest.mark.slow
@pytest.mark.parametrize("file_format", FORMATS)
def test_records_are_divided(prepared, file_format):
    train, validation = open_train_val(
        "numbers", data_dir=prepared[file_format], validation_fraction=0.3
    )
    assert (train.size, validation.size) == (16, 7)
    check_divided(train, validation, NUMBERS)
    check_order(train)


def test_records_of_both_formats_are_equal(prepared):
    one, other = (
        open_split("numbers", "train", data_dir=prepared[file_format]) for file_format in FORMATS
    )
    assert list_examples(one) == list_examples(other)


def test_find_prepared_version_and_config(prepared, tmp_path):
    """It finds the newest version and the only configuration."""
    root = str(tmp_path)
    for target in ("numbers/1.10.0", "numbers/1.9.0", "faces/small/1.0.0"):
        link_prepared(prepared, tmp_path / target)
    assert record_splits("numbers", root, (), False).keys() == {"train"}
    assert find_prepared("numbers", root) == f"{root}/numbers/1.10.0"
    assert find_prepared("numbers:1.9.0", root) == f"{root}/numbers/1.9.0"
    assert find_prepared("numbers:1.2.3", root) is None
    assert find_prepared("faces", root) == f"{root}/faces/small/1.0.0"
    assert find_prepared("faces/small", root) == f"{root}/faces/small/1.0.0"
    assert open_split("faces/small", "train", data_dir=root).size == NUMBERS
    os.rename(tmp_path / "numbers", tmp_path / "faces" / "large")
    with pytest.raises(InputError, match=r"several configurations .*large, small.*faces/large"):
        open_train_val("faces", data_dir=root)


def test_records_not_prepared(prepared, tmp_path, monkeypatch):
    root = prepared["tfrecord"]
    message = f"no prepared data set 'mnist' under '{root}' .*numbers.*--download, or --data-dir"
    with pytest.raises(InputError, match=message):
        open_train_val("mnist", data_dir=root)
    with pytest.raises(InputError, match=r"'imagenette/320px' .*no such folder"):
        open_train_val("imagenette/320px", data_dir=str(tmp_path / "nowhere"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=f"'mnist' under '{tmp_path}'"):
        open_train_val("mnist")
    message = "data is 'no/such:name': expected 'digits', an image folder"
    with pytest.raises(InputError, match=message):
        open_train_val("no/such:name")


def test_download_of_unknown_name(tmp_path):
    message = "'no_such_data_set': TensorFlow Datasets knows no such name"
    with pytest.raises(InputError, match=message):
        open_train_val("no_such_data_set", data_dir=str(tmp_path), download=True)


def test_records_with_missing_file(prepared, tmp_path):
    link_prepared(prepared, tmp_path / "numbers/1.2.3", without="00002-of")
    message = r"1 of 4 files of numbers train are missing, the first is .*00002-of-00004"
    with pytest.raises(InputError, match=message):
        open_train_val("numbers", data_dir=str(tmp_path))


@pytest.mark.parametrize("folder_name", ["tfds", "tfds-array-record"])
def test_records_of_cifar10(shared_data, folder_name):
    source = open_split("cifar10", "test", data_dir=str(shared_data / folder_name))
    assert (source.size, len(source.classes)) == (10000, 10)
    reference = open_split("cifar10", "test", data_dir=str(shared_data / "tfds"))
    actual, expected = (
        list(examples.take(3).as_numpy_iterator())
        for examples in (source.examples(None, 0), reference.examples(None, 0))
    )
    assert actual == expected


def places(reader, size, epochs):
    """The place of each record in each epoch, int (epochs, size)."""
    places = np.empty((epochs, size), int)
    for epoch in range(epochs):
        seed, _ = epoch_seeds(0, tf.constant(epoch, tf.int64))
        batches = reader(seed).map(lambda example: example["index"]).batch(size)
        (order,) = batches.as_numpy_iterator()
        assert len(order) == size
        places[epoch, np.argsort(np.argsort(order))] = np.arange(size)
    return places


def reader_of(files, version):
    """A reader of all records of 10 bytes each."""
    buffer = tfds._shuffle_buffer(files.num_examples, 10 * files.num_examples, version)
    select = tfds._tfrecord_selector(files, buffer, lambda record: record, version)
    return select(np.arange(files.num_examples))


def largest_correlation(places):
    epochs = len(places)
    return np.abs(np.corrcoef(places) - np.eye(epochs)).max()


@pytest.fixture(scope="module")
def five_files(tmp_path_factory):
    """5,000 records in five TFRecord files, as CIFAR-10's 45,000 are stored."""
    folder = tmp_path_factory.mktemp("five_files")
    paths = [str(folder / f"{i}.tfrecord") for i in range(5)]
    for i, path in enumerate(paths):
        with tf.io.TFRecordWriter(path) as writer:
            for j in range(1000):
                writer.write(f"{i} {j}".encode())
    return SimpleNamespace(filepaths=paths, shard_lengths=[1000] * 5, num_examples=5000)


@pytest.mark.slow
def test_records_that_fit_into_memory_are_shuffled_completely(five_files, monkeypatch):
    in_epochs = places(reader_of(five_files, 2), 5000, epochs=8)
    assert largest_correlation(in_epochs) < 5 / np.sqrt(5000)
    neighbours = np.abs(np.diff(in_epochs)).mean() / 5000
    assert abs(neighbours - 1 / 3) < 0.01  # the mean distance of two random places
    monkeypatch.setattr(tfds, "SHUFFLE_BUFFER_OF_VERSION_1", 5000 * 8192 // 45000)
    assert largest_correlation(places(reader_of(five_files, 1), 5000, epochs=2)) > 0.7


@pytest.mark.slow
def test_larger_records_are_shuffled_by_files_and_a_buffer(five_files, monkeypatch):
    """The correlation of two epochs is that of five random rotations: 0 on average."""
    monkeypatch.setattr(tfds, "MAX_BYTES_IN_MEMORY", 10_000)  # a fifth of the records
    in_epochs = places(reader_of(five_files, 2), 5000, epochs=12)
    correlations = np.corrcoef(in_epochs)[np.triu_indices(12, 1)]
    assert abs(correlations.mean()) < 0.1 and np.abs(correlations).max() < 0.6
    assert all(sorted(place) == list(range(5000)) for place in in_epochs.tolist())


def test_records_in_memory_of_another_number(five_files):
    files = SimpleNamespace(**vars(five_files) | {"num_examples": 5001})
    with pytest.raises(tf.errors.OpError, match="5000 records instead of 5001: prepare it again"):
        next(iter(reader_of(files, 2)(SEED)))


def test_storage_tells_whether_records_fit_into_memory(prepared, monkeypatch):
    """The order of a larger split changes if `cache` keeps it in memory."""

    def storage(**options):
        return open_train_val("numbers", data_dir=prepared["tfrecord"], **options)[0].storage

    assert storage() == "numbers/1.2.3 tfrecord"
    monkeypatch.setattr(tfds, "MAX_BYTES_IN_MEMORY", 1000)
    assert storage() == f"numbers/1.2.3 tfrecord{BY_A_BUFFER}"
    assert storage(version=1) == "numbers/1.2.3 tfrecord"


@pytest.mark.slow
def test_large_records_resume(prepared, monkeypatch):
    monkeypatch.setattr(tfds, "MAX_BYTES_IN_MEMORY", 1000)
    check_order(open_split("numbers", "train", data_dir=prepared["tfrecord"]))


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_records_of_cifar10_are_shuffled(shared_data, version):
    source, _ = open_train_val("cifar10", data_dir=str(shared_data / "tfds"), version=version)
    correlation = largest_correlation(places(source.examples, source.size, epochs=2))
    assert correlation > 0.5 if version == 1 else correlation < 5 / np.sqrt(source.size)
