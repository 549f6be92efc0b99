"""A source in memory.

It is read once. The encoded images stay in memory, and so do the pixels of small images.
"""

import dataclasses

import numpy as np
import tensorflow as tf

from vgg_jax.configs.train import TrainConfig
from vgg_jax.data import in_memory
from vgg_jax.data.batches import TRAINING_HINT, BatchIterator, with_progress
from vgg_jax.data.decode import decode
from vgg_jax.data.splits import (
    CORES,
    DataSource,
    DecodedImages,
    ExampleReader,
    epoch_seeds,
    pick,
    random_access,
)
from vgg_jax.errors import DataError, InputError
from vgg_jax.runtime.memory import free_memory

IMAGES_PER_BATCH = 64  # read or decoded by one call
MAX_MEMORY_FRACTION = 0.8  # of the free memory; training needs the rest
PEAK_COPIES = 2  # of all images while they are joined: in parts, and in one piece


def cache_in_memory(source: DataSource, config: TrainConfig) -> DataSource:
    """Reads a source into memory.

    The encoded images are kept. If they are small and of one size, as CIFAR's, their pixels are
    also kept. The order of an epoch becomes that of `random_access`.

    Args:
        source: The source to read.
        config: The training configuration, which tells how the pixels are used.

    Returns:
        The source in memory.

    Raises:
        InputError: The images do not fit into memory, or cannot be read.
    """
    if not source.size:
        return source
    indices, encoded, labels = _read_all(source)
    cached = _read_from_memory(source, encoded, labels)
    images = _decode_all(cached, encoded[0], config)
    if images is None:
        return cached
    return dataclasses.replace(cached, pixels=DecodedImages(images, labels, indices))


def first_examples(
    source: DataSource, config: TrainConfig, count: int
) -> tuple[DataSource, np.ndarray]:
    """Reads the examples that training sees first, and keeps them in memory.

    Training crops them as it crops those of `source`. TFRecord files are read up to these examples
    only.

    Args:
        source: The training images, cached if training caches them.
        config: Seed, EXIF and `skip_bad`.
        count: Maximum number of examples.

    Returns:
        The source of the first `count` examples, and their indices in the order of the first epoch,
        int64 (n,). With `config.skip_bad`, images that cannot be decoded are left out.

    Raises:
        DataError: An image cannot be decoded.
    """
    seed, _ = epoch_seeds(config.seed, tf.constant(0, tf.int64))

    def prepare(example: dict) -> dict:
        sides = tf.shape(decode(example["encoded"], config.exif))
        return example | {"sides": sides, "mask": True}

    batches = BatchIterator(
        source,
        lambda number: source.examples(seed, number * count),
        prepare,
        count,
        config.skip_bad,
        TRAINING_HINT,
    )
    first: list[tuple[int, bytes, int]] = []
    for batch in batches:
        columns = (batch[name][batch["mask"]] for name in ("index", "encoded", "label"))
        first += zip(*columns, strict=True)
        if len(first) >= count:
            break
    first = first[:count]
    order = np.array([index for index, _, _ in first], np.int64)
    _, encoded, labels = zip(*sorted(first, key=lambda row: row[0]), strict=True)
    picked = pick(source, np.searchsorted(source.indices, order))
    return _read_from_memory(picked, tf.constant(encoded), tf.constant(labels, tf.int32)), order


def _read_from_memory(source: DataSource, encoded: tf.Tensor, labels: tf.Tensor) -> DataSource:
    """Replaces the reader of a source by one of the examples in memory, in its own order."""
    indices = tf.constant(source.indices, tf.int64)

    def read(positions: tf.data.Dataset) -> tf.data.Dataset:
        def read_one(i: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"index": indices[i], "encoded": encoded[i], "label": labels[i]}

        return positions.unbatch().map(read_one, num_parallel_calls=CORES, deterministic=True)

    def select(selected: np.ndarray) -> ExampleReader:
        return random_access(np.searchsorted(source.indices, selected), read)

    return dataclasses.replace(source, select=select, examples=select(source.indices))


def _read_all(source: DataSource) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Reads the indices, the encoded images and the labels of all examples."""
    num_bytes, count, free = 0, 0, free_memory()
    columns: dict[str, list[np.ndarray]] = {"index": [], "encoded": [], "label": []}
    batches = BatchIterator(
        source,
        lambda number: source.examples(None, number * IMAGES_PER_BATCH),
        dict,
        IMAGES_PER_BATCH,
    )
    for batch in with_progress(batches, f"reading {source.name} into memory", source.size):
        for name, parts in columns.items():
            parts.append(batch[name])
        num_bytes += sum(map(len, batch["encoded"]))
        count += len(batch["label"])
        if PEAK_COPIES * num_bytes > MAX_MEMORY_FRACTION * free:
            raise InputError(
                f"{source.name} does not fit into memory: {count} of its {source.size} images "
                f"take {PEAK_COPIES} times {num_bytes / 1e9:.1f} GB of the {free / 1e9:.1f} GB "
                "that were free; leave out --cache, or free memory to resume a run"
            )
    if count != source.size:
        raise DataError(
            f"{source.name} should have {source.size} images, but has {count}: prepare it again"
        )
    # Each column is dropped as soon as it is joined.
    indices, encoded, labels = (
        tf.constant(np.concatenate(columns.pop(name))) for name in ("index", "encoded", "label")
    )
    return indices, encoded, labels


def _decode_all(source: DataSource, first: tf.Tensor, config: TrainConfig) -> tf.Tensor | None:
    """Decodes all images, uint8 (n, H, W, 3), unless they are large or their sizes differ."""
    try:
        height, width, _ = decode(first, config.exif).shape
    except (tf.errors.OpError, ValueError):  # training reports the file
        return None
    if not in_memory.is_small_enough((height, width), config.scale, config.image_size):
        return None
    num_bytes = source.size * height * width * 3
    if PEAK_COPIES * num_bytes > MAX_MEMORY_FRACTION * free_memory():
        return None

    def prepare(example: dict) -> dict:
        image = decode(example["encoded"], config.exif)
        is_same_size = tf.reduce_all(tf.shape(image)[:2] == [height, width])
        pixels = tf.cond(
            is_same_size, lambda: image, lambda: tf.zeros((height, width, 3), tf.uint8)
        )
        return {"is_same_size": is_same_size, "image": pixels}

    batches = BatchIterator(
        source,
        lambda number: source.examples(None, number * IMAGES_PER_BATCH),
        prepare,
        IMAGES_PER_BATCH,
        hint=TRAINING_HINT,
    )
    images = np.empty((source.size, height, width, 3), np.uint8)
    start = 0
    try:
        for batch in batches:
            if not batch["is_same_size"].all():
                return None
            stop = start + len(batch["image"])
            images[start:stop] = batch["image"]
            start = stop
    except DataError:
        if config.skip_bad:  # training leaves them out one by one
            return None
        raise
    return tf.constant(images)
