"""A source in memory: read once, its encoded images kept, and of small ones the pixels."""

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from vgg_jax.configs.train import TrainConfig
from vgg_jax.data import in_memory
from vgg_jax.data.batches import BatchIterator
from vgg_jax.data.decode import decode
from vgg_jax.data.splits import CORES, DataSource, DecodedImages, random_access
from vgg_jax.errors import DataError, InputError

AT_ONCE = 64  # images that are read, or decoded, in one piece: enough to hide the cost of a call
SHARE = 0.8  # of the free memory that a cache may take while it is made: the rest is the training's
COPIES = 2  # of everything at that time: as it is read, and in one piece


def cache_in_memory(source: DataSource, config: TrainConfig) -> DataSource:
    """The source with all its encoded images in memory; where they are small and of one size, as CIFAR's, with their pixels too.

    An epoch's order is then that of storage that finds an example by its index. Raises InputError for what cannot be read, and where
    memory would run out.
    """
    if not source.size:
        return source
    held, count, room = 0, 0, free_memory()
    read: dict[str, list[np.ndarray]] = {"index": [], "encoded": [], "label": []}
    stream = BatchIterator(source, lambda at: source.examples(None, at * AT_ONCE), dict, AT_ONCE)
    with tqdm(
        total=source.size,
        desc=f"reading {source.name} into memory",
        unit="image",
        disable=None,
        delay=2,
    ) as bar:
        for batch in stream:
            for name, parts in read.items():
                parts.append(batch[name])
            held += sum(map(len, batch["encoded"]))
            count += len(batch["label"])
            bar.update(len(batch["label"]))
            if COPIES * held > SHARE * room:
                raise InputError(
                    f"{source.name} does not fit into memory: {count} of its {source.size} images take {COPIES} times {held / 1e9:.1f} GB "
                    f"of {room / 1e9:.1f} GB that were free; leave out --cache, or free memory if a run is to go on"
                )
    if count != source.size:
        raise DataError(
            f"{source.name} says that it has {source.size} images, and has {count}: prepare it again"
        )
    indices, encoded, labels = (tf.constant(np.concatenate(read.pop(name))) for name in tuple(read))

    def at(positions: tf.data.Dataset) -> tf.data.Dataset:
        def one(i: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"index": indices[i], "encoded": encoded[i], "label": labels[i]}

        return positions.unbatch().map(one, num_parallel_calls=CORES, deterministic=True)

    whole = dataclasses.replace(source, examples=random_access(np.arange(source.size), at))
    return dataclasses.replace(whole, pixels=_pixels(whole, encoded, labels, indices, config))


def _pixels(
    source: DataSource,
    encoded: tf.Tensor,
    labels: tf.Tensor,
    indices: tf.Tensor,
    config: TrainConfig,
) -> DecodedImages | None:
    """What `Source.pixels` is, or None where the images are not small, or not of one size."""
    try:
        height, width, _ = decode(encoded[0], config.exif).shape
    except (tf.errors.OpError, ValueError):  # the stream names the file
        return None
    size = source.size * height * width * 3
    if (
        not in_memory.is_small_enough((height, width), config.scale, config.image_size)
        or COPIES * size > SHARE * free_memory()
    ):
        return None

    def prepare(example: dict) -> dict:
        image = decode(example["encoded"], config.exif)
        equal = tf.reduce_all(tf.shape(image)[:2] == [height, width])
        return {
            "equal": equal,
            "image": tf.cond(equal, lambda: image, lambda: tf.zeros((height, width, 3), tf.uint8)),
        }

    images = np.empty((source.size, height, width, 3), np.uint8)
    try:
        for number, batch in enumerate(
            BatchIterator(source, lambda at: source.examples(None, at * AT_ONCE), prepare, AT_ONCE)
        ):
            if not batch["equal"].all():
                return None
            images[number * AT_ONCE :][: len(batch["image"])] = batch["image"]
    except DataError:
        if config.skip_bad:  # they are left out one by one
            return None
        raise
    return DecodedImages(tf.constant(images), labels, indices)


def free_memory() -> float:
    """Bytes that Linux can give without swapping, in a container those below its limit; elsewhere, where nobody says, without a bound."""
    bounds = [float("inf")]
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        bounds.append(
            next(
                int(line.split()[1]) * 1024.0 for line in lines if line.startswith("MemAvailable:")
            )
        )
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        limit, used = (
            int(Path("/sys/fs/cgroup", name).read_text())
            for name in ("memory.max", "memory.current")
        )
        bounds.append(float(limit - used))
    return min(bounds)
