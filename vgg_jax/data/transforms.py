"""Transforms of one image, in TensorFlow operations.

They work eagerly and inside `Dataset.map`. Sides are (height, width) in pixels.
"""

from typing import NamedTuple

import tensorflow as tf

from vgg_jax.colours import shift_components
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

NUM_DRAWS = 7  # random numbers of an image: S, two offsets, the flip, three of the colour shift


class AugmentParams(NamedTuple):
    """Random draws for one training image, or for several along the first axis (§3.1)."""

    scale: tf.Tensor  # int32, S
    y_fraction: tf.Tensor  # float64 in [0, 1)
    x_fraction: tf.Tensor  # float64 in [0, 1)
    flip: tf.Tensor  # bool
    colour_shift: tf.Tensor  # float32 (…, 3), RGB, in the units of 0-255 pixels


class SourceWindow(NamedTuple):
    """Source pixels that a crop of the resized image needs. All (2,), along y and x."""

    first: tf.Tensor  # int32, first pixel
    sides: tf.Tensor  # int32, number of pixels
    zoom: tf.Tensor  # float32, pixels of the crop per source pixel
    translation: tf.Tensor  # float32, position of the window in the crop, in pixels of the crop


def train_example(example: dict, config: TrainConfig, params: AugmentParams) -> dict:
    """Decodes and augments a training image (§3.1).

    Args:
        example: A dict with "encoded".
        config: Image size and EXIF.
        params: Random draws for this image.

    Returns:
        The example with "image", uint8 (size, size, 3), and "colour_shift", float32 (3,), instead
        of "encoded".
    """
    image = resize_and_crop(
        example["encoded"],
        params.scale,
        config.image_size,
        params.y_fraction,
        params.x_fraction,
        config.exif,
    )
    others = {key: value for key, value in example.items() if key != "encoded"}
    return others | {"image": flip(image, params.flip), "colour_shift": params.colour_shift}


def eval_example(example: dict, config: TrainConfig) -> dict:
    """Decodes an image and crops its centre at the scale Q.

    Args:
        example: A dict with "encoded".
        config: Test scale, image size and EXIF.

    Returns:
        The example as from `train_example`, with a colour shift of zeros.
    """
    image = resize_and_crop(
        example["encoded"], config.test_scale, config.image_size, 0.5, 0.5, config.exif
    )
    others = {key: value for key, value in example.items() if key != "encoded"}
    return others | {"image": image, "colour_shift": tf.zeros(3)}


def sample_augmentation(
    seed: tf.Tensor, index: tf.Tensor, config: TrainConfig, statistics: ColourStatistics
) -> AugmentParams:
    """Draws the augmentation of images, as a pure function of (seed, index) (§3.1).

    S is uniform over the integers of `config.scale`. The generator is counter-based: it permutes
    the integers below 2^52 by the cipher that also shuffles an epoch. It draws for a whole batch
    at once. The stateless functions of `tf.random` take one seed per call, and are slow
    (docs/performance.md#random-draws).

    Args:
        seed: Seed of the epoch, int64 (2,).
        index: Indices of the images, int64 (…), not negative.
        config: Scales, crop, flip and colour shift.
        statistics: Colours of the data set.

    Returns:
        The draws, one for each index.
    """
    counters = index[..., None] * NUM_DRAWS + tf.range(NUM_DRAWS, dtype=tf.int64)
    numbers = permute_indices(tf.reshape(counters, [-1]), seed, 2**52, rounds=32)
    numbers = tf.reshape(numbers, tf.shape(counters))
    uniform = tf.unstack((tf.cast(numbers, tf.float64) + 0.5) / 2.0**52, axis=-1)
    alpha = tf.cast(tf.math.ndtri(tf.stack(uniform[4:], -1)), tf.float32) * config.colour_shift
    smallest, largest = config.scale[0], config.scale[-1]
    scale = smallest + tf.cast(uniform[0] * (largest - smallest + 1), tf.int32)
    if config.crop == "centre":
        uniform[1:3] = [tf.fill(tf.shape(index), tf.constant(0.5, tf.float64))] * 2
    components = shift_components(config.colour_convention, statistics)
    return AugmentParams(
        scale=tf.minimum(scale, largest),
        y_fraction=uniform[1],
        x_fraction=uniform[2],
        flip=uniform[3] < (0.5 if config.flip else 0.0),
        colour_shift=sum(column * alpha[..., k, None] for k, column in enumerate(components.T)),
    )


