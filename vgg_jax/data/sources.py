"""Sources of examples: scikit-learn's digits, an image folder, or TensorFlow Datasets."""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Collection, Iterable

import numpy as np
import tensorflow as tf

from vgg_jax.configs.presets import PRESETS
from vgg_jax.data.batches import BatchIterator
from vgg_jax.data.filesystem import exists, is_dir
from vgg_jax.data.folder import folder_splits
from vgg_jax.data.label_file import SUFFIXES as LIST_SUFFIXES
from vgg_jax.data.list_file import list_splits, listed_names
from vgg_jax.data.splits import (
    MAX_BYTES_IN_MEMORY,
    DataSource,
    StoredSplit,
    exclude_records,
    full,
    random_access,
    record_name,
    subset,
)
from vgg_jax.data.tfds import is_prepared, record_splits
from vgg_jax.division import (
    INPUT_VERSION,
    SPLIT_NAMES,
    Division,
    divide_at_random,
    divide_by_class,
    split_kind,
)
from vgg_jax.errors import InputError, install_hint
from vgg_jax.paths import is_remote

logger = logging.getLogger(__name__)

LABELS_PER_BATCH = 1024
VALIDATION = SPLIT_NAMES["validation"]


def open_train_val(
    data: str,
    *,
    data_dir: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    skip_bad: bool = False,
    exclude: Collection[str] = (),
    download: bool = False,
    version: int = INPUT_VERSION,
) -> tuple[DataSource, DataSource]:
    """Opens the training and the validation split of a data set, but never a test split.

    Without a validation split, a part of the training split is held out: the same fraction of each
    class, if its labels are known or are read soon.

    Args:
        data: "digits", an image folder, a list of files, or a name of TensorFlow Datasets.
        data_dir: Folder of the prepared data sets of TensorFlow Datasets.
        validation_fraction: Fraction of the training split to hold out, if there is no validation
            split. At least one image is held out, unless it is 0.
        seed: Seed of the choice of images to hold out.
        skip_bad: Leave out files that are not images. Otherwise they are an error.
        exclude: Names of images to leave out, as from `read_exclude_list`.
        download: Download a data set that is not prepared.
        version: Version of the choice of images, and of the orders of epochs.

    Returns:
        The training and the validation source.

    Raises:
        InputError: The data is missing or cannot be used.
    """
    exclude = frozenset(exclude)
    splits = _find_splits(data, data_dir, skip_bad, exclude, download, version)
    train = _pick(splits, "train", data)()
    if len(train.classes) < 2:
        raise InputError(
            f"{train.name} has only one class, {train.classes[0]!r}: expected at least two; pass "
            "the folder whose folders are the classes"
        )
    if "validation" in map(split_kind, splits):
        validation = _pick(splits, "validation", data)()
        _check_exclude_list(exclude, train.excluded + validation.excluded, data, splits)
        return full(train), full(validation)
    _check_exclude_list(exclude, train.excluded, data, splits)
    division = _divide(train, validation_fraction, seed, version)
    kept, held_out = train.usable[division.train], train.usable[division.held_out]
    # The skipped files are counted with the training source.
    held_out_source = subset(train, held_out, f"{train.name} (held out)")
    return subset(train, kept, train.name), dataclasses.replace(held_out_source, skipped=())


def _divide(split: StoredSplit, fraction: float, seed: int, version: int) -> Division:
    """Divides the usable images of a split."""
    size = len(split.usable)
    if version == 1 or (split.labels is None and split.num_bytes > MAX_BYTES_IN_MEMORY):
        if version > 1 and fraction:
            logger.info(
                f"{split.name}: the validation images are drawn without regard to their classes, "
                f"since reading all labels would take a pass over {split.num_bytes / 1e9:.0f} GB"
            )
        return divide_at_random(size, fraction, seed)
    return divide_by_class(split.name, split.classes, read_labels(full(split)), fraction, seed)


def read_labels(source: DataSource) -> np.ndarray:
    """Returns the classes of all images of a source. Reads the source unless it knows them.

    Args:
        source: The images.

    Returns:
        int32 (n,), in the order of the source.

    Raises:
        DataError: A file of records is damaged.
    """
    if source.labels is not None:
        return source.labels
    batches = BatchIterator(
        source,
        lambda number: source.examples(None, number * LABELS_PER_BATCH),
        lambda example: {"index": example["index"], "label": example["label"]},
        LABELS_PER_BATCH,
    )
    return np.concatenate([batch["label"] for batch in batches])


