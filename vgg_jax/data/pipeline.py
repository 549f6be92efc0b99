"""Batches for training and evaluation: {"image", "colour_shift", "label", "mask", "index"}, seeded, padded, resumable.

uint8 image (B, size, size, 3), float32 colour_shift (B, 3), int32 label (B,), bool mask (B,), int64 index (B,). No example is dropped: the
last batch of an epoch is filled up with black images whose mask is False and whose index is -1. With `config.skip_bad` an image that cannot
be read is such a one, with its own index.

Every draw is a pure function of (seed, epoch, index), and the order one of (seed, epoch): what a batch holds does not depend on where
the run was started, nor on how many processes feed it. Each of several reads the `rows` of a batch that it feeds, int64 (n,), rising.
"""

import functools

import numpy as np
import tensorflow as tf

from vgg_jax.configs.colours import ColourStatistics
from vgg_jax.configs.train import TrainConfig
from vgg_jax.data import in_memory
from vgg_jax.data.batches import BatchIterator
from vgg_jax.data.decode import decode
from vgg_jax.data.splits import DataSource, HostShard, epoch_seeds, steps_per_epoch
from vgg_jax.data.transforms import (
    eval_example,
    resize_shorter_side,
    sample_augmentation,
    train_example,
)

EXAMPLE = ("index", "encoded", "label", "mask")


def train_batches(
    source: DataSource,
    config: TrainConfig,
    statistics: ColourStatistics,
    *,
    first_epoch: int = 0,
    first_batch: int = 0,
    rows: np.ndarray | None = None,
) -> BatchIterator:
    """The batches of the epochs up to `config.epochs`, in one stream, from batch `first_batch` of epoch `first_epoch` on (both from 0)."""
    share = _share(config.batch_size, rows)
    if source.pixels is not None:
        return in_memory.train_batches(
            source, source.pixels, config, statistics, first_epoch, first_batch, share
        )
    per_epoch = steps_per_epoch(source, config.batch_size)

    def examples(batch: int) -> tf.data.Dataset:
        first, at = divmod(first_epoch * per_epoch + first_batch + batch, per_epoch)

        def epoch(number: tf.Tensor) -> tf.data.Dataset:
            start = tf.where(number == first, tf.constant(at * config.batch_size, tf.int64), 0)
            order, draws = epoch_seeds(config.seed, number)
            return _padded(
                source.examples(order, start, share),
                source.size,
                config.batch_size,
                share,
                epoch_seed=draws,
            )

        return tf.data.Dataset.range(first, config.epochs).flat_map(
            tf.autograph.experimental.do_not_convert(epoch)
        )

    def prepare(example: dict) -> dict:
        drawn = sample_augmentation(
            example["epoch_seed"], tf.maximum(example["index"], 0), config, statistics
        )
        return train_example({key: example[key] for key in EXAMPLE}, config, drawn)

    return BatchIterator(
        source, examples, prepare, len(share.rows) if share else config.batch_size, config.skip_bad
    )


def eval_batches(
    source: DataSource, config: TrainConfig, batch_size: int, rows: np.ndarray | None = None
) -> BatchIterator:
    """One pass over the source, in its own order."""
    share = _share(batch_size, rows)
    if source.pixels is not None:
        return in_memory.eval_batches(source, source.pixels, config, batch_size, share)

    def examples(batch: int) -> tf.data.Dataset:
        return _padded(
            source.examples(None, batch * batch_size, share), source.size, batch_size, share
        )

    prepare = functools.partial(eval_example, config=config)
    return BatchIterator(
        source, examples, prepare, len(share.rows) if share else batch_size, config.skip_bad
    )


def _share(batch_size: int, rows: np.ndarray | None) -> HostShard | None:
    return None if rows is None or len(rows) == batch_size else HostShard(batch_size, rows)


def rescaled_images(source: DataSource, scales: tuple[int, ...], exif: bool) -> BatchIterator:
    """The whole images of a source, one by one in its order: {"scaled": a tuple of uint8 (1, H, W, 3), one a scale, "label", "index"}."""

    def prepare(example: dict) -> dict:
        image = decode(example["encoded"], exif)
        rest = {key: value for key, value in example.items() if key != "encoded"}
        return rest | {"scaled": tuple(resize_shorter_side(image, scale) for scale in scales)}

    return BatchIterator(source, lambda at: source.examples(None, at), prepare, 1)


def _padded(
    examples: tf.data.Dataset,
    size: int,
    batch_size: int,
    share: HostShard | None,
    **constants: tf.Tensor,
) -> tf.data.Dataset:
    """Examples with a mask and the `constants`, followed by as many masked ones as fill up the last batch."""
    lacking = (
        -size % batch_size
        if share is None
        else int(np.sum(share.rows >= (size % batch_size or batch_size)))
    )
    black = {
        "index": np.int64(-1),
        "encoded": tf.io.encode_png(np.zeros((1, 1, 3), np.uint8)),
        "label": np.int32(0),
    }
    padding = tf.data.Dataset.from_tensors(black | {"mask": False} | constants).repeat(lacking)
    return examples.map(lambda example: example | {"mask": True} | constants).concatenate(padding)
