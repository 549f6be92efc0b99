"""Splits of a data set, independent of their storage.

A split gives its examples in a seeded order that can start anywhere.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow as tf

CORES = getattr(os, "process_cpu_count", os.cpu_count)() or 1
# Indices that one call looks up. 64 ImageNet photos take 7 MB
# (docs/performance.md#memory-of-the-input).
INDICES_PER_CALL = 64
# Examples that are prepared at the same time. With one per core, a slow one would hold up the
# others.
PARALLEL_EXAMPLES = 2 * CORES
# Encoded records of a split in memory (docs/performance.md#memory-of-the-input). A split of this
# size is shuffled completely.
MAX_BYTES_IN_MEMORY = 2**30


class HostShard(NamedTuple):
    """Rows of each batch that one of several processes feeds."""

    batch_size: int  # of the whole batch
    rows: np.ndarray  # int64 (n,), increasing


class ExampleReader(Protocol):
    """Reads the encoded examples of a split, in order or shuffled, from any position on."""

    def __call__(
        self,
        seed: tf.Tensor | None,
        start: tf.Tensor | int = 0,
        shard: HostShard | None = None,
    ) -> tf.data.Dataset:
        """Reads one epoch.

        Args:
            seed: Seed of the order, int64 (2,), or None to read in the order of the storage.
            start: Position in the order to start at. With a shard, it is the first one of a batch.
            shard: Rows to read of each batch, or None for all.

        Returns:
            Examples {"index": int64, "encoded": string, "label": int32}.
        """


class DecodedImages(NamedTuple):
    """The images of a source in its order, all of one size."""

    images: tf.Tensor  # uint8 (n, H, W, 3)
    labels: tf.Tensor  # int32 (n,)
    indices: tf.Tensor  # int64 (n,)


@dataclasses.dataclass(frozen=True)
class DataSource:
    """The examples of one split, or of a part of it, as encoded bytes and a label.

    Attributes:
        name: Name for messages: "cifar10 train".
        storage: All that the order of an epoch depends on, except for the seed:
            "folder, names <digest>", "list, labels <digest>, names <digest>",
            "cifar10/3.0.2 tfrecord".
        classes: Names of the classes. A label is an index into them.
        indices: Indices of the examples in the split, int64 (size,), sorted.
        select: Makes the reader of some of them, as `StoredSplit.select` does.
        examples: Reads the examples.
        file_name: Maps the "index" of an example to its name: its path, or
            "cifar10 train record 17".
        skipped: Files that were left out because they are not images.
        labels: Class of each example, int32 (size,), or None if it is only known once the example
            is read.
        pixels: Decoded images, if they are small and in memory.
    """

    name: str
    storage: str
    classes: tuple[str, ...]
    indices: np.ndarray
    select: Callable[[np.ndarray], ExampleReader]
    examples: ExampleReader
    file_name: Callable[[int], str]
    skipped: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    pixels: DecodedImages | None = None

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.indices)


@dataclasses.dataclass(frozen=True)
class StoredSplit:
    """A whole split as it is stored.

    Attributes:
        name: As in `DataSource`, as are `storage`, `classes`, `file_name` and `skipped`.
        usable: Indices of the examples that are images and are not excluded, int64 (n,), sorted.
        select: Makes the reader of the examples at some indices, int64 (n,), sorted.
        excluded: Number of examples that are left out because they were to be excluded.
        labels: Class of each usable example, int (n,), or None if it is only known once the
            example is read.
        num_bytes: Size of the encoded examples, if known.
    """

    name: str
    storage: str
    classes: tuple[str, ...]
    usable: np.ndarray
    select: Callable[[np.ndarray], ExampleReader]
    file_name: Callable[[int], str]
    skipped: tuple[str, ...] = ()
    excluded: int = 0
    labels: np.ndarray | None = None
    num_bytes: int = 0


def steps_per_epoch(source: DataSource, batch_size: int) -> int:
    """Number of batches of an epoch, the last of which may be padded."""
    return -(-source.size // batch_size)


def subset(split: StoredSplit, indices: np.ndarray, name: str) -> DataSource:
    """Selects some examples of a split.

    Args:
        split: The whole split.
        indices: Indices of the examples, int64 (n,), sorted.
        name: Name of the source.

    Returns:
        A source whose examples keep the index and the file name that they have in the split.
    """
    labels = split.labels
    if labels is not None:
        labels = labels[np.searchsorted(split.usable, indices)]
    return DataSource(
        name=name,
        storage=split.storage,
        classes=split.classes,
        indices=indices,
        select=split.select,
        examples=split.select(indices),
        file_name=split.file_name,
        skipped=split.skipped,
        labels=labels,
    )


def pick(source: DataSource, positions: np.ndarray) -> DataSource:
    """Selects some examples of a source.

    Args:
        source: The source.
        positions: Positions of the examples in the source's own order, int (n,).

    Returns:
        A source of these examples in the order of `source`, each once. They keep the index, the
        label, the file name and the pixels that they have in `source`.
    """
    positions = np.unique(np.asarray(positions, np.int64))
    indices = source.indices[positions]
    pixels = source.pixels
    if pixels is not None:
        pixels = DecodedImages(*(tf.gather(tensor, positions) for tensor in pixels))
    return dataclasses.replace(
        source,
        indices=indices,
        examples=source.select(indices),
        labels=None if source.labels is None else source.labels[positions],
        pixels=pixels,
    )


def full(split: StoredSplit) -> DataSource:
    """Selects all usable examples of a split."""
    return subset(split, split.usable, split.name)


def exclude_records(name: str, storage: str, size: int, exclude: Collection[str]) -> dict[str, Any]:
    """Leaves out records, which are named after their split and their number.

    Args:
        name: Name of the split.
        storage: Storage of the whole split.
        size: Number of records.
        exclude: Names of the records to leave out, as from `record_name`.

    Returns:
        The fields `usable`, `excluded` and `storage` of a `StoredSplit`.
    """
    excluded = []
    if exclude:
        excluded = [index for index in range(size) if record_name(name, index) in exclude]
    if excluded:
        digest = hashlib.sha256(repr(excluded).encode()).hexdigest()[:16]
        storage += f", without {len(excluded)} ({digest})"
    return {
        "usable": np.delete(np.arange(size), excluded),
        "excluded": len(excluded),
        "storage": storage,
    }


def record_name(name: str, index: int) -> str:
    """Name of a record in a split that has no file names."""
    return f"{name} record {index}"


def map_with_fallback(
    examples: tf.data.Dataset,
    function: Callable[[Any], Any],
    fallback: Callable[[Any], Any],
    num_parallel: int,
) -> tf.data.Dataset:
    """Maps a function over examples, and another one over those for which it fails.

    Args:
        examples: The examples.
        function: Function of an example, which may raise an error of TensorFlow.
        fallback: Function of an example with a result of the same type.
        num_parallel: Number of examples that are mapped at the same time.

    Returns:
        The results, in the order of the examples.
    """

    def map_one(*example: Any) -> tf.data.Dataset:
        single = tf.data.Dataset.from_tensors(example[0] if len(example) == 1 else example)
        results = single.map(function).ignore_errors(log_warning=False)
        return results.concatenate(single.map(fallback)).take(1)

    return examples.interleave(
        map_one,
        cycle_length=num_parallel,
        block_length=1,
        num_parallel_calls=num_parallel,
        deterministic=True,
    )


def epoch_seeds(seed: int, epoch: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Derives the seeds of an epoch.

    Args:
        seed: Seed of the run.
        epoch: Number of the epoch, int64.

    Returns:
        Seeds of the order and of the augmentation, both int64 (2,).
    """
    order, draws = (
        tf.random.experimental.stateless_fold_in(tf.constant([seed, stream], tf.int64), epoch)
        for stream in (0, 1)
    )
    return order, draws


