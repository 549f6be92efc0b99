"""Crops of a batch by matrices, against single crops."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.tiny_data import SEED, TINY_TRAIN, encode, noise
from vgg_jax.configs.colours import IMAGENET
from vgg_jax.data import cache_in_memory, open_split, resize_and_crop, train_batches
from vgg_jax.data.in_memory import crop_batch, crop_matrices, is_small_enough
from vgg_jax.data.transforms import flip, sample_augmentation


@pytest.mark.slow
@pytest.mark.parametrize("sides", [(32, 32), (20, 30), (61, 40), (8, 8), (1, 3)])
def test_crop_batch_equals_single_crops(sides):
    images = np.stack([noise(*sides, seed) for seed in range(64)])
    params = sample_augmentation(SEED, tf.range(64, dtype=tf.int64), TINY_TRAIN, IMAGENET)
    matrices = crop_matrices(sides, TINY_TRAIN.scale, 32)
    crops = crop_batch(tf.constant(images), params, matrices, 32).numpy()
    assert crops.shape == (64, 32, 32, 3) and len(set(params.scale.numpy())) == 9
    for i, image in enumerate(images):
        fractions = params.y_fraction[i], params.x_fraction[i]
        crop = resize_and_crop(tf.constant(encode(image)), params.scale[i], 32, *fractions)
        difference = np.abs(crops[i].astype(int) - flip(crop, params.flip[i]).numpy())
        assert difference.max() <= 1 and np.count_nonzero(difference) <= 1e-3 * difference.size


def test_train_batches_flip_half_of_images(tmp_path):
    """The images are black on the left. A flipped crop is black on the right."""
    (tmp_path / "a").mkdir()
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, 16:] = 255
    for i in range(64):
        (tmp_path / "a" / f"{i}.png").write_bytes(encode(image))
    config = dataclasses.replace(TINY_TRAIN, epochs=4, batch_size=64)
    source = cache_in_memory(open_split(str(tmp_path), "train"), config)
    crops = np.concatenate([batch["image"] for batch in train_batches(source, config, IMAGENET)])
    black_left, black_right = ((crops[:, :, x] == 0).all((1, 2)) for x in (0, -1))
    assert np.all(black_left != black_right)
    assert 0.35 < np.mean(black_right) < 0.65


def test_is_small_enough():
    assert is_small_enough((32, 32), (32, 40), 32)
    assert is_small_enough((64, 64), (64,), 64)
    assert not is_small_enough((65, 64), (64,), 64)
    assert not is_small_enough((32, 32), (224,), 224)
    assert not is_small_enough((8, 8), (32, 90), 32)  # too many crops
