import os

import numpy as np
import pytest

from tests.helpers.tiny_data import check_divided, check_order, indices, list_examples
from vgg_jax.data import VALIDATION, decode, open_split, open_train_val
from vgg_jax.errors import InputError


def test_digits_equal_scikit_learn():
    from sklearn.datasets import load_digits

    source = open_split("digits", "train")
    assert (source.size, source.classes, source.skipped) == (1797, tuple("0123456789"), ())
    assert source.file_name(17) == "digits train record 17"
    images, targets = load_digits(return_X_y=True)
    for example in list_examples(source)[::100]:
        index = example["index"]
        assert example["label"] == targets[index]
        values = decode(example["encoded"])[..., 1].numpy().ravel() * (16 / 255)
        np.testing.assert_allclose(values, images[index], atol=0.04)


@pytest.mark.slow
def test_digits_are_divided_by_seed():
    train, validation = open_train_val("digits")
    assert (train.size, validation.size) == (1617, 180)
    check_divided(train, validation, 1797)
    check_order(validation)
    assert indices(validation) == indices(open_train_val("digits")[1])
    assert indices(validation) != indices(open_train_val("digits", seed=1)[1])


@pytest.mark.parametrize("name", VALIDATION)
def test_validation_split_has_three_names(folder, name):
    assert VALIDATION == ("validation", "val", "valid")
    os.rename(folder / "val", folder / name)
    assert open_train_val(str(folder))[1].size == 5
    assert [open_split(str(folder), alias).size for alias in VALIDATION] == [5, 5, 5]


def test_open_split_that_does_not_exist(folder, prepared):
    with pytest.raises(InputError, match="no split 'test': expected one of train, val"):
        open_split(str(folder), "test")
    with pytest.raises(InputError, match="'digits' has no split 'val': expected one of train"):
        open_split("digits", "val")
    with pytest.raises(InputError, match="'numbers' has no split 'dev': expected one of train"):
        open_split("numbers", "dev", data_dir=prepared["tfrecord"])
