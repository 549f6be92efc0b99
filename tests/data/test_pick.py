"""Some examples of a source, against the same ones of the whole source."""

import dataclasses

import numpy as np
import pytest

from tests.helpers.tiny_data import (
    TINY_TRAIN,
    by_example,
    check_order,
    encode,
    list_examples,
    noise,
)
from vgg_jax.arrays import check_arrays, whole_source
from vgg_jax.configs.colours import IMAGENET
from vgg_jax.data import cache_in_memory, open_split, open_train_val, tfds, train_batches
from vgg_jax.input_data import pick

CONFIG = dataclasses.replace(TINY_TRAIN, scale=(32, 34))
STORAGES = ["digits", "folder", "list", "tfrecord", "buffered tfrecord", "array_record"]


def list_file(root):
    lines = []
    for i in range(14):
        (root / f"{i}.png").write_bytes(encode(noise(20, 30 + i % 3, i)))
        lines.append(f"{i}.png,{'ab'[i % 2]},train\n")
    (root / "photos.csv").write_text("file,label,split\n" + "".join(lines))
    return str(root / "photos.csv")


@pytest.fixture(params=STORAGES)
def source(request, tmp_path, monkeypatch):
    """Training images of each storage, from which some are held out."""
    if request.param == "digits":
        return open_train_val("digits", validation_fraction=0.98)[0]
    if request.param == "folder":
        return open_train_val(str(request.getfixturevalue("folder") / "train"))[0]
    if request.param == "list":
        return open_train_val(list_file(tmp_path))[0]
    if request.param == "buffered tfrecord":
        monkeypatch.setattr(tfds, "MAX_BYTES_IN_MEMORY", 1000)
    folder = request.getfixturevalue("prepared")[request.param.split()[-1]]
    return open_train_val("numbers", data_dir=folder)[0]


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
    images, labels = np.stack([noise(20, 30, seed) for seed in range(9)]), np.arange(9) % 3
    source = whole_source(check_arrays(images, labels, "x"), "x train")
    source = dataclasses.replace(source, indices=np.array([0, 2, 3, 5, 8]))
    picked = pick(source, np.array([4, 1]))
    assert (picked.size, picked.indices.tolist(), picked.labels.tolist()) == (2, [2, 8], [2, 2])
    assert picked.file_name(8) == source.file_name(8) == "x train 8"


def test_pick_of_whole_split(folder):
    source = open_split(str(folder), "train")
    check_picked(source, range(13))
