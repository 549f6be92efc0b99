"""Images in memory: the same batches as from the files."""

import dataclasses
import os
import shutil

import numpy as np
import pytest

from tests.data.test_pipeline import by_example
from tests.helpers.tiny_data import encode, noise
from vgg_jax.configs.colours import IMAGENET
from vgg_jax.configs.train import TrainConfig
from vgg_jax.data import (
    cache,
    cache_in_memory,
    eval_batches,
    open_split,
    open_train_val,
    train_batches,
)
from vgg_jax.errors import InputError

TINY = TrainConfig(image_size=32, scale=(32, 40), batch_size=4, epochs=3, seed=5)


def photos_of_one_size(folder):
    """An image folder of 9 pictures, 20 by 30 pixels."""
    for i in range(9):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        (folder / "ab"[i % 2] / f"{i}.png").write_bytes(encode(noise(20, 30, i)))
    return open_split(str(folder), "train")


@pytest.fixture(
    params=["mixed sizes", "one size", "one size, large crops", "digits", "array_record"]
)
def source_and_config(request, tmp_path):
    """Storage that is found by index, whose order is the same in memory, and a configuration that uses it."""
    if request.param == "mixed sizes":
        return open_split(str(request.getfixturevalue("folder")), "train"), TINY
    if request.param == "digits":
        return open_train_val("digits", validation_fraction=0.99)[0], TINY
    if request.param == "array_record":
        return open_train_val(
            "numbers", data_dir=request.getfixturevalue("prepared")["array_record"]
        )[0], TINY
    large = dataclasses.replace(TINY, image_size=96, scale=(96, 100))
    return photos_of_one_size(tmp_path), large if "large" in request.param else TINY


def assert_equal(ones, others):
    ones, others = list(ones), list(others)
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - {"image"}:
            np.testing.assert_array_equal(one[key], other[key], key)
            assert one[key].dtype == other[key].dtype
        difference = np.abs(one["image"].astype(int) - other["image"])
        assert difference.max() <= 1 and np.count_nonzero(difference) <= 1e-4 * difference.size


def test_batches_from_memory_are_those_from_the_files(source_and_config):
    source, config = source_and_config
    held = cache_in_memory(source, config)
    assert (held.size, held.classes, held.name) == (source.size, source.classes, source.name)
    assert_equal(train_batches(held, config, IMAGENET), train_batches(source, config, IMAGENET))
    assert_equal(
        train_batches(held, config, IMAGENET, first_epoch=1, first_batch=2),
        train_batches(source, config, IMAGENET, first_epoch=1, first_batch=2),
    )
    assert_equal(eval_batches(held, config, 6), eval_batches(source, config, 6))


def test_pixels_are_held_of_small_images_of_one_size_only(folder, tmp_path_factory):
    alike = photos_of_one_size(tmp_path_factory.mktemp("alike"))
    pixels = cache_in_memory(alike, TINY).pixels
    assert pixels is not None and pixels.images.shape == (9, 20, 30, 3)
    assert (
        cache_in_memory(alike, dataclasses.replace(TINY, image_size=96, scale=(96,))).pixels is None
    )
    assert cache_in_memory(open_split(str(folder), "train"), TINY).pixels is None


def test_sequential_files_are_shuffled_anew_each_epoch_with_the_same_draws(prepared):
    source = open_split("numbers", "train", data_dir=prepared["tfrecord"])
    batches = list(train_batches(cache_in_memory(source, TINY), TINY, IMAGENET))
    ours, theirs = by_example(batches), by_example(train_batches(source, TINY, IMAGENET))
    assert ours.keys() == theirs.keys()
    for key, example in ours.items():
        np.testing.assert_array_equal(example["colour_shift"], theirs[key]["colour_shift"])
        assert (
            example["label"] == theirs[key]["label"]
            and np.abs(example["image"].astype(int) - theirs[key]["image"]).max() <= 1
        )
    indices = np.concatenate([batch["index"][batch["mask"]] for batch in batches]).reshape(
        3, source.size
    )
    assert all(sorted(epoch) == list(range(source.size)) for epoch in indices)
    assert len({tuple(epoch) for epoch in indices}) == 3


def test_the_files_are_not_read_again(tmp_path):
    source = photos_of_one_size(tmp_path)
    for config in (TINY, dataclasses.replace(TINY, image_size=96, scale=(96,))):
        held = cache_in_memory(source, config)
        expected = list(train_batches(source, config, IMAGENET))
        shutil.move(tmp_path / "a", tmp_path / "gone")
        assert_equal(train_batches(held, config, IMAGENET), expected)
        shutil.move(tmp_path / "gone", tmp_path / "a")


@pytest.mark.parametrize("first", [True, False])
def test_a_broken_image_is_named(tmp_path, first):
    source = photos_of_one_size(tmp_path)
    path = source.file_name(0 if first else 5)
    whole = encode(noise(20, 30))
    with open(path, "wb") as file:
        file.write(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"cannot decode '{path}'"):
        list(train_batches(cache_in_memory(source, TINY), TINY, IMAGENET))


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    source = photos_of_one_size(tmp_path)
    monkeypatch.setattr(cache, "free_memory", lambda: 1000.0)
    with pytest.raises(
        InputError,
        match=r"does not fit into memory: 9 of its 9 images take 2 times .*; leave out --cache",
    ):
        cache_in_memory(source, TINY)


def test_pixels_that_do_not_fit_are_decoded_anew(tmp_path, monkeypatch):
    source = photos_of_one_size(tmp_path)
    bytes_of = sum(
        len(example["encoded"]) for example in source.examples(None, 0).as_numpy_iterator()
    )
    monkeypatch.setattr(cache, "free_memory", lambda: 2.6 * bytes_of)
    assert cache_in_memory(source, TINY).pixels is None


def test_a_source_that_says_too_much_of_its_size_is_refused(tmp_path):
    source = photos_of_one_size(tmp_path)
    few = dataclasses.replace(
        source, examples=lambda seed, start=0: source.examples(seed, start).take(4)
    )
    with pytest.raises(InputError, match=r"says that it has 9 images, and has 4: prepare it again"):
        cache_in_memory(few, TINY)


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="needs Linux")
def test_free_memory_is_less_than_all_of_it():
    assert 1e6 < cache.free_memory() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_an_empty_source_stays_empty(folder):
    empty = open_train_val(str(folder / "train"), validation_fraction=0.0)[1]
    assert list(eval_batches(cache_in_memory(empty, TINY), TINY, 4)) == []
