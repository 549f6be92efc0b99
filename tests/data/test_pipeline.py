import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import write_folder
from tests.helpers.tiny_data import (
    NUMBERS,
    TINY_TRAIN,
    by_example,
    encode,
    indices,
    list_examples,
)
from vgg_jax.configs.colours import IMAGENET
from vgg_jax.data import (
    decode,
    eval_batches,
    open_split,
    open_train_val,
    rescaled_images,
    steps_per_epoch,
    train_batches,
)


@pytest.fixture(scope="module", params=["folder", "digits", "tfrecord", "array_record"])
def source(request, prepared, tmp_path_factory):
    """About 20 images of each kind of storage, without those held out for validation."""
    if request.param == "digits":
        return open_train_val("digits", validation_fraction=0.99)[0]
    if request.param == "folder":
        return open_split(str(write_folder(tmp_path_factory.mktemp("folder"))), "train")
    return open_train_val("numbers", data_dir=prepared[request.param])[0]


@pytest.fixture(scope="module")
def uninterrupted(source):
    """All training batches."""
    return list(train_batches(source, TINY_TRAIN, IMAGENET))


def assert_arrays_equal(actual, expected):
    assert actual.keys() == expected.keys()
    for key in actual:
        np.testing.assert_array_equal(actual[key], expected[key], key)


@pytest.mark.slow
def test_train_batches_have_each_image_once(source, uninterrupted):
    """In each epoch, in another order. The rest of the last batch is masked."""
    batches = uninterrupted
    per_epoch = steps_per_epoch(source, 4)
    assert per_epoch == int(np.ceil(source.size / 4)) and len(batches) == 3 * per_epoch
    shapes = {
        "image": ((4, 32, 32, 3), "uint8"),
        "colour_shift": ((4, 3), "float32"),
        "label": ((4,), "int32"),
        "mask": ((4,), "bool"),
        "index": ((4,), "int64"),
    }
    for batch in batches:
        assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == shapes
    expected = sorted(indices(source))
    orders = []
    for epoch in range(3):
        part = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        mask, index = (np.concatenate([batch[key] for batch in part]) for key in ("mask", "index"))
        assert mask.sum() == source.size and np.all(np.diff(mask.astype(int)) <= 0)
        assert np.all(index[~mask] == -1) and sorted(index[mask]) == expected
        orders.append(index[mask].tolist())
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.slow
def test_train_batches_resume(source, uninterrupted):
    """The last two positions depend on no storage, and each position takes time."""
    per_epoch = steps_per_epoch(source, 4)
    positions = [(0, 2), (1, per_epoch - 1), (2, 1), (1, 0), (0, per_epoch)]
    for epoch, batch in positions if source.name == "digits train" else positions[:3]:
        start = epoch * per_epoch + batch
        resumed = train_batches(source, TINY_TRAIN, IMAGENET, first_epoch=epoch, first_batch=batch)
        for actual, expected in zip(list(resumed), uninterrupted[start:], strict=True):
            assert_arrays_equal(actual, expected)
    assert list(train_batches(source, TINY_TRAIN, IMAGENET, first_epoch=3)) == []


@pytest.mark.slow
def test_draws_depend_on_seed_epoch_and_index(source, uninterrupted):
    """They do not depend on the batch size."""
    in_sevens = dataclasses.replace(TINY_TRAIN, batch_size=7)
    fours, sevens = map(by_example, (uninterrupted, train_batches(source, in_sevens, IMAGENET)))
    assert fours.keys() == sevens.keys() and len(fours) == 3 * source.size
    for key in fours:
        assert_arrays_equal(fours[key], sevens[key])
    shifts = np.array([example["colour_shift"] for example in fours.values()])
    assert len(np.unique(shifts, axis=0)) == len(shifts)
    reseeded = dataclasses.replace(TINY_TRAIN, seed=6)
    others = by_example(train_batches(source, reseeded, IMAGENET))
    for key in fours:
        assert not np.array_equal(fours[key]["colour_shift"], others[key]["colour_shift"])


