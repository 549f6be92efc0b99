"""Batches of activations that frozen layers computed once, in memory."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from vgg_jax.configs.train import TrainConfig
from vgg_jax.data.batches import with_progress
from vgg_jax.data.cache import MAX_MEMORY_FRACTION
from vgg_jax.data.pipeline import eval_batches
from vgg_jax.data.splits import DataSource, epoch_seeds, permute_indices
from vgg_jax.errors import InputError
from vgg_jax.runtime.memory import free_memory

Batch = dict[str, np.ndarray]


class CachedFeatures(NamedTuple):
    """The activations of all images of a source, in its order."""

    features: np.ndarray  # float (n, h, w, C)
    labels: np.ndarray  # int32 (n,)
    indices: np.ndarray  # int64 (n,)
    mask: np.ndarray  # bool (n,), False for an image that `skip_bad` leaves out


def cache_features(
    source: DataSource, config: TrainConfig, batch_size: int, compute: Callable[[Batch], np.ndarray]
) -> CachedFeatures:
    """Computes the activations of the centre crops of a source.

    Args:
        source: The images.
        config: Scale and image size.
        batch_size: Number of images in a batch.
        compute: Maps a batch, as `eval_batches` makes it, to activations (batch_size, h, w, C).

    Returns:
        The activations.

    Raises:
        InputError: They do not fit into memory.
        DataError: An image cannot be read.
    """
    cached: CachedFeatures | None = None
    start = 0
    batches = eval_batches(source, config, batch_size)
    for batch in with_progress(batches, f"computing features of {source.name}", source.size):
        is_example = batch["index"] >= 0
        part = CachedFeatures(
            features=compute(batch)[is_example],
            labels=batch["label"][is_example],
            indices=batch["index"][is_example],
            mask=batch["mask"][is_example],
        )
        if cached is None:
            _check_memory(source, part.features[0].nbytes)
            cached = CachedFeatures(
                *(np.empty((source.size, *array.shape[1:]), array.dtype) for array in part)
            )
        stop = start + len(part.labels)
        for array, values in zip(cached, part, strict=True):
            array[start:stop] = values
        start = stop
    assert cached is not None  # a source has images
    return cached


def _check_memory(source: DataSource, bytes_per_image: int) -> None:
    num_bytes, free = bytes_per_image * source.size, free_memory()
    if num_bytes > MAX_MEMORY_FRACTION * free:
        raise InputError(
            f"the features of the {source.size} images of {source.name} take "
            f"{num_bytes / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free: expected at most "
            f"{MAX_MEMORY_FRACTION:.0%} of it; leave out --cache-features"
        )


def train_feature_batches(
    cached: CachedFeatures, config: TrainConfig, *, first_epoch: int, first_batch: int
) -> Iterator[Batch]:
    """Makes the training batches of all epochs up to `config.epochs`.

    The order of an epoch is that of `train_batches` for storage with random access.

    Args:
        cached: The activations of the training images.
        config: Batch size, number of epochs and seed.
        first_epoch: Epoch to start in, counted from 0.
        first_batch: Batch of this epoch to start with, counted from 0.

    Yields:
        Batches as those of `train_batches`, with "features" instead of "image" and "colour_shift".
    """
    size = len(cached.labels)
    for epoch in range(first_epoch, config.epochs):
        order_seed, _ = epoch_seeds(config.seed, tf.constant(epoch, tf.int64))
        order = permute_indices(tf.range(size, dtype=tf.int64), order_seed, size).numpy()
        first = first_batch if epoch == first_epoch else 0
        for start in range(first * config.batch_size, size, config.batch_size):
            yield _make_batch(cached, order[start : start + config.batch_size], config.batch_size)


def eval_feature_batches(cached: CachedFeatures, batch_size: int) -> Iterator[Batch]:
    """Makes the batches of one pass over a source, in its own order.

    Args:
        cached: The activations of the images.
        batch_size: Number of examples in a batch.

    Yields:
        Batches as those of `eval_batches`, with "features" instead of "image" and "colour_shift".
    """
    positions = np.arange(len(cached.labels))
    for start in range(0, len(positions), batch_size):
        yield _make_batch(cached, positions[start : start + batch_size], batch_size)


def _make_batch(cached: CachedFeatures, positions: np.ndarray, batch_size: int) -> Batch:
    """The examples at these positions, padded to the batch size."""
    num_padding = batch_size - len(positions)
    features, labels, indices, mask = (
        np.pad(array[positions], [(0, num_padding)] + [(0, 0)] * (array.ndim - 1))
        for array in cached
    )
    indices[len(positions) :] = -1
    return {"features": features, "label": labels, "index": indices, "mask": mask}
