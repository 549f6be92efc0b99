"""Batched crops of small images in memory.

A few operations make a whole batch. Calls for single images would take longer than their work.
"""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from vgg_jax.configs.colours import ColourStatistics
from vgg_jax.configs.train import MAX_CACHED_PIXELS, TrainConfig
from vgg_jax.data.batches import BatchIterator
from vgg_jax.data.splits import (
    DataSource,
    DecodedImages,
    HostShard,
    epoch_seeds,
    permute_indices,
    steps_per_epoch,
)
from vgg_jax.data.transforms import (
    AugmentParams,
    SourceWindow,
    resample_rows,
    rescaled_sides,
    sample_augmentation,
    source_window,
    to_uint8,
)

# Offsets of all scales. More matrices would delay the start (docs/performance.md#crop-matrices).
MAX_OFFSETS = 600


class CropMatrices(NamedTuple):
    """Matrices that resample an image to each of its crops, for a range of scales.

    There is one matrix per offset. The matrices of a scale follow those of the scale before.
    """

    y: tf.Tensor  # float32 (k, size, H), resample along y
    x: tf.Tensor  # float32 (2 k, size, W), along x; the second half also mirrors
    first: tf.Tensor  # int32 (scales,), position of the matrices of each scale
    count: tf.Tensor  # int32 (scales, 2), offsets of each scale along y and x


def is_small_enough(sides: tuple[int, int], scales: tuple[int, ...], size: int) -> bool:
    """Tells whether images and crops are small, and the crops are few.

    Args:
        sides: Height and width of the images.
        scales: The training scale S, or its smallest and largest value.
        size: Side of a crop.

    Returns:
        True if the batches of this module suit the images.
    """
    offsets = sum(
        round(scale * max(sides) / min(sides)) - size + 1
        for scale in range(scales[0], scales[-1] + 1)
    )
    return max(sides[0] * sides[1], size * size) <= MAX_CACHED_PIXELS and offsets <= MAX_OFFSETS


def crop_matrices(sides: tuple[int, int], scales: tuple[int, ...], size: int) -> CropMatrices:
    """Makes the matrices of all crops of images of one size.

    Args:
        sides: Height and width of the images.
        scales: The training scale S, or its smallest and largest value.
        size: Side of a crop.

    Returns:
        The matrices.
    """
    y: list[tf.Tensor] = []
    x: list[tf.Tensor] = []
    first, count = [], []
    for scale in range(scales[0], scales[-1] + 1):
        rescaled = rescaled_sides(tf.constant(sides, tf.float64), scale).numpy()
        offsets = (rescaled - size + 1).astype(np.int32)
        first.append(len(y))
        count.append(offsets)
        for offset in range(offsets.max()):
            fractions = tf.constant((offset + 0.5) / offsets)
            window = source_window(tf.constant(sides), scale, size, fractions)
            y.append(_resampling_matrix(window, 0, sides, size))
            x.append(_resampling_matrix(window, 1, sides, size))
    along_x = tf.stack(x)
    return CropMatrices(
        y=tf.stack(y),
        x=tf.concat([along_x, along_x[:, ::-1]], 0),
        first=tf.constant(first),
        count=tf.constant(np.stack(count)),
    )


def _resampling_matrix(
    window: SourceWindow, axis: int, sides: tuple[int, int], size: int
) -> tf.Tensor:
    """Makes the matrix from an image to a crop along one axis, float32 (size, side)."""
    first, count = int(window.first[axis]), int(window.sides[axis])
    matrix = resample_rows(tf.eye(count), size, window.zoom[axis], window.translation[axis])
    return tf.pad(matrix, [[0, 0], [first, sides[axis] - first - count]])


def crop_batch(
    images: tf.Tensor, params: AugmentParams, matrices: CropMatrices, min_scale: int
) -> tf.Tensor:
    """Resizes, crops and mirrors a batch of images.

    The result equals that of `resize_and_crop` and `flip`, except for rounding. A sum in another
    order may be on the other side of a half (docs/performance.md#crop-matrices).

    Args:
        images: Decoded images, uint8 (b, H, W, 3).
        params: Crops of the images, each of shape (b,).
        matrices: Matrices for images of this size.
        min_scale: Smallest scale of `matrices`.

    Returns:
        Crops, uint8 (b, size, size, 3).
    """
    fractions = tf.stack([params.y_fraction, params.x_fraction], -1)
    count = tf.gather(matrices.count, params.scale - min_scale)
    offsets = tf.cast(tf.floor(fractions * tf.cast(count, tf.float64)), tf.int32)
    first = tf.gather(matrices.first, params.scale - min_scale)
    positions = first[:, None] + tf.minimum(offsets, count - 1)
    mirrored = tf.where(params.flip, len(matrices.y), 0)
    y = tf.gather(matrices.y, positions[:, 0])
    x = tf.gather(matrices.x, positions[:, 1] + mirrored)
    b, height, width, _ = tf.unstack(tf.shape(images))
    size = matrices.y.shape[1]
    rows = y @ tf.reshape(tf.cast(images, tf.float32), (b, height, width * 3))
    columns = tf.transpose(tf.reshape(rows, (b, size, width, 3)), (0, 2, 1, 3))
    columns = x @ tf.reshape(columns, (b, width, size * 3))
    return to_uint8(tf.transpose(tf.reshape(columns, (b, size, size, 3)), (0, 2, 1, 3)))


