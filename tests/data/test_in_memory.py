"""Crops of a whole batch by matrices, against the crops one by one."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.tiny_data import SEED, encode, noise
from vgg_jax.configs.colours import IMAGENET
from vgg_jax.configs.train import TrainConfig
from vgg_jax.data import cache_in_memory, in_memory, open_split, train_batches
from vgg_jax.data.transforms import flip, resize_and_crop, sample_augmentation

TINY = TrainConfig(image_size=32, scale=(32, 40), batch_size=4, epochs=3, seed=5)


@pytest.mark.parametrize("sides", [(32, 32), (20, 30), (61, 40), (8, 8), (1, 3)])
def test_a_batch_of_crops_is_the_crops_one_by_one(sides):
    images = np.stack([noise(*sides, seed) for seed in range(64)])
    drawn = sample_augmentation(SEED, tf.range(64, dtype=tf.int64), TINY, IMAGENET)
    ours = in_memory.crop_batch(
        tf.constant(images), drawn, in_memory.crop_matrices(sides, TINY.scale, 32), 32
    ).numpy()
    assert ours.shape == (64, 32, 32, 3) and len(set(drawn.scale.numpy())) == 9
    for i, image in enumerate(images):
        crop = resize_and_crop(
            tf.constant(encode(image)), drawn.scale[i], 32, drawn.y_fraction[i], drawn.x_fraction[i]
        )
        difference = np.abs(ours[i].astype(int) - flip(crop, drawn.flip[i]).numpy())
        assert difference.max() <= 1 and np.count_nonzero(difference) <= 1e-3 * difference.size


def test_mirrored_crops_are_drawn_as_often_as_plain_ones(tmp_path):
    """A picture that is black on its left: the share of crops that are black on their right."""
    (tmp_path / "a").mkdir()
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, 16:] = 255
    for i in range(64):
        (tmp_path / "a" / f"{i}.png").write_bytes(encode(half))
    config = dataclasses.replace(TINY, epochs=4, batch_size=64)
    images = np.concatenate(
        [
            batch["image"]
            for batch in train_batches(
                cache_in_memory(open_split(str(tmp_path), "train"), config), config, IMAGENET
            )
        ]
    )
    assert np.all((images[:, :, 0] == 0).all((1, 2)) != (images[:, :, -1] == 0).all((1, 2)))
    assert 0.35 < np.mean((images[:, :, -1] == 0).all((1, 2))) < 0.65


def test_many_or_large_crops_are_left_to_the_stream():
    assert in_memory.is_small_enough((32, 32), (32, 40), 32) and in_memory.is_small_enough(
        (64, 64), (64,), 64
    )
    assert (
        not in_memory.is_small_enough((65, 64), (64,), 64)
        and not in_memory.is_small_enough((32, 32), (224,), 224)
        and not in_memory.is_small_enough((8, 8), (32, 90), 32)
    )
