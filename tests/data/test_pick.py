"""Some examples of a source, against the same ones of the whole source."""

import dataclasses

import numpy as np
import pytest

from tests.helpers.storages import FILE_STORAGES, arrays, open_storage
from tests.helpers.tiny_data import TINY_TRAIN, by_example, check_order, list_examples
from vgg_jax.arrays import check_arrays, whole_source
from vgg_jax.configs.colours import IMAGENET
from vgg_jax.data import cache_in_memory, open_split, train_batches
from vgg_jax.input_data import pick

CONFIG = dataclasses.replace(TINY_TRAIN, scale=(32, 34))


@pytest.fixture(params=FILE_STORAGES)
def source(request, tmp_path, monkeypatch):
    return open_storage(request.param, tmp_path, request, monkeypatch)


def check_picked(source, positions):
    expected = list_examples(source)
    picked = pick(source, np.array(positions))
    assert picked.size == len(positions)
    check_order(picked)
    for example, position in zip(list_examples(picked), sorted(positions), strict=True):
        assert example == expected[position]
        assert example["index"] == source.indices[position]
        assert picked.file_name(example["index"]) == source.file_name(source.indices[position])
    return picked


@pytest.mark.slow
@pytest.mark.parametrize("cache", [False, True], ids=["stored", "cached"])
def test_picked_examples_keep_index_label_and_draws(source, cache):
    """Also if some of them are picked again."""
    if cache:
        source = cache_in_memory(source, CONFIG)
    assert [example["index"] for example in list_examples(source)] == source.indices.tolist()
    picked = check_picked(source, [10, 1, 4, 5, 3, 8, 7])
    check_picked(picked, [6, 0, 2, 3, 4, 5])
    if picked.labels is not None:
        assert picked.labels.tolist() == [example["label"] for example in list_examples(picked)]
    assert (picked.pixels is None) == (source.pixels is None)
    whole = by_example(train_batches(source, CONFIG, IMAGENET))
    part = by_example(train_batches(picked, dataclasses.replace(CONFIG, batch_size=5), IMAGENET))
    assert part.keys() == {(epoch, i) for epoch in range(3) for i in picked.indices.tolist()}
    for key, example in part.items():
        for name in example:
            np.testing.assert_array_equal(example[name], whole[key][name], name)


def test_pick_of_arrays():
    source = whole_source(check_arrays(*arrays(9), "x"), "x train")
    source = dataclasses.replace(source, indices=np.array([0, 2, 3, 5, 8]))
    picked = pick(source, np.array([4, 1]))
    assert (picked.size, picked.indices.tolist(), picked.labels.tolist()) == (2, [2, 8], [0, 0])
    assert picked.file_name(8) == source.file_name(8) == "x train 8"


def test_pick_of_whole_split(folder):
    source = open_split(str(folder), "train")
    check_picked(source, range(13))