def permute_indices(
    positions: tf.Tensor, seed: tf.Tensor, size: int, rounds: int = 16
) -> tf.Tensor:
    """Permutes 0 … size - 1 by a cipher, without an array of that size.

    `tf.random.experimental.index_shuffle` is the same operation with 4 rounds, and its key is the
    seed. Its orders repeat and correlate. With 16 rounds and a key that is drawn from the seed, the
    orders are as good as numpy's (docs/performance.md#orders-of-an-epoch).

    Args:
        positions: Positions in the permuted sequence, int64 (n,).
        seed: Seed of the permutation, int64 (2,).
        size: Length of the sequence.
        rounds: Rounds of the cipher.

    Returns:
        Elements at these positions, int64 (n,).
    """
    key = tf.random.stateless_uniform((3,), seed, minval=None, maxval=None, dtype=tf.int32)
    return tf.raw_ops.RandomIndexShuffle(
        index=positions,
        seed=tf.bitcast(key, tf.uint32),
        max_index=tf.constant(size - 1, tf.int64),
        rounds=rounds,
    )


def random_access(
    indices: np.ndarray, read: Callable[[tf.data.Dataset], tf.data.Dataset]
) -> ExampleReader:
    """Makes a reader for storage that finds an example by its index.

    Any start costs the same, and no permutation is held in memory.

    Args:
        indices: Indices of the examples to read, int64 (n,), sorted.
        read: Maps a dataset of vectors of at most `INDICES_PER_CALL` indices to a dataset of
            examples, one by one.

    Returns:
        The reader.
    """
    size = len(indices)
    lookup = tf.constant(indices, tf.int64)

    def examples(
        seed: tf.Tensor | None, start: tf.Tensor | int = 0, shard: HostShard | None = None
    ) -> tf.data.Dataset:
        def to_indices(positions: tf.Tensor) -> tf.Tensor:
            if seed is not None:
                positions = permute_indices(positions, seed, size)
            return tf.gather(lookup, positions)

        if shard is None:
            positions = tf.data.Dataset.range(start, size)
        else:
            batches = tf.data.Dataset.range(start, size, shard.batch_size)
            positions = batches.flat_map(
                lambda first: tf.data.Dataset.from_tensor_slices(first + shard.rows)
            ).filter(lambda position: position < size)
        return read(positions.batch(INDICES_PER_CALL).map(to_indices))

    return examples


