"""Batches for training and evaluation: seeded, padded and resumable.

A batch has these arrays:

    image: uint8 (B, size, size, 3), RGB
    colour_shift: float32 (B, 3)
    label: int32 (B,)
    mask: bool (B,)
    index: int64 (B,)

No example is dropped. Black images pad the last batch of an epoch; their mask is False and
their index is -1. With `config.skip_bad`, an unreadable image is replaced by a black one, with
mask False, and keeps its index.

Every draw is a pure function of (seed, epoch, index), and the order depends only on
(seed, epoch). So a batch depends neither on where a run was resumed nor on how many processes feed
it. Each process makes only its own `rows` of a batch.
"""

import functools

import numpy as np
import tensorflow as tf

from vgg_jax.configs.colours import ColourStatistics
from vgg_jax.configs.train import TrainConfig
from vgg_jax.data import in_memory
from vgg_jax.data.batches import TRAINING_HINT, BatchIterator
from vgg_jax.data.decode import decode
from vgg_jax.data.splits import DataSource, HostShard, epoch_seeds, steps_per_epoch
from vgg_jax.data.transforms import (
    eval_example,
    resize_shorter_side,
    sample_augmentation,
    train_example,
)

EXAMPLE_KEYS = ("index", "encoded", "label", "mask")


def train_batches(
    source: DataSource,
    config: TrainConfig,
    statistics: ColourStatistics,
    *,
    first_epoch: int = 0,
    first_batch: int = 0,
    rows: np.ndarray | None = None,
) -> BatchIterator:
    """Makes the training batches of all epochs up to `config.epochs`, in one stream.

    Args:
        source: The training images.
        config: Augmentation, batch size, number of epochs and seed.
        statistics: Colours of the data set, for the colour shift.
        first_epoch: Epoch to start in, counted from 0.
        first_batch: Batch of this epoch to start with, counted from 0.
        rows: Rows of each batch to make, int64 (n,), increasing; None for all.

    Returns:
        The batches.
    """
    shard = _host_shard(config.batch_size, rows)
    if source.pixels is not None:
        return in_memory.train_batches(
            source, source.pixels, config, statistics, first_epoch, first_batch, shard
        )
    batch_size = config.batch_size
    per_epoch = steps_per_epoch(source, batch_size)

    def examples(number: int) -> tf.data.Dataset:
        first, position = divmod(first_epoch * per_epoch + first_batch + number, per_epoch)

        def epoch_examples(epoch: tf.Tensor) -> tf.data.Dataset:
            start = tf.where(epoch == first, tf.constant(position * batch_size, tf.int64), 0)
            order_seed, draw_seed = epoch_seeds(config.seed, epoch)
            ordered = source.examples(order_seed, start, shard)
            return _pad(ordered, source.size, batch_size, shard, epoch_seed=draw_seed)

        epochs = tf.data.Dataset.range(first, config.epochs)
        return epochs.flat_map(tf.autograph.experimental.do_not_convert(epoch_examples))

    def prepare(example: dict) -> dict:
        index = tf.maximum(example["index"], 0)
        params = sample_augmentation(example["epoch_seed"], index, config, statistics)
        return train_example({key: example[key] for key in EXAMPLE_KEYS}, config, params)

    num_rows = len(shard.rows) if shard else batch_size
    return BatchIterator(source, examples, prepare, num_rows, config.skip_bad, TRAINING_HINT)


def eval_batches(
    source: DataSource, config: TrainConfig, batch_size: int, rows: np.ndarray | None = None
) -> BatchIterator:
    """Makes the batches of one pass over a source, in its own order.

    Args:
        source: The images to evaluate.
        config: Test scale and image size.
        batch_size: Number of examples in a batch.
        rows: Rows of each batch to make, int64 (n,), increasing; None for all.

    Returns:
        The batches.
    """
    shard = _host_shard(batch_size, rows)
    if source.pixels is not None:
        return in_memory.eval_batches(source, source.pixels, config, batch_size, shard)

    def examples(number: int) -> tf.data.Dataset:
        ordered = source.examples(None, number * batch_size, shard)
        return _pad(ordered, source.size, batch_size, shard)

    prepare = functools.partial(eval_example, config=config)
    num_rows = len(shard.rows) if shard else batch_size
    return BatchIterator(source, examples, prepare, num_rows, config.skip_bad, TRAINING_HINT)


def rescaled_images(
    source: DataSource, scales: tuple[int, ...], exif: bool, rounding: str = "nearest"
) -> BatchIterator:
    """Makes batches of one whole image each, in the order of the source.

    Args:
        source: The images.
        scales: Lengths of the shorter side.
        exif: Turn and mirror a JPEG as its EXIF orientation says.
        rounding: As in `resize_shorter_side`.

    Returns:
        Batches {"scaled": uint8 (1, H, W, 3) for each scale, "label": int32 (1,),
        "index": int64 (1,)}.
    """

    def prepare(example: dict) -> dict:
        image = decode(example["encoded"], exif)
        others = {key: value for key, value in example.items() if key != "encoded"}
        scaled = tuple(resize_shorter_side(image, scale, rounding) for scale in scales)
        return others | {"scaled": scaled}

    return BatchIterator(source, lambda number: source.examples(None, number), prepare, 1)


def _host_shard(batch_size: int, rows: np.ndarray | None) -> HostShard | None:
    return None if rows is None or len(rows) == batch_size else HostShard(batch_size, rows)


def _pad(
    examples: tf.data.Dataset,
    size: int,
    batch_size: int,
    shard: HostShard | None,
    **constants: tf.Tensor,
) -> tf.data.Dataset:
    """Adds a mask and constants to examples, and masked examples that fill up the last batch."""
    if shard is None:
        num_masked = -size % batch_size
    else:
        last_batch = size % batch_size or batch_size
        num_masked = int(np.sum(shard.rows >= last_batch))
    black = {
        "index": np.int64(-1),
        "encoded": tf.io.encode_png(np.zeros((1, 1, 3), np.uint8)),
        "label": np.int32(0),
    }
    padding = tf.data.Dataset.from_tensors(black | {"mask": False} | constants).repeat(num_masked)
    return examples.map(lambda example: example | {"mask": True} | constants).concatenate(padding)
