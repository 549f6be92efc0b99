"""A data set that TensorFlow Datasets has prepared, as TFRecord or as ArrayRecord files."""

import functools
import os
import re
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import tensorflow as tf

from vgg_jax.data.filesystem import exists, is_dir, listdir
from vgg_jax.data.splits import (
    CORES,
    StoredSplit,
    exclude_records,
    permute_indices,
    random_access,
    record_name,
    sequential,
)
from vgg_jax.errors import InputError
from vgg_jax.paths import is_remote

NAME = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")
VERSION = re.compile(r"\d+\.\d+\.\d+")
FILES_AT_ONCE = (
    16  # TFRecord files read in turns, so that what lies in one file does not come in one piece
)


def record_splits(
    data: str, data_dir: str | None, exclude: Collection[str], download: bool
) -> dict[str, Callable[[], StoredSplit]]:
    """The splits of a TensorFlow Datasets name: "cifar10", "cifar10:3.0.2", "imagenette/320px". Nothing is fetched unless `download`.

    Raises InputError if the name is not prepared under `data_dir`, cannot be downloaded, or has no single image and label.
    """
    tfds = _tfds()
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    root = root if is_remote(root) else os.path.expanduser(root)
    folder = _prepared(data, root)
    if folder is None and download:
        folder = _download(tfds, data, root)
    if folder is None:
        found = (
            ", ".join(sorted(listdir(root))[:10]) or "nothing" if is_dir(root) else "no such folder"
        )
        raise InputError(
            f"no folder {data!r} and no prepared data set {data!r} under {root!r} (found there: {found}): "
            "pass --download, or --data-dir with the folder that has it"
        )
    info = _info(tfds, folder)
    image, label = _image_and_label(tfds, info, data)
    return {
        name: functools.partial(_records, tfds, info, f"{data} {name}", name, image, label, exclude)
        for name in info.splits
    }


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise InputError(
            f"reading a TensorFlow Datasets name needs tensorflow-datasets ({error}): pip install 'vgg-jax[train]'"
        ) from error
    return tensorflow_datasets


def _prepared(data: str, root: str) -> str | None:
    """The newest version's folder for a name, or None. Looks at folders only: `tfds.builder` may ask the network."""
    match = NAME.fullmatch(data)
    if match is None:
        raise InputError(
            f"data is {data!r}: expected 'digits', an image folder, or a TensorFlow Datasets name "
            "such as cifar10, cifar10:3.0.2 or imagenette/320px"
        )
    folder = os.path.join(root, match["name"], match["config"] or "")
    versions = _versions(folder)
    if not versions and not match["config"] and is_dir(folder):
        configs = [
            each for each in sorted(listdir(folder)) if _versions(os.path.join(folder, each))
        ]
        if len(configs) > 1:
            raise InputError(
                f"{data!r} is prepared in several configurations under {root!r} ({', '.join(configs)}): "
                f"pick one, as in {match['name']}/{configs[0]}"
            )
        if configs:
            folder = os.path.join(folder, configs[0])
            versions = _versions(folder)
    if match["version"]:
        versions = [each for each in versions if each == match["version"]]
    return os.path.join(folder, versions[-1]) if versions else None


def _versions(folder: str) -> list[str]:
    """The versions that are prepared in a folder, oldest first."""
    if not is_dir(folder):
        return []
    found = [
        each
        for each in listdir(folder)
        if VERSION.fullmatch(each) and exists(os.path.join(folder, each, "dataset_info.json"))
    ]
    return sorted(found, key=lambda each: tuple(map(int, each.split("."))))


def _download(tfds: Any, data: str, root: str) -> str:
    try:
        builder = tfds.builder(data, data_dir=root)
        builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:
        raise InputError(
            f"data is {data!r}: TensorFlow Datasets knows no such name; expected one of https://www.tensorflow.org/datasets/catalog"
        ) from error
    # An unknown configuration, no network, a wrong checksum, a missing parser, files to be fetched by hand: each has its own class.
    except Exception as error:
        raise InputError(
            f"{data!r} cannot be downloaded to {root!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    return os.fspath(builder.data_dir)


def _info(tfds: Any, folder: str) -> Any:
    try:
        return tfds.builder_from_directory(folder).info
    # What a cut or foreign dataset_info.json makes of TFDS: its parser's errors are ValueErrors.
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{folder!r} cannot be read as a prepared data set ({reason}): prepare it again"
        ) from error


