import dataclasses

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny_data import NUMBERS, encode
from vgg_jax.configs.colours import IMAGENET
from vgg_jax.configs.train import TrainConfig
from vgg_jax.data import (
    decode,
    eval_batches,
    open_split,
    open_train_val,
    rescaled_images,
    steps_per_epoch,
    train_batches,
)

TINY = TrainConfig(image_size=32, scale=(32, 40), batch_size=4, epochs=3, seed=5)


@pytest.fixture(params=["folder", "digits", "tfrecord", "array_record"])
def source(request):
    """About 20 images of each kind of storage, as a part that validation has left over."""
    if request.param == "digits":
        return open_train_val("digits", validation_fraction=0.99)[0]
    if request.param == "folder":
        return open_split(str(request.getfixturevalue("folder")), "train")
    return open_train_val("numbers", data_dir=request.getfixturevalue("prepared")[request.param])[0]


def by_example(batches):
    """{(epoch, index): the example's arrays}; masked examples are left out. Epochs are told by the index coming again."""
    seen, found = {}, {}
    for batch in batches:
        for i in np.flatnonzero(batch["mask"]):
            index = int(batch["index"][i])
            seen[index] = seen.get(index, -1) + 1
            found[seen[index], index] = {
                key: batch[key][i] for key in ("image", "colour_shift", "label")
            }
    return found


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], key)


def test_every_epoch_has_every_image_once_and_a_mask(source):
    batches = list(train_batches(source, TINY, IMAGENET))
    per_epoch = steps_per_epoch(source, 4)
    assert per_epoch == int(np.ceil(source.size / 4)) and len(batches) == 3 * per_epoch
    shapes = {
        "image": ((4, 32, 32, 3), "uint8"),
        "colour_shift": ((4, 3), "float32"),
        "label": ((4,), "int32"),
        "mask": ((4,), "bool"),
        "index": ((4,), "int64"),
    }
    expected = sorted(
        int(example["index"]) for example in source.examples(None, 0).as_numpy_iterator()
    )
    orders = []
    for epoch in range(3):
        part = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert all(
            {key: (value.shape, value.dtype.name) for key, value in batch.items()} == shapes
            for batch in part
        )
        mask, index = (np.concatenate([batch[key] for batch in part]) for key in ("mask", "index"))
        assert mask.sum() == source.size and np.all(np.diff(mask.astype(int)) <= 0)
        assert np.all(index[~mask] == -1) and sorted(index[mask]) == expected
        orders.append(index[mask].tolist())
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_resumed_run_sees_the_same_batches(source):
    whole = list(train_batches(source, TINY, IMAGENET))
    per_epoch = steps_per_epoch(source, 4)
    for epoch, batch in ((0, 2), (1, 0), (1, per_epoch - 1), (0, per_epoch), (2, 1)):
        resumed = list(train_batches(source, TINY, IMAGENET, first_epoch=epoch, first_batch=batch))
        assert len(resumed) == len(whole) - epoch * per_epoch - batch
        for one, other in zip(whole[epoch * per_epoch + batch :], resumed, strict=True):
            assert_equal(one, other)
    assert list(train_batches(source, TINY, IMAGENET, first_epoch=3)) == []


def test_draws_depend_on_seed_epoch_and_index_only(source):
    fours, sevens = (
        by_example(train_batches(source, dataclasses.replace(TINY, batch_size=size), IMAGENET))
        for size in (4, 7)
    )
    assert fours.keys() == sevens.keys() and len(fours) == 3 * source.size
    for key in fours:
        assert_equal(fours[key], sevens[key])
    shifts = np.array([example["colour_shift"] for example in fours.values()])
    assert len(np.unique(shifts, axis=0)) == len(shifts)
    other = by_example(train_batches(source, dataclasses.replace(TINY, seed=6), IMAGENET))
    assert not any(
        np.array_equal(fours[key]["colour_shift"], other[key]["colour_shift"]) for key in fours
    )


def test_draws_do_not_depend_on_the_rest_of_the_data(folder):
    """The last image by name goes; the others keep their index and what is drawn for them."""
    before = by_example(train_batches(open_split(str(folder), "train"), TINY, IMAGENET))
    (folder / "train" / "bees" / "5.png").unlink()
    after = by_example(train_batches(open_split(str(folder), "train"), TINY, IMAGENET))
    assert before.keys() - after.keys() == {(epoch, 12) for epoch in range(3)}
    for key in after:
        assert_equal(before[key], after[key])


def test_eval_batches_are_all_examples_in_order_at_each_pass(source):
    batches = eval_batches(source, TINY, 6)
    first, second = list(batches), list(batches)
    assert len(first) == steps_per_epoch(source, 6) and all(
        batch["image"].shape == (6, 32, 32, 3) for batch in first
    )
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)
    examples = list(source.examples(None, 0).as_numpy_iterator())
    mask, index, label, shift = (
        np.concatenate([batch[key] for batch in first])
        for key in ("mask", "index", "label", "colour_shift")
    )
    assert mask.sum() == source.size and not shift.any()
    assert index[mask].tolist() == [example["index"] for example in examples]
    assert label[mask].tolist() == [example["label"] for example in examples]


def test_labels_belong_to_images(prepared):
    """The colour of a record tells its number, and the number its label."""
    source = open_split("numbers", "train", data_dir=prepared["tfrecord"])
    number_of = {
        int(example["index"]): int(decode(example["encoded"])[0, 0, 0]) // 10
        for example in source.examples(None, 0)
    }
    for (_, index), example in by_example(train_batches(source, TINY, IMAGENET)).items():
        assert (
            np.all(example["image"] == number_of[index] * 10)
            and example["label"] == number_of[index] % 3
        )


@pytest.mark.parametrize("exif", [True, False])
def test_training_evaluation_and_prediction_turn_photos_alike(tmp_path, exif):
    """A JPEG that lies on its side: red above blue when it is upright, red left of blue as it is stored."""
    stored = np.zeros((40, 40, 3), np.uint8)
    stored[:, :20, 0] = stored[:, 20:, 2] = 255
    tag = Image.Exif()
    tag[0x112] = 6  # to be turned clockwise by a quarter
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").write_bytes(encode(stored, "JPEG", exif=tag, quality=95))
    config = dataclasses.replace(
        TINY, exif=exif, flip=False, colour_shift=0.0, scale=(32,), epochs=1
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


def test_an_empty_source_has_no_batches(folder):
    empty = open_train_val(str(folder / "train"), validation_fraction=0.0)[1]
    assert list(eval_batches(empty, TINY, 4)) == []


@pytest.mark.parametrize("folder_name", ["tfds", "tfds-array-record"])
def test_cifar10_resumes(shared_data, folder_name):
    config = dataclasses.replace(TINY, batch_size=100, epochs=2)
    source, _ = open_train_val("cifar10", data_dir=str(shared_data / folder_name))
    stream = iter(train_batches(source, config, IMAGENET))
    batches = [next(stream) for _ in range(5)]
    resumed = iter(train_batches(source, config, IMAGENET, first_batch=3))
    for batch in batches[3:]:
        assert_equal(batch, next(resumed))
    labels = np.concatenate([batch["label"] for batch in batches])
    assert np.all(np.bincount(labels, minlength=10) > 20)  # 50 each expected


def test_numbers_is_no_multiple_of_a_batch():
    assert NUMBERS % 4 and NUMBERS % 6 and NUMBERS % 7
