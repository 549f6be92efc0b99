import os

import numpy as np
import pytest

from tests.helpers.tiny_data import (
    NUMBERS,
    SEED,
    check_divided,
    check_order,
    colour,
    list_examples,
)
from vgg_jax.data import decode, open_split, open_train_val
from vgg_jax.data.tfds import find_prepared, record_splits
from vgg_jax.errors import InputError

FORMATS = ("tfrecord", "array_record")


def link_prepared(prepared, target, without="nothing"):
    """Links the files of the prepared data set into another folder."""
    source = os.path.join(prepared["tfrecord"], "numbers", "1.2.3")
    os.makedirs(target)
    for name in os.listdir(source):
        if without not in name:
            os.symlink(os.path.join(source, name), target / name)


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