def _image_and_label(tfds: Any, info: Any, data: str) -> tuple[str, str]:
    """The names of the image and of the label: the data set's own supervised keys, else its only image and its only label."""
    features = dict(info.features)
    images = [key for key, each in features.items() if isinstance(each, tfds.features.Image)]
    labels = [key for key, each in features.items() if isinstance(each, tfds.features.ClassLabel)]
    keys: tuple[str, ...] = info.supervised_keys or ()
    if len(keys) == 2 and keys[0] in images and keys[1] in labels:
        return keys[0], keys[1]
    if len(images) != 1 or len(labels) != 1:
        raise InputError(
            f"{data!r} has the features {', '.join(features)}: expected one image and one class label; pick a classification data set"
        )
    return images[0], labels[0]


def _records(
    tfds: Any, info: Any, name: str, split: str, image: str, label: str, exclude: Collection[str]
) -> StoredSplit:
    features = tfds.features.FeaturesDict({key: info.features[key] for key in (image, label)})
    files = info.splits[split]
    if missing := [os.fspath(path) for path in files.filepaths if not exists(path)]:
        raise InputError(
            f"{len(missing)} of {len(files.filepaths)} files of {name} are missing, the first is {missing[0]!r}: prepare the data set again"
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

    formats = tfds.core.FileFormat
    if info.file_format == formats.TFRECORD:
        order = functools.partial(
            sequential, size=files.num_examples, scan=functools.partial(_scan, files), parse=parse
        )
    elif info.file_format == formats.ARRAY_RECORD:
        order = functools.partial(
            random_access, read=functools.partial(_read, _array_records(files), parse)
        )
    else:
        raise InputError(
            f"{name} is stored as {info.file_format.value}: expected tfrecord or array_record; prepare it as one of these"
        )
    return StoredSplit(
        name=name,
        classes=tuple(info.features[label].names),
        order=order,
        file_name=functools.partial(record_name, name),
        **exclude_records(
            name, f"{info.full_name} {info.file_format.value}", files.num_examples, exclude
        ),
    )


def _scan(files: Any, seed: tf.Tensor | None) -> tf.data.Dataset:
    """{"index", "record"} of all the TFRecord files of a split, file by file if there is no seed."""
    paths = tf.constant([os.fspath(path) for path in files.filepaths])
    first = tf.constant(np.cumsum([0, *files.shard_lengths])[:-1], tf.int64)

    def one(file: tf.Tensor) -> tf.data.Dataset:
        if seed is not None:
            file = permute_indices(file, seed, len(files.filepaths))
        return tf.data.TFRecordDataset(paths[file]).enumerate(first[file])

    turns = 1 if seed is None else min(FILES_AT_ONCE, len(files.filepaths))
    numbered = tf.data.Dataset.range(len(files.filepaths)).interleave(
        one, turns, num_parallel_calls=min(turns, CORES), deterministic=True
    )
    return numbered.map(lambda index, record: {"index": index, "record": record})


def _array_records(files: Any) -> Any:
    """The raw records of all the ArrayRecord files of a split, found by their index."""
    try:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
    except ImportError as error:
        raise InputError(
            f"reading ArrayRecord files needs array_record ({error}): pip install 'vgg-jax[train]'"
        ) from error
    return ArrayRecordDataSource([os.fspath(path) for path in files.filepaths])


def _read(stored: Any, parse: Callable[[dict], dict], indices: tf.data.Dataset) -> tf.data.Dataset:
    def fetch(keys: np.ndarray) -> np.ndarray:
        return np.array(
            stored.__getitems__(keys.tolist()), object
        )  # as "S" numpy would cut the zeros at the end

    def records(keys: tf.Tensor) -> dict[str, tf.Tensor]:
        fetched = tf.numpy_function(fetch, [keys], tf.string)
        return {"index": keys, "record": tf.ensure_shape(fetched, keys.shape)}

    fetched = indices.map(records, num_parallel_calls=CORES, deterministic=True)
    return fetched.unbatch().map(parse, num_parallel_calls=CORES, deterministic=True)