def train_batches(
    source: DataSource,
    pixels: DecodedImages,
    config: TrainConfig,
    statistics: ColourStatistics,
    first_epoch: int,
    first_batch: int,
    shard: HostShard | None = None,
) -> BatchIterator:
    """Makes training batches of images in memory.

    Args:
        source: The source of the images.
        pixels: Its decoded images.
        config: Augmentation, batch size, number of epochs and seed.
        statistics: Colours of the data set, for the colour shift.
        first_epoch: Epoch to start in, counted from 0.
        first_batch: Batch of this epoch to start with, counted from 0.
        shard: Rows of each batch to make, or None for all.

    Returns:
        Batches as those of `vgg_jax.data.train_batches`.
    """
    per_epoch = steps_per_epoch(source, config.batch_size)
    matrices = crop_matrices(_sides(pixels), config.scale, config.image_size)
    shard = shard or _whole_batch(config.batch_size)

    def examples(number: int) -> tf.data.Dataset:
        first, position = divmod(first_epoch * per_epoch + first_batch + number, per_epoch)

        def epoch_batches(epoch: tf.Tensor) -> tf.data.Dataset:
            start = tf.where(epoch == first, tf.constant(position, tf.int64), 0)
            numbers = tf.data.Dataset.range(start, per_epoch)
            return numbers.map(lambda batch: {"batch": batch, "epoch": epoch})

        epochs = tf.data.Dataset.range(first, config.epochs)
        return epochs.flat_map(tf.autograph.experimental.do_not_convert(epoch_batches))

    def prepare(example: dict) -> dict:
        order_seed, draw_seed = epoch_seeds(config.seed, example["epoch"])
        positions, mask = _positions(example["batch"], shard, source.size)
        positions = permute_indices(positions, order_seed, source.size)
        indices = tf.where(mask, tf.gather(pixels.indices, positions), 0)
        params = sample_augmentation(draw_seed, indices, config, statistics)
        return _make_batch(pixels, positions, mask, params, matrices, config.scale[0])

    return BatchIterator(source, examples, prepare, None)


def eval_batches(
    source: DataSource,
    pixels: DecodedImages,
    config: TrainConfig,
    batch_size: int,
    shard: HostShard | None = None,
) -> BatchIterator:
    """Makes evaluation batches of images in memory.

    Args:
        source: The source of the images.
        pixels: Its decoded images.
        config: Test scale and image size.
        batch_size: Number of examples in a batch.
        shard: Rows of each batch to make, or None for all.

    Returns:
        Batches as those of `vgg_jax.data.eval_batches`.
    """
    shard = shard or _whole_batch(batch_size)
    matrices = crop_matrices(_sides(pixels), (config.test_scale,), config.image_size)
    count = len(shard.rows)

    def examples(number: int) -> tf.data.Dataset:
        return tf.data.Dataset.range(number, steps_per_epoch(source, batch_size))

    def prepare(batch: tf.Tensor) -> dict:
        positions, mask = _positions(batch, shard, source.size)
        half = tf.fill((count,), tf.constant(0.5, tf.float64))
        params = AugmentParams(
            scale=tf.fill((count,), config.test_scale),
            y_fraction=half,
            x_fraction=half,
            flip=tf.zeros(count, tf.bool),
            colour_shift=tf.zeros((count, 3)),
        )
        return _make_batch(pixels, positions, mask, params, matrices, config.test_scale)

    return BatchIterator(source, examples, prepare, None)


def _sides(pixels: DecodedImages) -> tuple[int, int]:
    height, width = pixels.images.shape[1:3]
    return height, width


def _whole_batch(batch_size: int) -> HostShard:
    return HostShard(batch_size, np.arange(batch_size))


def _positions(batch: tf.Tensor, shard: HostShard, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes the examples' positions in an epoch, int64 (b,), and their mask, bool (b,).

    Masked examples have the last position of the epoch.
    """
    positions = batch * shard.batch_size + tf.constant(shard.rows, tf.int64)
    return tf.minimum(positions, size - 1), positions < size


def _make_batch(
    pixels: DecodedImages,
    positions: tf.Tensor,
    mask: tf.Tensor,
    params: AugmentParams,
    matrices: CropMatrices,
    min_scale: int,
) -> dict:
    images = crop_batch(tf.gather(pixels.images, positions), params, matrices, min_scale)
    return {
        "index": tf.where(mask, tf.gather(pixels.indices, positions), -1),
        "label": tf.where(mask, tf.gather(pixels.labels, positions), 0),
        "mask": mask,
        "image": tf.where(mask[:, None, None, None], images, 0),
        "colour_shift": params.colour_shift,
    }
