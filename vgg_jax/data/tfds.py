"""Data sets that TensorFlow Datasets has prepared as TFRecord or ArrayRecord files."""

import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import tensorflow as tf

from vgg_jax.data.filesystem import exists, is_dir, listdir
from vgg_jax.data.splits import (
    CORES,
    MAX_BYTES_IN_MEMORY,
    ExampleReader,
    HostShard,
    StoredSplit,
    exclude_records,
    permute_indices,
    random_access,
    record_name,
    sequential,
)
from vgg_jax.division import BY_A_BUFFER, INPUT_VERSION
from vgg_jax.errors import InputError, install_hint, single_line
from vgg_jax.paths import is_remote

NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
VERSION = re.compile(r"\d+\.\d+\.\d+")
# TFRecord files that are interleaved, so that the records of one file do not come together.
CYCLE_LENGTH = 16
# Files of a large split that are few enough to begin at a random record of each. More files are in
# another order each epoch, which is enough (docs/performance.md#orders-of-an-epoch).
FEW_FILES = 64
SHUFFLE_BUFFER_OF_VERSION_1 = 8192  # records
RECORDS_PER_READ = 1024


def record_splits(
    data: str,
    data_dir: str | None,
    exclude: Collection[str],
    download: bool,
    version: int = INPUT_VERSION,
) -> dict[str, Callable[[], StoredSplit]]:
    """Finds the splits of a data set of TensorFlow Datasets.

    Args:
        data: A name: "cifar10", "cifar10:3.0.2", "imagenette/320px".
        data_dir: Folder of the prepared data sets.
        exclude: Names of records to leave out.
        download: Download and prepare the data set if it is not prepared.
        version: Version of the orders of epochs.

    Returns:
        For each split, a function that opens it. It raises InputError if files are missing.

    Raises:
        InputError: The data set is not prepared under `data_dir`, cannot be downloaded, or does
            not have exactly one image and one label.
    """
    tfds = _import_tfds()
    root = _prepared_root(data_dir)
    folder = find_prepared(data, root)
    if folder is None and download:
        folder = _download(tfds, data, root)
    if folder is None:
        content = "no such folder"
        if is_dir(root):
            content = ", ".join(sorted(listdir(root))[:10]) or "nothing"
        raise InputError(
            f"no folder {data!r} and no prepared data set {data!r} under {root!r} "
            f"(found there: {content}): expected the path of a folder, of which a run's may have "
            "moved; for a data set pass --download, or --data-dir with the folder that has it"
        )
    info = _load_info(tfds, folder)
    image, label = _image_and_label(tfds, info, data)
    return {
        name: functools.partial(
            _open_split, tfds, info, f"{data} {name}", name, image, label, exclude, version
        )
        for name in info.splits
    }


def is_prepared(data: str, data_dir: str | None) -> bool:
    """Tells whether a prepared data set has this name.

    Args:
        data: Any text.
        data_dir: Folder of the prepared data sets, as for `record_splits`.

    Returns:
        True if `record_splits` would find it.
    """
    if NAME.fullmatch(data) is None:
        return False
    with contextlib.suppress(InputError):
        return find_prepared(data, _prepared_root(data_dir)) is not None
    return True  # it is there, and the message of the error helps


def _prepared_root(data_dir: str | None) -> str:
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    return root if is_remote(root) else os.path.expanduser(root)


def find_prepared(data: str, root: str) -> str | None:
    """Finds the folder of a prepared data set.

    It looks at folders only, since `tfds.builder` may use the network.

    Args:
        data: Name of the data set, as for `record_splits`.
        root: Folder of the prepared data sets.

    Returns:
        The folder of the newest version, or None.

    Raises:
        InputError: The name is invalid, or several configurations are prepared.
    """
    match = NAME.fullmatch(data)
    if match is None:
        raise InputError(
            f"data is {data!r}: expected 'digits', an image folder, or a TensorFlow Datasets name "
            "such as cifar10, cifar10:3.0.2 or imagenette/320px"
        )
    folder = os.path.join(root, match["name"], match["config"] or "")
    versions = _prepared_versions(folder)
    if not versions and not match["config"] and is_dir(folder):
        configs = [
            name
            for name in sorted(listdir(folder))
            if _prepared_versions(os.path.join(folder, name))
        ]
        if len(configs) > 1:
            raise InputError(
                f"{data!r} is prepared in several configurations under {root!r} "
                f"({', '.join(configs)}): pick one, as in {match['name']}/{configs[0]}"
            )
        if configs:
            folder = os.path.join(folder, configs[0])
            versions = _prepared_versions(folder)
    if match["version"]:
        versions = [version for version in versions if version == match["version"]]
    return os.path.join(folder, versions[-1]) if versions else None


