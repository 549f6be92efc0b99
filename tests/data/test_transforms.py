"""Crops, resizing and random draws, against Pillow and NumPy."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from tests.helpers.tiny_data import (
    SEED,
    TINY_TRAIN,
    decode_by_pillow,
    encode,
    encode_with_exif,
    noise,
)
from vgg_jax.configs.colours import IMAGENET, ColourStatistics
from vgg_jax.configs.train import TrainConfig
from vgg_jax.data import resize_and_crop, resize_shorter_side
from vgg_jax.data.transforms import eval_example, flip, sample_augmentation, train_example


def crop_by_pillow(image: np.ndarray, scale: int, size: int, y: float, x: float) -> np.ndarray:
    """Resizes the shorter side to `scale`, then crops."""
    height, width = (round(side * scale / min(image.shape[:2])) for side in image.shape[:2])
    top, left = (
        min(int(fraction * (side - size + 1)), side - size)
        for fraction, side in ((y, height), (x, width))
    )
    resized = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    return resized[top : top + size, left : left + size].astype(float)


FRACTIONS = [(0.0, 0.0), (0.5, 0.5), (0.999, 0.3), (1.0, 1.0)]
SIDES = [(100, 140), (140, 101), (32, 32), (8, 8), (333, 90), (1, 1), (1, 500), (500, 1)]


def as_columns(cases):
    """Columns of files, scales, and fractions along y and x, of cases (file, scale, (y, x))."""
    files, scales, fractions = zip(*cases, strict=True)
    return list(files), list(scales), *np.array(fractions).T


def test_crop_equals_pillow(map_rows):
    rng = np.random.default_rng(0)
    # The hardest case: no pixel is like its neighbours.
    images = [rng.integers(0, 256, (*sides, 3), np.uint8) for sides in SIDES]
    files = [encode(image) for image in images]
    cases = list(itertools.product(range(len(images)), (32, 45, 64), FRACTIONS))
    crops = map_rows(
        lambda encoded, scale, y, x: resize_and_crop(encoded, scale, 32, y, x),
        *as_columns([(files[i], scale, fractions) for i, scale, fractions in cases]),
    )
    for (i, scale, fractions), crop in zip(cases, crops, strict=True):
        difference = np.abs(crop - crop_by_pillow(images[i], scale, 32, *fractions))
        # Pillow resamples in fixed point.
        assert difference.max() <= 1, (SIDES[i], scale, fractions)


def test_crop_of_partly_decoded_jpeg(map_rows):
    image = Image.fromarray(noise(150, 203))
    files = [encode(image.convert(mode), "JPEG", quality=90) for mode in ("RGB", "L", "CMYK")]
    cases = list(itertools.product(files, (64, 100, 256), FRACTIONS))
    crops = map_rows(
        lambda encoded, scale, y, x: resize_and_crop(encoded, scale, 64, y, x), *as_columns(cases)
    )
    for (encoded, scale, fractions), crop in zip(cases, crops, strict=True):
        expected = crop_by_pillow(decode_by_pillow(encoded), scale, 64, *fractions)
        difference = np.abs(crop - expected)
        assert difference.mean() < 0.5 and difference.max() <= 3, (scale, fractions)


def test_crop_is_upright(map_rows):
    files = [
        encode_with_exif(*options)
        for options in itertools.product(range(1, 9), "<>", (True, False))
    ]
    crops = map_rows(lambda encoded: resize_and_crop(encoded, 40, 32, 0.2, 0.9), files)
    for encoded, crop in zip(files, crops, strict=True):
        expected = crop_by_pillow(decode_by_pillow(encoded), 40, 32, 0.2, 0.9)
        assert np.abs(crop - expected).max() <= 3


def test_crop_of_extreme_sides(map_rows):
    files = [encode(np.full((*sides, 3), 77, np.uint8)) for sides in ((1, 5000), (5000, 1), (1, 1))]
    for fraction in (0.0, 0.999):
        crops = map_rows(
            lambda encoded, f=fraction: resize_and_crop(encoded, 256, 224, f, f), files
        )
        assert np.all(np.array(crops) == 77)


def test_crop_of_same_size_is_the_image(map_rows):
    image = noise(32, 32)
    [crop] = map_rows(lambda encoded: resize_and_crop(encoded, 32, 32, 0.7, 0.1), [encode(image)])
    np.testing.assert_array_equal(crop, image)


def test_crop_offsets_are_uniform():
    image = np.broadcast_to(np.arange(36, dtype=np.uint8)[:, None, None], (36, 36, 3)).copy()
    crops = tf.data.Dataset.from_tensor_slices(np.arange(0.005, 1, 0.01)).map(
        lambda y: resize_and_crop(encode(image), 36, 32, y, 0.0)
    )
    tops = [crop[0, 0, 0] for crop in crops.as_numpy_iterator()]
    assert np.bincount(tops).tolist() == [20] * 5


def test_resize_shorter_side_equals_pillow(map_rows):
    image, scales = noise(50, 71), [20, 50, 99]
    results = map_rows(lambda scale: resize_shorter_side(tf.constant(image), scale), scales)
    for scale, resized in zip(scales, results, strict=True):
        sides = (round(71 * scale / 50), scale)
        expected = np.asarray(Image.fromarray(image).resize(sides, Image.Resampling.BILINEAR))
        assert resized.dtype == np.uint8
        assert np.abs(resized - expected.astype(float)).max() <= 1


def test_flip(map_rows):
    image = noise(5, 6)
    mirrored, same = map_rows(lambda mirror: flip(tf.constant(image), mirror), [True, False])
    np.testing.assert_array_equal(mirrored, np.asarray(ImageOps.mirror(Image.fromarray(image))))
    np.testing.assert_array_equal(same, image)


DRAWS = TrainConfig(image_size=32, scale=(32, 36))


@pytest.fixture(scope="module")
def draws():
    """5,000 draws."""
    indices = tf.data.Dataset.range(5000).batch(5000)
    draws = indices.map(lambda index: sample_augmentation(SEED, index, DRAWS, IMAGENET))
    return next(draws.as_numpy_iterator())


def test_draws_of_one_image(draws):
    for i in (0, 1, 4999):
        params = sample_augmentation(SEED, tf.constant(i, tf.int64), DRAWS, IMAGENET)
        for one, column in zip(params, draws, strict=True):
            np.testing.assert_array_equal(one, column[i])


def test_draws_are_independent(draws):
    """Of those of the next image, and of those of the same image in the next epoch."""
    next_epoch = sample_augmentation(
        SEED + tf.constant([0, 1], tf.int64), tf.range(5000, dtype=tf.int64), DRAWS, IMAGENET
    )
    for name in ("y_fraction", "x_fraction"):
        fractions, others = getattr(draws, name), getattr(next_epoch, name).numpy()
        assert abs(np.corrcoef(fractions[1:], fractions[:-1])[0, 1]) < 0.05
        assert abs(np.corrcoef(fractions, others)[0, 1]) < 0.05
        cells = np.histogram2d(fractions[1:], fractions[:-1], 10, [[0, 1], [0, 1]])[0]
        # Chi-squared with 99 degrees of freedom: 3.6 deviations.
        assert ((cells - 50) ** 2 / 50).sum() < 150


def test_draws_are_uniform(draws):
    assert sorted(set(draws.scale.tolist())) == [32, 33, 34, 35, 36]
    np.testing.assert_allclose(np.bincount(draws.scale)[32:] / 5000, 0.2, atol=0.03)
    for fraction in (draws.y_fraction, draws.x_fraction):
        assert fraction.min() >= 0 and fraction.max() < 1
        np.testing.assert_allclose(np.histogram(fraction, 5, (0, 1))[0] / 5000, 0.2, atol=0.03)
    assert abs(draws.flip.mean() - 0.5) < 0.03
    columns = np.stack(
        [draws.scale, draws.y_fraction, draws.x_fraction, draws.flip, *draws.colour_shift.T[:1]]
    )
    np.testing.assert_allclose(np.corrcoef(columns), np.eye(5), atol=0.06)


def test_colour_shift_follows_components(draws):
    """Krizhevsky: p1 α1 λ1 + …. MatConvNet: the first deviation is 0.1 · √0.2175 · 255 levels."""
    vectors = np.array(IMAGENET.eigenvectors)
    components = draws.colour_shift @ np.linalg.inv(vectors).T
    deviations = components.std(0)
    expected = [0.1 * 255 * np.sqrt(value) for value in (0.2175, 0.0188, 0.0045)]
    np.testing.assert_allclose(deviations, expected, rtol=0.04)
    np.testing.assert_allclose(components.mean(0) / deviations, 0, atol=0.05)
    np.testing.assert_allclose(np.corrcoef(components.T), np.eye(3), atol=0.05)


def test_colour_shift_convention_and_strength(map_rows):
    statistics = ColourStatistics(
        (0.0, 0.0, 0.0), (400.0, 100.0, 25.0), ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    )

    def shift(**options):
        config = TrainConfig(image_size=32, scale=(32,), **options)
        [params] = map_rows(
            lambda index: sample_augmentation(SEED, index, config, statistics), np.array([2])
        )
        return params.colour_shift

    alpha = shift() / [20, 10, 5]
    np.testing.assert_allclose(
        shift(colour_convention="variance"), alpha * [400 / 255, 100 / 255, 25 / 255], rtol=1e-5
    )
    np.testing.assert_allclose(shift(colour_shift=0.2), shift() * 2, rtol=1e-6)
    assert shift(colour_shift=0.0).tolist() == [0, 0, 0]


def test_draws_without_flip_at_one_scale():
    config = TrainConfig(image_size=32, scale=(40,), flip=False)
    params = sample_augmentation(SEED, tf.range(20, dtype=tf.int64), config, IMAGENET)
    assert set(params.scale.numpy()) == {40} and not params.flip.numpy().any()


def test_train_example_uses_its_draws(map_rows):
    image = noise(60, 50)

    def augment(encoded, label):
        params = sample_augmentation(SEED, tf.cast(label, tf.int64), TINY_TRAIN, IMAGENET)
        return train_example({"encoded": encoded, "label": label}, TINY_TRAIN, params)

    for i, example in enumerate(map_rows(augment, [encode(image)] * 6, list(range(6)))):
        params = sample_augmentation(SEED, tf.constant(i, tf.int64), TINY_TRAIN, IMAGENET)
        fractions = float(params.y_fraction), float(params.x_fraction)
        expected = crop_by_pillow(image, int(params.scale), 32, *fractions)
        expected = expected[:, ::-1] if params.flip else expected
        assert example.keys() == {"label", "image", "colour_shift"} and example["label"] == i
        assert example["image"].dtype == np.uint8
        assert np.abs(example["image"] - expected).max() <= 1
        np.testing.assert_allclose(example["colour_shift"], params.colour_shift, rtol=1e-5)


def test_eval_example_is_centre_crop(map_rows):
    """At the middle of the range of scales."""
    image = noise(60, 50)
    [example] = map_rows(
        lambda encoded, label: eval_example({"encoded": encoded, "label": label}, TINY_TRAIN),
        [encode(image)],
        [3],
    )
    assert np.abs(example["image"] - crop_by_pillow(image, 36, 32, 0.5, 0.5)).max() <= 1
    assert example["colour_shift"].tolist() == [0, 0, 0] and example["label"] == 3
    assert TrainConfig(scale=(256, 512)).test_scale == 384  # Table 3
    assert TrainConfig(scale=(384,)).test_scale == 384