def flip(image: tf.Tensor, mirror: tf.Tensor) -> tf.Tensor:
    """Mirrors an image left to right.

    Args:
        image: Pixels, (H, W, C).
        mirror: True to mirror, a scalar bool.

    Returns:
        Pixels, (H, W, C).
    """
    # tf.reverse is much faster than image[:, ::-1] (docs/performance.md#mirroring).
    return tf.cond(mirror, lambda: tf.reverse(image, [1]), lambda: image)


def resize_and_crop(
    encoded: tf.Tensor,
    scale: tf.Tensor | int,
    size: int,
    y_fraction: tf.Tensor | float,
    x_fraction: tf.Tensor | float,
    exif: bool = True,
) -> tf.Tensor:
    """Resizes an image and crops a square (§3.1).

    Only the source pixels of the crop are resampled. For an upright JPEG, only these are decoded.

    Args:
        encoded: Content of an image file, a scalar string.
        scale: Length of the shorter side of the resized image, at least `size`.
        size: Side of the crop.
        y_fraction: Position of the crop in [0, 1]. It selects one of the offsets from the first to
            the last. A uniform fraction selects them with equal probability, and 0.5 selects the
            centre.
        x_fraction: The same for x.
        exif: Turn and mirror an image as its EXIF orientation says.

    Returns:
        RGB pixels, uint8 (size, size, 3).
    """
    orientation = exif_orientation(encoded) if exif else tf.constant(1)
    fractions = tf.cast(tf.stack([y_fraction, x_fraction]), tf.float64)

    is_upright_jpeg = is_jpeg(encoded) & (orientation == 1)

    # Untaken branches cost time, so they are short (docs/performance.md#untaken-branches).
    def read_sides() -> tuple[tf.Tensor, tf.Tensor]:
        return tf.io.extract_jpeg_shape(encoded)[:2], tf.zeros((0, 0, 3), tf.uint8)

    def decode_whole() -> tuple[tf.Tensor, tf.Tensor]:
        image = apply_orientation(decode_pixels(encoded), orientation)
        return tf.shape(image)[:2], image

    sides, image = tf.cond(is_upright_jpeg, read_sides, decode_whole)
    window = source_window(sides, scale, size, fractions)

    def decode_window() -> tf.Tensor:
        rectangle = tf.concat([window.first, window.sides], 0)
        checked = check_pixel_limit(encoded, sides)
        return tf.io.decode_and_crop_jpeg(checked, rectangle, channels=3, dct_method=DCT)

    def cut_window() -> tf.Tensor:
        return tf.slice(image, [*tf.unstack(window.first), 0], [*tf.unstack(window.sides), 3])

    pixels = tf.cond(is_upright_jpeg, decode_window, cut_window)
    cropped = _resample(pixels, (size, size), window.zoom, window.translation)
    return tf.ensure_shape(cropped, (size, size, 3))


def source_window(
    sides: tf.Tensor, scale: tf.Tensor | int, size: int, fractions: tf.Tensor
) -> SourceWindow:
    """Finds the source pixels of a crop of a resized image.

    A resized crop of round(size * short / scale) source pixels would be simpler. But it would leave
    only two scales and two offsets for a digit of 8x8 pixels.

    Args:
        sides: Height and width of the image, int32 (2,).
        scale: Length of the shorter side of the resized image.
        size: Side of the crop.
        fractions: Position of the crop along y and x, as in `resize_and_crop`, float64 (2,).

    Returns:
        The window, which includes the pixels that the filter reaches.
    """
    exact_sides = tf.cast(sides, tf.float64)
    rescaled = rescaled_sides(exact_sides, scale)
    last_offset = rescaled - size
    offset = tf.minimum(tf.floor(fractions * (last_offset + 1)), last_offset)
    zoom = rescaled / exact_sides
    reach = tf.maximum(tf.ones_like(zoom), 1 / zoom) + 1  # of the filter, in source pixels
    first = tf.maximum(tf.zeros_like(zoom), tf.floor(offset / zoom - reach))
    stop = tf.minimum(exact_sides, tf.math.ceil((offset + size) / zoom + reach))
    return SourceWindow(
        first=tf.cast(first, tf.int32),
        sides=tf.cast(stop - first, tf.int32),
        zoom=tf.cast(zoom, tf.float32),
        translation=tf.cast(first * zoom - offset, tf.float32),
    )