def open_split(
    data: str,
    split: str,
    *,
    data_dir: str | None = None,
    skip_bad: bool = False,
    exclude: Collection[str] = (),
    download: bool = False,
    labelled: bool = True,
) -> DataSource:
    """Opens a whole split of a data set.

    Args:
        data: "digits", an image folder, a list of files, or a name of TensorFlow Datasets.
        split: A name of the training, validation or test split, as `split_kind` knows them, or
            another split that TensorFlow Datasets has.
        data_dir: Folder of the prepared data sets of TensorFlow Datasets.
        skip_bad: Leave out files that are not images. Otherwise they are an error.
        exclude: Names of images to leave out, as from `read_exclude_list`.
        download: Download a data set that is not prepared.
        labelled: Read the labels of files. Otherwise the files need none, and the labels of the
            source mean nothing.

    Returns:
        The source.

    Raises:
        InputError: The data or the split is missing or cannot be used.
    """
    splits = _find_splits(data, data_dir, skip_bad, frozenset(exclude), download, labelled=labelled)
    return full(_pick(splits, split, data)())


def split_names(
    data: str, *, data_dir: str | None = None, download: bool = False
) -> tuple[str, ...]:
    """Lists the splits that `open_split` can open.

    Args:
        data: "digits", an image folder, a list of files, or a name of TensorFlow Datasets.
        data_dir: Folder of the prepared data sets of TensorFlow Datasets.
        download: Download a data set that is not prepared.

    Returns:
        The names.

    Raises:
        InputError: The data is missing.
    """
    return tuple(_find_splits(data, data_dir, True, (), download))


def _find_splits(
    data: str,
    data_dir: str | None,
    skip_bad: bool,
    exclude: Collection[str],
    download: bool,
    version: int = INPUT_VERSION,
    labelled: bool = True,
) -> dict[str, Callable[[], StoredSplit]]:
    folder = data if is_remote(data) else os.path.expanduser(data)
    is_path = is_remote(data) or folder.startswith((".", os.sep)) or folder.endswith(os.sep)
    if _is_list(folder):
        return list_splits(folder, skip_bad, exclude, labelled)
    if not is_path and os.path.isdir(folder):
        is_path = _names_folder(data, data_dir)
    if data == "digits":
        return {"train": functools.partial(_digits, exclude)}
    # One separator inside a name does not make it a path: "imagenette/320px" may be a data set.
    if is_path or folder.count(os.sep) > 1:
        return folder_splits(folder, skip_bad, exclude, labelled)
    return record_splits(data, data_dir, exclude, download, version)


def _is_list(path: str) -> bool:
    return path.lower().endswith(LIST_SUFFIXES) and exists(path) and not is_dir(path)


def _names_folder(data: str, data_dir: str | None) -> bool:
    """Tells whether the name of an existing folder means that folder.

    Raises:
        InputError: It also means a data set.
    """
    names_data_set = data in PRESETS or is_prepared(data, data_dir)
    if not names_data_set:
        return True
    if is_prepared(data, ".") and is_prepared(data, data_dir):
        return False  # the folder is the prepared data set
    raise InputError(
        f"{data!r} is a data set and also a folder here: expected one reading; pass ./{data} for "
        "the folder, or start in another folder for the data set"
    )


def _pick(
    splits: dict[str, Callable[[], StoredSplit]], split: str, data: str
) -> Callable[[], StoredSplit]:
    """Picks a split by its name, or by another name of the same split."""
    if split in splits:
        return splits[split]
    for name, open_stored in splits.items():
        if split_kind(name) is not None and split_kind(name) == split_kind(split):
            return open_stored
    raise InputError(f"{data!r} has no split {split!r}: expected one of {', '.join(splits)}")


def _check_exclude_list(
    exclude: Collection[str], num_excluded: int, data: str, splits: Iterable[str]
) -> None:
    """Raises InputError for a list of images that are in no split of this data."""
    if num_excluded or not exclude:
        return
    path = data if is_remote(data) else os.path.expanduser(data)
    if _is_list(path):
        is_known = not listed_names(path).isdisjoint(exclude)
    else:
        folders = tuple(f"{split}/" for split in splits)
        records = tuple(f"{data} {split} record " for split in splits)
        is_known = any(name.startswith(folders + records) for name in exclude)
    if not is_known:
        raise InputError(
            f"none of the {len(exclude)} images to exclude, for example {min(exclude)!r}, is in "
            f"{data}: expected a list that `vgg-jax verify-data {data}` wrote; "
            "pass that to --exclude"
        )


def _digits(exclude: Collection[str]) -> StoredSplit:
    """The 1,797 handwritten digits of the UCI test set, as grey 8x8 PNG files in memory."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            f"the data 'digits' needs scikit-learn ({error}): {install_hint('train')}"
        ) from error
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]  # values are 0-16
    encoded = tf.stack([tf.io.encode_png(image) for image in pixels])
    labels = tf.constant(digits.target, tf.int32)

    def read_batch(indices: tf.Tensor) -> dict[str, tf.Tensor]:
        return {
            "index": indices,
            "encoded": tf.gather(encoded, indices),
            "label": tf.gather(labels, indices),
        }

    def read(indices: tf.data.Dataset) -> tf.data.Dataset:
        return indices.map(read_batch).unbatch()

    return StoredSplit(
        name="digits train",
        classes=tuple(map(str, digits.target_names)),
        select=functools.partial(random_access, read=read),
        file_name=functools.partial(record_name, "digits train"),
        **exclude_records("digits train", "digits", len(labels), exclude),
    )