def sequential(
    indices: np.ndarray,
    size: int,
    scan: Callable[[tf.Tensor | None], tf.data.Dataset],
    parse: Callable[[dict], dict],
    shuffle_buffer: int,
) -> ExampleReader:
    """Makes a reader for storage that is read from its beginning.

    Records before the start, and records of other shards, are read but not parsed.

    Args:
        indices: Indices of the examples to read, int64 (n,), sorted.
        size: Number of all records.
        scan: Reads all records {"index", "record"}, and takes the files in a seeded order.
        parse: Makes an example of a record.
        shuffle_buffer: Records that are shuffled together, after the files are.

    Returns:
        The reader.
    """
    is_selected = tf.constant(np.isin(np.arange(size), indices))

    def examples(
        seed: tf.Tensor | None, start: tf.Tensor | int = 0, shard: HostShard | None = None
    ) -> tf.data.Dataset:
        records = scan(seed)
        if len(indices) < size:
            records = records.filter(lambda record: is_selected[record["index"]])
        if seed is not None:
            # The second number of a folded seed is the epoch itself, so draw one from both.
            number = tf.random.stateless_uniform((), seed, minval=None, maxval=None, dtype=tf.int64)
            records = records.shuffle(shuffle_buffer, seed=number, reshuffle_each_iteration=False)
        records = records.skip(start)
        if shard is not None:
            batch_size = shard.batch_size
            in_shard = tf.constant(np.isin(np.arange(batch_size), shard.rows))
            numbered = records.enumerate().filter(lambda number, _: in_shard[number % batch_size])
            records = numbered.map(lambda _, record: record)
        return records.map(parse, num_parallel_calls=CORES, deterministic=True)

    return examples
