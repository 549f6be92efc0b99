"""Batches of cached images, against those read from the files."""

import dataclasses
import os
import shutil

import numpy as np
import pytest

from tests.helpers.tiny_data import TINY_TRAIN, by_example, encode, list_examples, noise
from vgg_jax.configs.colours import IMAGENET
from vgg_jax.data import (
    cache,
    cache_in_memory,
    eval_batches,
    open_split,
    open_train_val,
    steps_per_epoch,
    train_batches,
)
from vgg_jax.errors import InputError

# The test of `crop_batch` has more scales. Each takes time for its matrices.
FEW_SCALES = dataclasses.replace(TINY_TRAIN, scale=(32, 34))
LARGE_CROPS = dataclasses.replace(TINY_TRAIN, image_size=96, scale=(96, 100))


def photos_of_one_size(folder):
    """An image folder with 9 images of 20x30 pixels."""
    for i in range(9):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        (folder / "ab"[i % 2] / f"{i}.png").write_bytes(encode(noise(20, 30, i)))
    return open_split(str(folder), "train")


@pytest.fixture(params=["mixed sizes", "one size, large crops", "digits", "array_record"])
def source_and_config(request, tmp_path):
    """Storage with random access, whose order is the same in memory, and a configuration."""
    if request.param == "mixed sizes":
        return open_split(str(request.getfixturevalue("folder")), "train"), FEW_SCALES
    if request.param == "digits":
        return open_train_val("digits", validation_fraction=0.99)[0], FEW_SCALES
    if request.param == "array_record":
        folder = request.getfixturevalue("prepared")["array_record"]
        return open_train_val("numbers", data_dir=folder)[0], FEW_SCALES
    return photos_of_one_size(tmp_path), LARGE_CROPS


def assert_batches_equal(actual, expected):
    """Pixels may differ by one level in one of 10,000 values: sums have another order."""
    actual, expected = list(actual), list(expected)
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"image"}:
            np.testing.assert_array_equal(one[key], other[key], key)
            assert one[key].dtype == other[key].dtype
        difference = np.abs(one["image"].astype(int) - other["image"])
        assert difference.max() <= 1 and np.count_nonzero(difference) <= 1e-4 * difference.size


@pytest.mark.slow
def test_cached_batches_equal_those_of_files(source_and_config):
    source, config = source_and_config
    cached = cache_in_memory(source, config)
    assert (cached.size, cached.classes, cached.name) == (source.size, source.classes, source.name)
    expected = list(train_batches(source, config, IMAGENET))
    assert_batches_equal(train_batches(cached, config, IMAGENET), expected)
    resumed = train_batches(cached, config, IMAGENET, first_epoch=1, first_batch=2)
    assert_batches_equal(resumed, expected[steps_per_epoch(source, config.batch_size) + 2 :])
    assert_batches_equal(eval_batches(cached, config, 6), eval_batches(source, config, 6))


def test_cache_decodes_small_images_of_one_size(folder, tmp_path_factory):
    same_size = photos_of_one_size(tmp_path_factory.mktemp("same_size"))
    pixels = cache_in_memory(same_size, FEW_SCALES).pixels
    assert pixels is not None and pixels.images.shape == (9, 20, 30, 3)
    large = dataclasses.replace(FEW_SCALES, image_size=96, scale=(96,))
    assert cache_in_memory(same_size, large).pixels is None
    assert cache_in_memory(open_split(str(folder), "train"), FEW_SCALES).pixels is None


def test_cached_records_are_shuffled_each_epoch(prepared):
    """Records that are read from the beginning have another order in memory, but equal draws."""
    source = open_split("numbers", "train", data_dir=prepared["tfrecord"])
    batches = list(train_batches(cache_in_memory(source, FEW_SCALES), FEW_SCALES, IMAGENET))
    actual = by_example(batches)
    expected = by_example(train_batches(source, FEW_SCALES, IMAGENET))
    assert actual.keys() == expected.keys()
    for key, example in actual.items():
        np.testing.assert_array_equal(example["colour_shift"], expected[key]["colour_shift"])
        assert example["label"] == expected[key]["label"]
        assert np.abs(example["image"].astype(int) - expected[key]["image"]).max() <= 1
    indices = np.concatenate([batch["index"][batch["mask"]] for batch in batches])
    epochs = indices.reshape(3, source.size)
    assert all(sorted(epoch) == list(range(source.size)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.slow
def test_cached_files_are_not_read_again(tmp_path):
    source = photos_of_one_size(tmp_path)
    for config in (FEW_SCALES, dataclasses.replace(FEW_SCALES, image_size=96, scale=(96,))):
        cached = cache_in_memory(source, config)
        expected = list(train_batches(source, config, IMAGENET))
        shutil.move(tmp_path / "a", tmp_path / "moved")
        assert_batches_equal(train_batches(cached, config, IMAGENET), expected)
        shutil.move(tmp_path / "moved", tmp_path / "a")


@pytest.mark.parametrize("position", [0, 5])
def test_cache_names_broken_image(tmp_path, position):
    source = photos_of_one_size(tmp_path)
    path = source.file_name(position)
    intact = encode(noise(20, 30))
    with open(path, "wb") as file:
        file.write(intact[: len(intact) // 2])
    with pytest.raises(InputError, match=f"cannot decode '{path}'"):
        list(train_batches(cache_in_memory(source, FEW_SCALES), FEW_SCALES, IMAGENET))


def test_cache_refuses_what_does_not_fit(tmp_path, monkeypatch):
    source = photos_of_one_size(tmp_path)
    monkeypatch.setattr(cache, "free_memory", lambda: 1000.0)
    message = r"does not fit into memory: 9 of its 9 images take 2 times .*; leave out --cache"
    with pytest.raises(InputError, match=message):
        cache_in_memory(source, FEW_SCALES)


def test_cache_without_pixels_that_do_not_fit(tmp_path, monkeypatch):
    source = photos_of_one_size(tmp_path)
    num_bytes = sum(len(example["encoded"]) for example in list_examples(source))
    monkeypatch.setattr(cache, "free_memory", lambda: 2.6 * num_bytes)
    assert cache_in_memory(source, FEW_SCALES).pixels is None


def test_cache_refuses_source_of_wrong_size(tmp_path):
    source = photos_of_one_size(tmp_path)
    too_few = dataclasses.replace(
        source, examples=lambda seed, start=0: source.examples(seed, start).take(4)
    )
    message = "should have 9 images, but has 4: prepare it again"
    with pytest.raises(InputError, match=message):
        cache_in_memory(too_few, FEW_SCALES)


def test_cache_empty_source(folder):
    empty = open_train_val(str(folder / "train"), validation_fraction=0.0)[1]
    assert list(eval_batches(cache_in_memory(empty, FEW_SCALES), FEW_SCALES, 4)) == []


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="needs Linux")
def test_free_memory_is_below_total():
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 1e6 < cache.free_memory() < total
