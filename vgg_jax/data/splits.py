"""What a split is, whatever it is stored in: examples in a seeded order that can start anywhere."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

CORES = getattr(os, "process_cpu_count", os.cpu_count)() or 1
CHUNK = 64  # indices that are looked up by one call; enough to hide the cost of the call, 7 MB of ImageNet photos
IN_FLIGHT = (
    2 * CORES
)  # images that are prepared at once: with no more than cores, one that takes long holds up the others
SHUFFLE_BUFFER = (
    8192  # records of a sequential file held encoded: 0.9 GB of ImageNet photos, 10 MB of CIFAR
)


class HostShard(NamedTuple):
    """Which rows of each batch of an order are wanted: those that one of several processes feeds."""

    batch_size: int
    rows: np.ndarray  # int64 (n,), rising


# (seed of this epoch's order, int64 (2,), or None: in order; position to start at, the first of a batch where there is a share; what is
# wanted, or None: all) -> {"index": int64, "encoded": string, "label": int32}
Examples = Callable[..., tf.data.Dataset]


class DecodedImages(NamedTuple):
    """The images of a source in its order, all of one size."""

    images: tf.Tensor  # uint8 (n, H, W, 3)
    labels: tf.Tensor  # int32 (n,)
    indices: tf.Tensor  # int64 (n,)


@dataclasses.dataclass(frozen=True)
class DataSource:
    """The examples of one split, or of a part of one, as encoded bytes and a label."""

    name: str  # for messages: "cifar10 train"
    storage: str  # what the order of an epoch depends on besides the seed: "folder, names <digest>", "cifar10/3.0.2 tfrecord"
    classes: tuple[str, ...]
    size: int
    examples: Examples
    file_name: Callable[
        [int], str
    ]  # what an example's "index" is called in a message or a table: its path, or "cifar10 train record 17"
    skipped: tuple[str, ...] = ()  # files that are not images and were left out
    pixels: DecodedImages | None = None  # of small images in memory


@dataclasses.dataclass(frozen=True)
class StoredSplit:
    """A whole split as it is stored. `order` takes the sorted indices that are wanted, int64 (n,), and reads those."""

    name: str
    storage: str
    classes: tuple[str, ...]
    usable: np.ndarray  # int64 (n,), sorted: the indices of all but what is excluded or no image
    order: Callable[[np.ndarray], Examples]
    file_name: Callable[[int], str]
    skipped: tuple[str, ...] = ()
    excluded: int = 0  # how many of those to exclude are here


def steps_per_epoch(source: DataSource, batch_size: int) -> int:
    return -(-source.size // batch_size)


def subset(records: StoredSplit, kept: np.ndarray, name: str) -> DataSource:
    """The examples at the sorted indices `kept`, int64 (n,). An example keeps the index and the file name it has in the whole."""
    return DataSource(
        name,
        records.storage,
        records.classes,
        len(kept),
        records.order(kept),
        records.file_name,
        records.skipped,
    )


def full(records: StoredSplit) -> DataSource:
    return subset(records, records.usable, records.name)


def exclude_records(name: str, storage: str, size: int, exclude: Collection[str]) -> dict[str, Any]:
    """`usable`, `excluded` and `storage` of records that have no name but the split's and their number."""
    excluded = (
        [index for index in range(size) if record_name(name, index) in exclude] if exclude else []
    )
    if excluded:
        storage += f", without {len(excluded)} ({hashlib.sha256(repr(excluded).encode()).hexdigest()[:16]})"
    return {
        "usable": np.delete(np.arange(size), excluded),
        "excluded": len(excluded),
        "storage": storage,
    }


def record_name(name: str, index: int) -> str:
    return f"{name} record {index}"


def map_with_fallback(
    examples: tf.data.Dataset,
    function: Callable[[Any], Any],
    otherwise: Callable[[Any], Any],
    at_once: int,
) -> tf.data.Dataset:
    """`function` of each example, or `otherwise` of one with which it fails, in order."""

    def one(*example: Any) -> tf.data.Dataset:
        single = tf.data.Dataset.from_tensors(example[0] if len(example) == 1 else example)
        return (
            single.map(function)
            .ignore_errors(log_warning=False)
            .concatenate(single.map(otherwise))
            .take(1)
        )

    return examples.interleave(
        one, cycle_length=at_once, block_length=1, num_parallel_calls=at_once, deterministic=True
    )