def resize_shorter_side(
    image: tf.Tensor, scale: tf.Tensor | int, rounding: str = "nearest"
) -> tf.Tensor:
    """Resizes an image so that its shorter side is `scale` (§3.1).

    Args:
        image: Pixels, uint8 (H, W, 3).
        scale: Length of the shorter side. The longer one becomes long * scale / short.
        rounding: One of `ROUNDINGS`, for the longer side.

    Returns:
        Pixels, uint8 (h, w, 3).

    Raises:
        tf.errors.InvalidArgumentError: The result has more than `MAX_IMAGE_PIXELS` pixels. A line
            of pixels would become gigabytes.
    """
    sides = tf.cast(tf.shape(image)[:2], tf.float64)
    rescaled = rescaled_sides(sides, scale, rounding)
    too_many = tf.reduce_prod(rescaled) > MAX_IMAGE_PIXELS
    message = f"at the test scale it has more than {MAX_IMAGE_PIXELS:,} pixels"
    image = assert_then(too_many, message, image)
    zoom = tf.cast(rescaled / sides, tf.float32)
    return _resample(image, tf.cast(rescaled, tf.int32), zoom, tf.zeros(2))


def rescaled_sides(
    sides: tf.Tensor, scale: tf.Tensor | int, rounding: str = "nearest"
) -> tf.Tensor:
    """Computes the sides of a resized image, as whole numbers.

    Args:
        sides: Height and width, float64 (2,).
        scale: Length of the shorter side of the resized image.
        rounding: One of `ROUNDINGS`, for the longer side.

    Returns:
        Height and width, float64 (2,).
    """
    to_whole = tf.floor if rounding == "torchvision" else tf.round
    return to_whole(sides * tf.cast(scale, tf.float64) / tf.reduce_min(sides))


def _resample(
    image: tf.Tensor, sides: tf.Tensor | tuple[int, int], zoom: tf.Tensor, translation: tf.Tensor
) -> tf.Tensor:
    """Resamples an image, antialiased and bilinear, as Pillow and torchvision do.

    The filter is as wide as a pixel of the result. Each axis is resampled by itself, in a layout
    that adds whole rows. ScaleAndTranslate for both axes gives the same bits, but its inner loop
    along x is over three channels, which is slow (docs/performance.md#resampling).
    """
    height, width = tf.unstack(tf.shape(image)[:2])
    image = resample_rows(tf.reshape(image, (height, width * 3)), sides[0], zoom[0], translation[0])
    image = tf.reshape(tf.transpose(image), (width, 3 * sides[0]))
    image = resample_rows(image, sides[1], zoom[1], translation[1])
    image = tf.transpose(tf.reshape(image, (sides[1] * 3, sides[0])))
    return to_uint8(tf.reshape(image, (sides[0], sides[1], 3)))


def to_uint8(image: tf.Tensor) -> tf.Tensor:
    """Rounds to the nearest level. Halves are rounded up, as Pillow does.

    The tolerance also rounds up values that rounding errors put just below a half.

    Args:
        image: Pixels, float32.

    Returns:
        Pixels, uint8.
    """
    return tf.cast(image + (0.5 + 2**-10), tf.uint8)


def resample_rows(
    rows: tf.Tensor, count: tf.Tensor | int, zoom: tf.Tensor, translation: tf.Tensor
) -> tf.Tensor:
    """Resamples an array along its first axis.

    Args:
        rows: The array, (n, length).
        count: Number of rows of the result.
        zoom: Rows of the result per row of the array, float32.
        translation: Position of the first row in the result, float32.

    Returns:
        float32 (count, length).
    """
    # An image that is one pixel wide and `length` channels deep.
    return tf.raw_ops.ScaleAndTranslate(
        images=rows[None, :, None],
        size=tf.stack([count, 1]),
        scale=tf.stack([zoom, 1.0]),
        translation=tf.stack([translation, 0.0]),
        kernel_type="triangle",
        antialias=True,
    )[0, :, 0]
