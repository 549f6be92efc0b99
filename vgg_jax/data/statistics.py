"""Measures the colours of image files."""

import numpy as np
import tensorflow as tf

from vgg_jax.colours import ColourMeasurements, from_sums
from vgg_jax.data.batches import BatchIterator, with_progress
from vgg_jax.data.decode import decode
from vgg_jax.data.splits import DataSource
from vgg_jax.errors import InputError

IMAGES_PER_BATCH = 64


def measure_colours(
    source: DataSource, progress: bool = True, skip_bad: bool = False
) -> ColourMeasurements:
    """Measures the colours of the whole images of a source, in one pass and constant memory.

    EXIF is ignored, since an orientation changes no colour.

    Args:
        source: The images.
        progress: Show the progress.
        skip_bad: Leave out images that cannot be decoded, within the limit of `BatchIterator`.

    Returns:
        The measurements.

    Raises:
        InputError: The source is empty.
        DataError: An image cannot be decoded.
    """
    if not source.size:
        raise InputError(
            f"{source.name} has no images: expected at least one to measure colours on"
        )
    sums, count = np.zeros((5, 3, 3)), 0
    batches = BatchIterator(
        source,
        lambda number: source.examples(None, number * IMAGES_PER_BATCH),
        _sums,
        IMAGES_PER_BATCH,
        skip_bad,
    )
    name = f"colours of {source.name}"
    for batch in with_progress(batches, name, source.size, quiet=not progress):
        sums += batch["sums"].sum(0)
        count += int(batch["mask"].sum())
    return from_sums(sums, count)


def _sums(example: dict) -> dict:
    """Sums of one image: pixels, their sum, their outer products, their mean, their deviation.

    They are stacked to a float64 (5, 3, 3). The first three are whole numbers, so their sums over
    images are exact in any order below 2**53 (docs/performance.md#sums-of-colours).
    """
    pixels = tf.cast(tf.reshape(decode(example["encoded"], exif=False), (-1, 3)), tf.float64)
    count = tf.cast(tf.shape(pixels)[0], tf.float64)
    total = tf.reduce_sum(pixels, 0)
    products = tf.matmul(pixels, pixels, transpose_a=True)
    mean = total / count
    variance = tf.linalg.diag_part(products) / count - mean**2
    deviation = tf.sqrt(tf.maximum(variance, 0.0))
    rows = (count, total, products, mean, deviation)
    sums = tf.stack([tf.broadcast_to(row, (3, 3)) for row in rows])
    return {"index": example["index"], "mask": True, "sums": sums}
