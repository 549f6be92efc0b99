import os

import numpy as np
import pytest

from tests.helpers.tiny_data import NUMBERS, SEED, check_divided, check_order, colour, listed
from vgg_jax.data import decode, open_split, open_train_val
from vgg_jax.data import sources as sources_module
from vgg_jax.errors import InputError


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_prepared_records(prepared, file_format):
    source = open_split("numbers:1.2.3", "train", data_dir=prepared[file_format])
    assert (source.size, source.classes) == (NUMBERS, ("a", "b", "c"))
    assert source.file_name(17) == "numbers:1.2.3 train record 17"
    check_order(source)
    pixels = [decode(example["encoded"]).numpy() for example in listed(source)]
    written = [image[0, 0, 0] // 10 for image in pixels]
    assert sorted(written) == list(range(NUMBERS)) and written != sorted(
        written
    )  # TFDS shuffles what it prepares
    assert [example["label"] for example in listed(source)] == [number % 3 for number in written]
    np.testing.assert_array_equal(pixels[2], colour(written[2]))
    by_index = dict(enumerate(example["encoded"] for example in listed(source)))
    assert all(by_index[example["index"]] == example["encoded"] for example in listed(source, SEED))


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_prepared_records_are_divided(prepared, file_format):
    train, validation = open_train_val(
        "numbers", data_dir=prepared[file_format], validation_fraction=0.3
    )
    assert (train.size, validation.size) == (16, 7)
    check_divided(train, validation, NUMBERS)
    check_order(train)


def test_both_formats_hold_the_same(prepared):
    one, other = (
        open_split("numbers", "train", data_dir=prepared[each])
        for each in ("tfrecord", "array_record")
    )
    assert listed(one) == listed(other)


def test_the_newest_version_and_the_only_configuration(prepared, tmp_path):
    for target in ("numbers/1.10.0", "numbers/1.9.0", "faces/small/1.0.0"):
        os.makedirs(tmp_path / target)
        for name in os.listdir(os.path.join(prepared["tfrecord"], "numbers", "1.2.3")):
            os.symlink(
                os.path.join(prepared["tfrecord"], "numbers", "1.2.3", name),
                tmp_path / target / name,
            )
    assert sources_module.record_splits("numbers", str(tmp_path), (), False).keys() == {"train"}
    assert folder_of("numbers", tmp_path) == str(tmp_path / "numbers/1.10.0")
    assert folder_of("numbers:1.9.0", tmp_path) == str(tmp_path / "numbers/1.9.0")
    assert folder_of("numbers:1.2.3", tmp_path) is None
    assert (
        folder_of("faces", tmp_path)
        == folder_of("faces/small", tmp_path)
        == str(tmp_path / "faces/small/1.0.0")
    )
    assert open_split("faces/small", "train", data_dir=str(tmp_path)).size == NUMBERS
    os.rename(tmp_path / "numbers", tmp_path / "faces" / "large")
    with pytest.raises(InputError, match=r"several configurations .*large, small.*faces/large"):
        open_train_val("faces", data_dir=str(tmp_path))


def folder_of(name, root):
    from vgg_jax.data.tfds import _prepared

    return _prepared(name, str(root))


def test_a_name_that_is_not_prepared(prepared, tmp_path, monkeypatch):
    with pytest.raises(
        InputError,
        match=f"no prepared data set 'mnist' under '{prepared['tfrecord']}' .*numbers.*--download, or --data-dir",
    ):
        open_train_val("mnist", data_dir=prepared["tfrecord"])
    with pytest.raises(InputError, match=r"'imagenette/320px' .*no such folder"):
        open_train_val("imagenette/320px", data_dir=str(tmp_path / "nowhere"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=f"'mnist' under '{tmp_path}'"):
        open_train_val("mnist")
    with pytest.raises(
        InputError, match="data is 'no/such:name': expected 'digits', an image folder"
    ):
        open_train_val("no/such:name")


def test_an_unknown_name_is_not_downloaded(tmp_path):
    with pytest.raises(
        InputError, match="'no_such_data_set': TensorFlow Datasets knows no such name"
    ):
        open_train_val("no_such_data_set", data_dir=str(tmp_path), download=True)


def test_a_missing_file_of_a_prepared_set(prepared, tmp_path):
    os.makedirs(tmp_path / "numbers/1.2.3")
    for name in sorted(os.listdir(os.path.join(prepared["tfrecord"], "numbers", "1.2.3"))):
        if "00002-of" not in name:
            os.symlink(
                os.path.join(prepared["tfrecord"], "numbers", "1.2.3", name),
                tmp_path / "numbers/1.2.3" / name,
            )
    with pytest.raises(
        InputError,
        match=r"1 of 4 files of numbers train are missing, the first is .*00002-of-00004",
    ):
        open_train_val("numbers", data_dir=str(tmp_path))


@pytest.mark.parametrize("folder_name", ["tfds", "tfds-array-record"])
def test_cifar10(shared_data, folder_name):
    source = open_split("cifar10", "test", data_dir=str(shared_data / folder_name))
    assert (source.size, len(source.classes)) == (10000, 10)
    reference = open_split("cifar10", "test", data_dir=str(shared_data / "tfds"))
    first, expected = (
        list(each.examples(None, 0).take(3).as_numpy_iterator()) for each in (source, reference)
    )
    assert first == expected
