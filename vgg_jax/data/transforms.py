"""What happens to one image, in TensorFlow operations: eagerly and inside `Dataset.map` alike. Sides are (height, width) in pixels."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from vgg_jax.configs.colours import ColourStatistics
from vgg_jax.configs.evaluation import MAX_IMAGE_PIXELS
from vgg_jax.configs.train import TrainConfig
from vgg_jax.data.decode import (
    DCT,
    apply_orientation,
    assert_then,
    check_pixel_limit,
    decode_pixels,
    exif_orientation,
    is_jpeg,
)
from vgg_jax.data.splits import permute_indices

DRAWS = 7  # random numbers of an image: S, two offsets, the mirror's, three of the colour shift


class AugmentParams(NamedTuple):
    """The random draws of one use of one training image, or of several, one along the first axis (§3.1)."""

    scale: tf.Tensor  # int32, S
    y_fraction: tf.Tensor  # float64 in [0, 1)
    x_fraction: tf.Tensor
    flip: tf.Tensor  # bool
    colour_shift: tf.Tensor  # float32 (…, 3), RGB, in the units of 0-255 pixels


class SourceWindow(NamedTuple):
    """Which pixels of an image a crop of the rescaled image needs, and how they map to it. All (2,), along y and x."""

    first: tf.Tensor  # int32
    sides: tf.Tensor  # int32
    zoom: tf.Tensor  # float32, pixels of the crop per source pixel
    translation: tf.Tensor  # float32, of the window's corner, in pixels of the crop


def train_example(example: dict, config: TrainConfig, drawn: AugmentParams) -> dict:
    """`example` with "image", uint8 (size, size, 3), and "colour_shift", float32 (3,), in the place of "encoded"."""
    image = resize_and_crop(
        example["encoded"],
        drawn.scale,
        config.image_size,
        drawn.y_fraction,
        drawn.x_fraction,
        config.exif,
    )
    rest = {key: value for key, value in example.items() if key != "encoded"}
    return rest | {"image": flip(image, drawn.flip), "colour_shift": drawn.colour_shift}


def eval_example(example: dict, config: TrainConfig) -> dict:
    """As `train_example`, but the centre crop at Q = `config.test_scale`, not flipped, with a colour shift of zeros."""
    image = resize_and_crop(
        example["encoded"], config.test_scale, config.image_size, 0.5, 0.5, config.exif
    )
    rest = {key: value for key, value in example.items() if key != "encoded"}
    return rest | {"image": image, "colour_shift": tf.zeros(3)}


def sample_augmentation(
    seed: tf.Tensor, index: tf.Tensor, config: TrainConfig, statistics: ColourStatistics
) -> AugmentParams:
    """For each `index`, int64 >= 0, a pure function of it and of `seed`, int64 (2,). S is uniform over the integers of `config.scale`.

    A counter-based generator: a keyed permutation of the whole numbers below 2^52, by the cipher that also shuffles an epoch. It draws
    for a whole batch at once; `tf.random`'s stateless functions take one seed a call, and on a 32-pixel image as long as the pixels do.
    From 16 rounds on the chi-squared of 350,000 draws, of neighbours and of pairs, are those of independent numbers; 8 are too few.
    """
    counters = index[..., None] * DRAWS + tf.range(DRAWS, dtype=tf.int64)
    numbers = tf.reshape(
        permute_indices(tf.reshape(counters, [-1]), seed, 2**52, rounds=32), tf.shape(counters)
    )
    uniform = tf.unstack((tf.cast(numbers, tf.float64) + 0.5) / 2.0**52, axis=-1)
    alpha = tf.cast(tf.math.ndtri(tf.stack(uniform[4:], -1)), tf.float32) * config.colour_shift
    smallest, largest = config.scale[0], config.scale[-1]
    components = _components(config.colour_convention, statistics)
    return AugmentParams(
        scale=tf.minimum(
            smallest + tf.cast(uniform[0] * (largest - smallest + 1), tf.int32), largest
        ),
        y_fraction=uniform[1],
        x_fraction=uniform[2],
        flip=uniform[3] < (0.5 if config.flip else 0.0),
        colour_shift=sum(column * alpha[..., k, None] for k, column in enumerate(components.T)),
    )


def _components(convention: str, statistics: ColourStatistics) -> np.ndarray:
    """float32 (3, 3): the columns that the three alphas are multiplied by, RGB in the units of 0-255 pixels.

    The formula as printed multiplies an eigenvector by its variance; with the variance of 0-255 pixels it would drown the image.
    """
    eigenvalues = np.array(statistics.eigenvalues)
    # "deviation": Krizhevsky's own code and MatConvNet. "variance": fb.resnet.torch, pixels in [0, 1]: / 255², then times 255.
    spread = np.sqrt(eigenvalues) if convention == "deviation" else eigenvalues / 255
    return (np.array(statistics.eigenvectors) * spread).astype(np.float32)


def flip(image: tf.Tensor, coin: tf.Tensor) -> tf.Tensor:
    """(H, W, C), mirrored left to right if `coin`. By tf.reverse: image[:, ::-1] takes as long as decoding (1.2 ms of 224x224 pixels)."""
    return tf.cond(coin, lambda: tf.reverse(image, [1]), lambda: image)


def resize_and_crop(
    encoded: tf.Tensor,
    scale: tf.Tensor | int,
    size: int,
    y_fraction: tf.Tensor | float,
    x_fraction: tf.Tensor | float,
    exif: bool = True,
) -> tf.Tensor:
    """uint8 (size, size, 3): the crop that rescaling the shorter side to `scale` >= `size` and cropping would give (§3.1).

    Only the source pixels that the crop is made of are decoded (of an upright JPEG) and resampled. A fraction in [0, 1] picks one of
    the offsets from the first to the last: equally likely for a uniform fraction, the centre crop for 0.5.
    """
    turn = exif_orientation(encoded) if exif else tf.constant(1)

    def from_jpeg() -> tf.Tensor:
        sides = tf.io.extract_jpeg_shape(encoded)[:2]
        part = source_window(sides, scale, size, fractions)
        pixels = tf.io.decode_and_crop_jpeg(
            check_pixel_limit(encoded, sides),
            tf.concat([part.first, part.sides], 0),
            channels=3,
            dct_method=DCT,
        )
        return _resample(pixels, (size, size), part.zoom, part.translation)

    def from_image() -> tf.Tensor:
        image = apply_orientation(decode_pixels(encoded), turn)
        part = source_window(tf.shape(image)[:2], scale, size, fractions)
        pixels = tf.slice(image, [*tf.unstack(part.first), 0], [*tf.unstack(part.sides), 3])
        return _resample(pixels, (size, size), part.zoom, part.translation)

    fractions = tf.cast(tf.stack([y_fraction, x_fraction]), tf.float64)
    return tf.ensure_shape(
        tf.cond(is_jpeg(encoded) & (turn == 1), from_jpeg, from_image), (size, size, 3)
    )


def source_window(
    sides: tf.Tensor, scale: tf.Tensor | int, size: int, fractions: tf.Tensor
) -> SourceWindow:
    """The window of an image of `sides`, int32 (2,), for the crop at `fractions`, float64 (2,), of the image rescaled to `scale`.

    A crop of round(size * short / scale) source pixels, resized, would be simpler, but leaves an 8x8 digit two scales and two offsets.
    """
    exact = tf.cast(sides, tf.float64)
    rescaled = rescaled_sides(exact, scale)
    extent = rescaled - size
    offset = tf.minimum(tf.floor(fractions * (extent + 1)), extent)
    zoom = rescaled / exact
    reach = tf.maximum(tf.ones_like(zoom), 1 / zoom) + 1  # of the filter, in source pixels
    first = tf.maximum(tf.zeros_like(zoom), tf.floor(offset / zoom - reach))
    last = tf.minimum(exact, tf.math.ceil((offset + size) / zoom + reach))
    return SourceWindow(
        first=tf.cast(first, tf.int32),
        sides=tf.cast(last - first, tf.int32),
        zoom=tf.cast(zoom, tf.float32),
        translation=tf.cast(first * zoom - offset, tf.float32),
    )


def resize_shorter_side(image: tf.Tensor, scale: tf.Tensor | int) -> tf.Tensor:
    """uint8 (H, W, 3) -> uint8 with the shorter side `scale` and the longer one round(long * scale / short) (§3.1).

    Raises tf.errors.InvalidArgumentError for more than `MAX_IMAGE_PIXELS` pixels: a line of pixels would become gigabytes.
    """
    sides = tf.cast(tf.shape(image)[:2], tf.float64)
    rescaled = rescaled_sides(sides, scale)
    image = assert_then(
        tf.reduce_prod(rescaled) > MAX_IMAGE_PIXELS,
        f"at the test scale it has more than {MAX_IMAGE_PIXELS:,} pixels",
        image,
    )
    return _resample(
        image, tf.cast(rescaled, tf.int32), tf.cast(rescaled / sides, tf.float32), tf.zeros(2)
    )


def rescaled_sides(sides: tf.Tensor, scale: tf.Tensor | int) -> tf.Tensor:
    return tf.round(sides * tf.cast(scale, tf.float64) / tf.reduce_min(sides))


def _resample(
    image: tf.Tensor, sides: tf.Tensor | tuple[int, int], zoom: tf.Tensor, translation: tf.Tensor
) -> tf.Tensor:
    """Antialiased bilinear, as Pillow and torchvision do it: the filter is as wide as a pixel of the result.

    One axis after the other, each laid out so that whole rows are added up: a third of ScaleAndTranslate's own time for both axes, whose
    inner loop along x is over the three channels (two cores, 235 -> 224 pixels: 0.3 ms, not 1.1), and equal to the bit.
    """
    height, width = tf.unstack(tf.shape(image)[:2])
    image = resample_rows(tf.reshape(image, (height, width * 3)), sides[0], zoom[0], translation[0])
    image = tf.reshape(tf.transpose(image), (width, 3 * sides[0]))
    image = resample_rows(image, sides[1], zoom[1], translation[1])
    image = tf.transpose(tf.reshape(image, (sides[1] * 3, sides[0])))
    return to_uint8(tf.reshape(image, (sides[0], sides[1], 3)))


def to_uint8(image: tf.Tensor) -> tf.Tensor:
    """The nearest level; halves go up, as Pillow's do, and so do those that an order of additions has left a little below."""
    return tf.cast(image + (0.5 + 2**-10), tf.uint8)


def resample_rows(
    rows: tf.Tensor, count: tf.Tensor | int, zoom: tf.Tensor, translation: tf.Tensor
) -> tf.Tensor:
    """(n, length) -> float32 (count, length): an image one pixel wide, and `length` channels deep."""
    return tf.raw_ops.ScaleAndTranslate(
        images=rows[None, :, None],
        size=tf.stack([count, 1]),
        scale=tf.stack([zoom, 1.0]),
        translation=tf.stack([translation, 0.0]),
        kernel_type="triangle",
        antialias=True,
    )[0, :, 0]