def _import_tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise InputError(
            f"reading a TensorFlow Datasets name needs tensorflow-datasets ({error}): "
            f"{install_hint('train')}"
        ) from error
    return tensorflow_datasets


def _prepared_versions(folder: str) -> list[str]:
    """Lists the versions that are prepared in a folder, oldest first."""
    if not is_dir(folder):
        return []
    versions = [
        name
        for name in listdir(folder)
        if VERSION.fullmatch(name) and exists(os.path.join(folder, name, "dataset_info.json"))
    ]
    return sorted(versions, key=lambda version: tuple(map(int, version.split("."))))


def _download(tfds: Any, data: str, root: str) -> str:
    try:
        builder = tfds.builder(data, data_dir=root)
        builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(
            f"data is {data!r}: TensorFlow Datasets knows no such name; "
            "expected one of https://www.tensorflow.org/datasets/catalog"
        ) from error
    # Each has its own class: an unknown configuration, no network, a wrong checksum, a missing
    # parser, files that must be downloaded by hand.
    except Exception as error:
        raise InputError(
            f"{data!r} cannot be downloaded to {root!r} ({single_line(error, 300)}): "
            "check the network and the name, or pass --data-dir with prepared data"
        ) from error
    return os.fspath(builder.data_dir)


def _load_info(tfds: Any, folder: str) -> Any:
    try:
        return tfds.builder_from_directory(folder).info
    # TFDS raises any of these for a truncated or foreign dataset_info.json. Its parser raises
    # ValueErrors.
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, OSError) as error:
        raise InputError(
            f"{folder!r} cannot be read as a prepared data set ({single_line(error)}): "
            "prepare it again"
        ) from error


def _image_and_label(tfds: Any, info: Any, data: str) -> tuple[str, str]:
    """Finds the keys of the image and of the label.

    These are the supervised keys of the data set, or else its only image and its only label.
    """
    features = dict(info.features)
    images = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
    labels = [key for key, value in features.items() if isinstance(value, tfds.features.ClassLabel)]
    keys: tuple[str, ...] = info.supervised_keys or ()
    if len(keys) == 2 and keys[0] in images and keys[1] in labels:
        return keys[0], keys[1]
    if len(images) != 1 or len(labels) != 1:
        raise InputError(
            f"{data!r} has the features {', '.join(features)}: "
            "expected one image and one class label; pick a classification data set"
        )
    return images[0], labels[0]