def test_draws_do_not_depend_on_other_images(folder):
    """The last image by name is deleted. The others keep their index and their draws."""
    before = by_example(train_batches(open_split(str(folder), "train"), TINY_TRAIN, IMAGENET))
    (folder / "train" / "bees" / "5.png").unlink()
    after = by_example(train_batches(open_split(str(folder), "train"), TINY_TRAIN, IMAGENET))
    assert before.keys() - after.keys() == {(epoch, 12) for epoch in range(3)}
    for key in after:
        assert_arrays_equal(before[key], after[key])


@pytest.mark.slow
def test_eval_batches_repeat_all_examples_in_order(source):
    batches = eval_batches(source, TINY_TRAIN, 6)
    first, second = list(batches), list(batches)
    assert len(first) == steps_per_epoch(source, 6)
    assert all(batch["image"].shape == (6, 32, 32, 3) for batch in first)
    for one, other in zip(first, second, strict=True):
        assert_arrays_equal(one, other)
    examples = list_examples(source)
    mask, index, label, shift = (
        np.concatenate([batch[key] for batch in first])
        for key in ("mask", "index", "label", "colour_shift")
    )
    assert mask.sum() == source.size and not shift.any()
    assert index[mask].tolist() == [example["index"] for example in examples]
    assert label[mask].tolist() == [example["label"] for example in examples]


def test_eval_batches_of_empty_source(folder):
    empty = open_train_val(str(folder / "train"), validation_fraction=0.0)[1]
    assert list(eval_batches(empty, TINY_TRAIN, 4)) == []


def test_train_batches_labels_belong_to_images(prepared):
    """The colour of a record identifies its number, and the number its label."""
    source = open_split("numbers", "train", data_dir=prepared["tfrecord"])
    number_of = {
        int(example["index"]): int(decode(example["encoded"])[0, 0, 0]) // 10
        for example in source.examples(None, 0)
    }
    examples = by_example(train_batches(source, TINY_TRAIN, IMAGENET))
    for (_, index), example in examples.items():
        assert np.all(example["image"] == number_of[index] * 10)
        assert example["label"] == number_of[index] % 3


@pytest.mark.slow
@pytest.mark.parametrize("exif", [True, False])
def test_all_batches_apply_exif_alike(tmp_path, exif):
    """A JPEG that is red above blue if upright, and red left of blue as it is stored."""
    stored = np.zeros((40, 40, 3), np.uint8)
    stored[:, :20, 0] = stored[:, 20:, 2] = 255
    tags = Image.Exif()
    tags[0x112] = 6  # turn clockwise by a quarter
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(encode(stored, "JPEG", exif=tags, quality=95))
    config = dataclasses.replace(
        TINY_TRAIN, exif=exif, flip=False, colour_shift=0.0, scale=(32,), epochs=1
    )
    source = open_split(str(tmp_path), "train")
    images = [
        next(iter(train_batches(source, config, IMAGENET)))["image"][0],
        next(iter(eval_batches(source, config, 1)))["image"][0],
        next(iter(rescaled_images(source, (32,), config.exif)))["scaled"][0][0],
    ]
    expected = np.rot90(stored, -1) if exif else stored
    for image in images:
        assert image.shape == (32, 32, 3)
        assert np.abs(image[::31, ::31].astype(int) - expected[::39, ::39]).max() < 30


@pytest.mark.slow
@pytest.mark.parametrize("folder_name", ["tfds", "tfds-array-record"])
def test_train_batches_of_cifar10_resume(shared_data, folder_name):
    config = dataclasses.replace(TINY_TRAIN, batch_size=100, epochs=2)
    source, _ = open_train_val("cifar10", data_dir=str(shared_data / folder_name))
    stream = iter(train_batches(source, config, IMAGENET))
    batches = [next(stream) for _ in range(5)]
    resumed = iter(train_batches(source, config, IMAGENET, first_batch=3))
    for batch in batches[3:]:
        assert_arrays_equal(batch, next(resumed))
    labels = np.concatenate([batch["label"] for batch in batches])
    assert np.all(np.bincount(labels, minlength=10) > 20)  # 50 each expected


def test_numbers_is_no_multiple_of_a_batch():
    assert NUMBERS % 4 and NUMBERS % 6 and NUMBERS % 7