def train_val_split(size: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices for training and, a seeded `fraction` but at least one if it is not 0, for validation."""
    # RandomState's stream is frozen: another numpy must not move training images into the validation part of a resumed run.
    permutation = np.random.RandomState(np.random.MT19937(seed)).permutation(size)
    count = max(1, round(size * fraction)) if fraction else 0
    return np.sort(permutation[count:]).astype(np.int64), np.sort(permutation[:count]).astype(
        np.int64
    )


def epoch_seeds(seed: int, epoch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """An epoch's seeds of its order and of its draws, int64 (2,), pure functions of the two."""
    order, draws = (
        tf.random.experimental.stateless_fold_in(tf.constant([seed, stream], tf.int64), epoch)
        for stream in (0, 1)
    )
    return order, draws


def permute_indices(
    positions: tf.Tensor, seed: tf.Tensor, size: int, rounds: int = 16
) -> tf.Tensor:
    """int64 positions -> what is there after a permutation of 0 … size - 1 by `seed`, int64 (2,). Nothing of that size is held.

    `tf.random.experimental.index_shuffle` is this operation with 4 rounds and the seed as its key. Measured over epochs, that repeats after
    256 of them, and of 45,000 images the orders of two epochs correlate by 0.67, neighbours within one by 0.10. With 16 rounds and a
    key that is drawn from the seed, both are those of numpy's permutations.
    """
    key = tf.random.stateless_uniform((3,), seed, minval=None, maxval=None, dtype=tf.int32)
    return tf.raw_ops.RandomIndexShuffle(
        index=positions,
        seed=tf.bitcast(key, tf.uint32),
        max_index=tf.constant(size - 1, tf.int64),
        rounds=rounds,
    )


def random_access(kept: np.ndarray, read: Callable[[tf.data.Dataset], tf.data.Dataset]) -> Examples:
    """For storage that finds an example by its index. `read` takes vectors of at most CHUNK indices and gives examples one by one.

    Starting anywhere costs nothing, and the permutation is never held in memory.
    """
    size = len(kept)
    lookup = tf.constant(kept, tf.int64)

    def examples(
        seed: tf.Tensor | None, start: tf.Tensor | int = 0, share: HostShard | None = None
    ) -> tf.data.Dataset:
        def indices(positions: tf.Tensor) -> tf.Tensor:
            if seed is not None:
                positions = permute_indices(positions, seed, size)
            return tf.gather(lookup, positions)

        positions = tf.data.Dataset.range(start, size)
        if share is not None:
            batches = tf.data.Dataset.range(start, size, share.batch_size)
            positions = batches.flat_map(
                lambda first: tf.data.Dataset.from_tensor_slices(first + share.rows)
            ).filter(lambda at: at < size)
        return read(positions.batch(CHUNK).map(indices))

    return examples


def sequential(
    kept: np.ndarray,
    size: int,
    scan: Callable[[tf.Tensor | None], tf.data.Dataset],
    parse: Callable[[dict], dict],
) -> Examples:
    """For storage that is read from its beginning. `scan` gives {"index", "record"}, files in a seeded order; `parse` makes an example.

    Starting elsewhere reads, but does not parse, what lies before; a share reads, but does not parse, what others feed.
    """
    wanted = tf.constant(np.isin(np.arange(size), kept))

    def examples(
        seed: tf.Tensor | None, start: tf.Tensor | int = 0, share: HostShard | None = None
    ) -> tf.data.Dataset:
        records = scan(seed)
        if len(kept) < size:
            records = records.filter(lambda record: wanted[record["index"]])
        if seed is not None:
            # The second number of a folded seed is the epoch itself, so draw one from both.
            number = tf.random.stateless_uniform((), seed, minval=None, maxval=None, dtype=tf.int64)
            records = records.shuffle(SHUFFLE_BUFFER, seed=number, reshuffle_each_iteration=False)
        records = records.skip(start)
        if share is not None:
            mine = tf.constant(np.isin(np.arange(share.batch_size), share.rows))
            numbered = records.enumerate().filter(lambda number, _: mine[number % share.batch_size])
            records = numbered.map(lambda _, record: record)
        return records.map(parse, num_parallel_calls=CORES, deterministic=True)

    return examples