def _open_split(
    tfds: Any,
    info: Any,
    name: str,
    split: str,
    image: str,
    label: str,
    exclude: Collection[str],
    version: int,
) -> StoredSplit:
    features = tfds.features.FeaturesDict({key: info.features[key] for key in (image, label)})
    files = info.splits[split]
    if missing := [os.fspath(path) for path in files.filepaths if not exists(path)]:
        raise InputError(
            f"{len(missing)} of {len(files.filepaths)} files of {name} are missing, the first is "
            f"{missing[0]!r}: prepare the data set again"
        )

    def parse(record: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        example = features.deserialize_example(
            record["record"], decoders={image: tfds.decode.SkipDecoding()}
        )
        return {
            "index": record["index"],
            "encoded": example[image],
            "label": tf.cast(example[label], tf.int32),
        }

    size, file_format = files.num_examples, info.file_format
    num_bytes = files.num_bytes or sum(tf.io.gfile.stat(path).length for path in files.filepaths)
    storage = f"{info.full_name} {file_format.value}"
    if file_format == tfds.core.FileFormat.TFRECORD:
        buffer = _shuffle_buffer(size, num_bytes, version)
        select = _tfrecord_selector(files, buffer, parse, version)
        if version > 1 and buffer < size:
            storage += BY_A_BUFFER
    elif file_format == tfds.core.FileFormat.ARRAY_RECORD:
        read = functools.partial(_read, _open_array_records(files), parse)
        select = functools.partial(random_access, read=read)
    else:
        raise InputError(
            f"{name} is stored as {file_format.value}: "
            "expected tfrecord or array_record; prepare it as one of these"
        )
    return StoredSplit(
        name=name,
        classes=tuple(info.features[label].names),
        select=select,
        file_name=functools.partial(record_name, name),
        num_bytes=num_bytes,
        **exclude_records(name, storage, size, exclude),
    )


def _shuffle_buffer(size: int, num_bytes: int, version: int) -> int:
    """Number of records that are shuffled at a time."""
    if version == 1:
        return SHUFFLE_BUFFER_OF_VERSION_1
    return max(1, MAX_BYTES_IN_MEMORY * size // max(1, num_bytes))


def _tfrecord_selector(
    files: Any, buffer: int, parse: Callable[[dict], dict], version: int
) -> Callable[[np.ndarray], ExampleReader]:
    """Makes `StoredSplit.select` for TFRecord files, which are read from their beginning.

    A split that fits into memory is read once, and then shuffled as storage with random access is.
    A larger one is shuffled by files, and by a buffer.
    """
    size, is_first = files.num_examples, version == 1
    scan = functools.partial(
        _scan, files, rotate=not is_first and len(files.filepaths) <= FEW_FILES
    )
    scan_selected = functools.partial(
        sequential, size=size, scan=scan, parse=parse, shuffle_buffer=buffer
    )
    if is_first or buffer < size:
        return scan_selected
    read = functools.partial(_read, _RecordsInMemory(files), parse)

    def select(indices: np.ndarray) -> ExampleReader:
        in_order, shuffled = scan_selected(indices), random_access(indices, read)

        def examples(
            seed: tf.Tensor | None, start: tf.Tensor | int = 0, shard: HostShard | None = None
        ) -> tf.data.Dataset:
            return (in_order if seed is None else shuffled)(seed, start, shard)

        return examples

    return select


class _RecordsInMemory:
    """All records of a split's TFRecord files, which are read at the first access."""

    def __init__(self, files: Any) -> None:
        self._paths, self._size = [os.fspath(path) for path in files.filepaths], files.num_examples
        self._records: list[bytes] = []
        self._lock = threading.Lock()

    def __getitems__(self, indices: list[int]) -> list[bytes]:
        with self._lock:
            if not self._records:
                self._records = self._read_all()
        return [self._records[index] for index in indices]

    def _read_all(self) -> list[bytes]:
        batches = tf.data.TFRecordDataset(self._paths).batch(RECORDS_PER_READ)
        records = [record for batch in batches.as_numpy_iterator() for record in batch]
        if len(records) != self._size:
            raise ValueError(
                f"its files hold {len(records)} records instead of {self._size}: prepare it again"
            )
        return records


def _scan(files: Any, seed: tf.Tensor | None, rotate: bool) -> tf.data.Dataset:
    """Reads {"index", "record"} of all TFRecord files of a split.

    Without a seed, one file follows the other. With a seed, the files are shuffled and
    interleaved. With `rotate`, each begins at a random record, and its first records follow its
    last one.
    """
    paths = tf.constant([os.fspath(path) for path in files.filepaths])
    lengths = tf.constant(files.shard_lengths, tf.int64)
    first = tf.constant(np.cumsum([0, *files.shard_lengths])[:-1], tf.int64)

    def read_file(file: tf.Tensor) -> tf.data.Dataset:
        if seed is not None:
            file = permute_indices(file, seed, len(files.filepaths))
        records = tf.data.TFRecordDataset(paths[file]).enumerate(first[file])
        if seed is None or not rotate:
            return records
        file_seed = tf.random.experimental.stateless_fold_in(seed, file)
        start = tf.random.stateless_uniform(
            (), file_seed, minval=0, maxval=tf.maximum(lengths[file], 1), dtype=tf.int64
        )
        return records.skip(start).concatenate(records.take(start))

    cycle_length = 1 if seed is None else min(CYCLE_LENGTH, len(files.filepaths))
    records = tf.data.Dataset.range(len(files.filepaths)).interleave(
        read_file, cycle_length, num_parallel_calls=min(cycle_length, CORES), deterministic=True
    )
    return records.map(lambda index, record: {"index": index, "record": record})


def _open_array_records(files: Any) -> Any:
    """Opens all ArrayRecord files of a split as one sequence of raw records."""
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
    except ImportError as error:
        raise InputError(
            f"reading ArrayRecord files needs array_record ({error}): {install_hint('train')}"
        ) from error
    return ArrayRecordDataSource([os.fspath(path) for path in files.filepaths])


def _read(stored: Any, parse: Callable[[dict], dict], indices: tf.data.Dataset) -> tf.data.Dataset:
    """Reads the records at batches of indices, and gives their examples one by one."""

    def fetch(batch: np.ndarray) -> np.ndarray:
        # As objects, since NumPy's byte strings lose the zeros at their end.
        return np.array(stored.__getitems__(batch.tolist()), object)

    def to_records(batch: tf.Tensor) -> dict[str, tf.Tensor]:
        records = tf.numpy_function(fetch, [batch], tf.string)
        return {"index": batch, "record": tf.ensure_shape(records, batch.shape)}

    batches = indices.map(to_records, num_parallel_calls=CORES, deterministic=True)
    return batches.unbatch().map(parse, num_parallel_calls=CORES, deterministic=True)
