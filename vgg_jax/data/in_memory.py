"""Batches of small images that lie in memory, a whole batch by a few operations: one by one, calling these takes longer than their work."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from vgg_jax.configs.colours import ColourStatistics
from vgg_jax.configs.train import TrainConfig
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
    resample_rows,
    rescaled_sides,
    sample_augmentation,
    source_window,
    to_uint8,
)

SMALL = 64 * 64  # pixels of an image, and of a crop, at most
OFFSETS = 600  # of all scales, at most; making the matrices of so many takes two seconds


class CropMatrices(NamedTuple):
    """Each crop that a range of scales has, as the matrices that resample an image along y and along x (and there mirrored)."""

    along_y: tf.Tensor  # float32 (k, size, H)
    along_x: tf.Tensor  # float32 (2 k, size, W), the mirrored ones behind the others
    first: tf.Tensor  # int32, by scale: where its offsets begin, (scales,)
    count: tf.Tensor  # int32, by scale: of its offsets along y and along x, (scales, 2)


def is_small_enough(sides: tuple[int, int], scales: tuple[int, ...], size: int) -> bool:
    """Whether images of these sides are small enough, and their crops few enough."""
    offsets = sum(
        round(scale * max(sides) / min(sides)) - size + 1
        for scale in range(scales[0], scales[-1] + 1)
    )
    return max(sides[0] * sides[1], size * size) <= SMALL and offsets <= OFFSETS


def crop_matrices(sides: tuple[int, int], scales: tuple[int, ...], size: int) -> CropMatrices:
    along: tuple[list, list] = [], []
    first, count = [], []
    for scale in range(scales[0], scales[-1] + 1):
        offsets = (rescaled_sides(tf.constant(sides, tf.float64), scale).numpy() - size + 1).astype(
            np.int32
        )
        first.append(len(along[0]))
        count.append(offsets)
        for offset in range(offsets.max()):
            part = source_window(
                tf.constant(sides), scale, size, tf.constant((offset + 0.5) / offsets)
            )
            for axis, rows in enumerate(along):
                matrix = resample_rows(
                    tf.eye(int(part.sides[axis])), size, part.zoom[axis], part.translation[axis]
                )
                before = int(part.first[axis])
                rows.append(
                    tf.pad(matrix, [[0, 0], [before, sides[axis] - before - int(part.sides[axis])]])
                )
    along_x = tf.stack(along[1])
    return CropMatrices(
        tf.stack(along[0]),
        tf.concat([along_x, along_x[:, ::-1]], 0),
        tf.constant(first),
        tf.constant(np.stack(count)),
    )


def crop_batch(
    images: tf.Tensor, drawn: AugmentParams, matrices: CropMatrices, smallest: int
) -> tf.Tensor:
    """uint8 (b, H, W, 3) -> uint8 (b, size, size, 3): for each image what `crop_resized` and `flip` would give of its draw.

    `smallest` is the scale that `matrices` begins with. Equal but for a level where two orders of additions fall on the two sides of a
    half, in 3 of a million values of CIFAR-10.
    """
    fractions = tf.stack([drawn.y_fraction, drawn.x_fraction], -1)
    count = tf.gather(matrices.count, drawn.scale - smallest)
    offsets = tf.minimum(
        tf.cast(tf.floor(fractions * tf.cast(count, tf.float64)), tf.int32), count - 1
    )
    at = tf.gather(matrices.first, drawn.scale - smallest)[:, None] + offsets
    along_y = tf.gather(matrices.along_y, at[:, 0])
    along_x = tf.gather(matrices.along_x, at[:, 1] + tf.where(drawn.flip, len(matrices.along_y), 0))
    b, height, width, _ = tf.unstack(tf.shape(images))
    size = matrices.along_y.shape[1]
    rows = along_y @ tf.reshape(tf.cast(images, tf.float32), (b, height, width * 3))
    columns = tf.transpose(tf.reshape(rows, (b, size, width, 3)), (0, 2, 1, 3))
    columns = along_x @ tf.reshape(columns, (b, width, size * 3))
    return to_uint8(tf.transpose(tf.reshape(columns, (b, size, size, 3)), (0, 2, 1, 3)))


def train_batches(
    source: DataSource,
    pixels: DecodedImages,
    config: TrainConfig,
    statistics: ColourStatistics,
    first_epoch: int,
    first_batch: int,
    share: HostShard | None = None,
) -> BatchIterator:
    """As `vgg_jax.data.train_batches`."""
    per_epoch = steps_per_epoch(source, config.batch_size)
    matrices = crop_matrices(_sides(pixels), config.scale, config.image_size)

    def examples(batch: int) -> tf.data.Dataset:
        first, at = divmod(first_epoch * per_epoch + first_batch + batch, per_epoch)

        def epoch(number: tf.Tensor) -> tf.data.Dataset:
            start = tf.where(number == first, tf.constant(at, tf.int64), 0)
            return tf.data.Dataset.range(start, per_epoch).map(
                lambda batch: {"batch": batch, "epoch": number}
            )

        return tf.data.Dataset.range(first, config.epochs).flat_map(
            tf.autograph.experimental.do_not_convert(epoch)
        )

    def prepare(example: dict) -> dict:
        order, draws = epoch_seeds(config.seed, example["epoch"])
        positions, mask = _positions(
            example["batch"], share or _all(config.batch_size), source.size
        )
        positions = permute_indices(positions, order, source.size)
        drawn = sample_augmentation(
            draws, tf.where(mask, tf.gather(pixels.indices, positions), 0), config, statistics
        )
        return _batch(pixels, positions, mask, drawn, matrices, config.scale[0])

    return BatchIterator(source, examples, prepare, None)


def eval_batches(
    source: DataSource,
    pixels: DecodedImages,
    config: TrainConfig,
    batch_size: int,
    share: HostShard | None = None,
) -> BatchIterator:
    """As `vgg_jax.data.eval_batches`."""
    share = share or _all(batch_size)
    count = len(share.rows)
    matrices = crop_matrices(_sides(pixels), (config.test_scale,), config.image_size)

    def prepare(batch: tf.Tensor) -> dict:
        positions, mask = _positions(batch, share, source.size)
        half = tf.fill((count,), tf.constant(0.5, tf.float64))
        drawn = AugmentParams(
            tf.fill((count,), config.test_scale),
            half,
            half,
            tf.zeros(count, tf.bool),
            tf.zeros((count, 3)),
        )
        return _batch(pixels, positions, mask, drawn, matrices, config.test_scale)

    return BatchIterator(
        source,
        lambda at: tf.data.Dataset.range(at, steps_per_epoch(source, batch_size)),
        prepare,
        None,
    )


def _sides(pixels: DecodedImages) -> tuple[int, int]:
    height, width = pixels.images.shape[1:3]
    return height, width


def _all(batch_size: int) -> HostShard:
    return HostShard(batch_size, np.arange(batch_size))


def _positions(batch: tf.Tensor, share: HostShard, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """int64 (b,) of a batch by its number, and bool (b,): which of them there are; the last one stands for those that are not."""
    positions = batch * share.batch_size + tf.constant(share.rows, tf.int64)
    return tf.minimum(positions, size - 1), positions < size


def _batch(
    pixels: DecodedImages,
    positions: tf.Tensor,
    mask: tf.Tensor,
    drawn: AugmentParams,
    matrices: CropMatrices,
    smallest: int,
) -> dict:
    images = crop_batch(tf.gather(pixels.images, positions), drawn, matrices, smallest)
    return {
        "index": tf.where(mask, tf.gather(pixels.indices, positions), -1),
        "label": tf.where(mask, tf.gather(pixels.labels, positions), 0),
        "mask": mask,
        "image": tf.where(mask[:, None, None, None], images, 0),
        "colour_shift": drawn.colour_shift,
    }
