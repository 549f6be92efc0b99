"""Where examples come from: the digits that scikit-learn brings, a folder of images, or a TensorFlow Datasets name."""

import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Iterable

import numpy as np
import tensorflow as tf

from vgg_jax.data.folder import folder_splits
from vgg_jax.data.splits import (
    DataSource,
    StoredSplit,
    exclude_records,
    full,
    random_access,
    record_name,
    subset,
    train_val_split,
)
from vgg_jax.data.tfds import record_splits
from vgg_jax.errors import InputError
from vgg_jax.paths import is_remote

VALIDATION = ("validation", "val", "valid")  # one split under the names that it goes by


def open_train_val(
    data: str,
    *,
    data_dir: str | None = None,
    validation_fraction: float = 0.1,
    seed: int = 0,
    skip_bad: bool = False,
    exclude: Collection[str] = (),
    download: bool = False,
) -> tuple[DataSource, DataSource]:
    """The training and the validation split of "digits", an image folder or a TensorFlow Datasets name. Never looks at a test split.

    Without a validation split, a seeded `validation_fraction` of the training split takes its place: at least one image, and none
    only if the fraction is 0. Files that are no images are refused, or left out if `skip_bad`, and so are those to `exclude`, which
    `read_list` gives. Raises InputError for data that is not there or not usable.
    """
    exclude = frozenset(exclude)
    splits = _splits(data, data_dir, skip_bad, exclude, download)
    train = _pick(splits, ("train",), data)()
    for name in VALIDATION:
        if name in splits:
            validation = splits[name]()
            _refuse_foreign(exclude, train.excluded + validation.excluded, data, splits)
            return full(train), full(validation)
    _refuse_foreign(exclude, train.excluded, data, splits)
    kept, held_out = (
        train.usable[positions]
        for positions in train_val_split(len(train.usable), validation_fraction, seed)
    )
    if not len(kept):
        raise InputError(
            f"{train.name} has {len(train.usable)} image(s) and validation takes {len(held_out)}: no image is left to train on; "
            "pass a smaller --validation-fraction"
        )
    held = dataclasses.replace(
        subset(train, held_out, f"{train.name} (held out)"), skipped=()
    )  # they are counted with the others
    return subset(train, kept, train.name), held


def open_split(
    data: str,
    split: str,
    *,
    data_dir: str | None = None,
    skip_bad: bool = False,
    exclude: Collection[str] = (),
    download: bool = False,
) -> DataSource:
    """One split, whole: "train", "validation" under any of its names, "test", or what else TensorFlow Datasets has.

    Raises InputError for data that is not there or not usable, and for a split that it does not have.
    """
    names = VALIDATION if split in VALIDATION else (split,)
    return full(
        _pick(_splits(data, data_dir, skip_bad, frozenset(exclude), download), names, data)()
    )


def split_names(
    data: str, *, data_dir: str | None = None, download: bool = False
) -> tuple[str, ...]:
    """The splits that `open_split` knows. Raises InputError for data that is not there."""
    return tuple(_splits(data, data_dir, True, (), download))


def _splits(
    data: str, data_dir: str | None, skip_bad: bool, exclude: Collection[str], download: bool
) -> dict[str, Callable[[], StoredSplit]]:
    if data == "digits":
        return {"train": functools.partial(_digits, exclude)}
    folder = data if is_remote(data) else os.path.expanduser(data)
    # "imagenette/320px" may be a data set, so one separator inside a name does not make it a path.
    if (
        is_remote(data)
        or os.path.isdir(folder)
        or folder.startswith((".", os.sep))
        or folder.count(os.sep) > 1
        or folder.endswith(os.sep)
    ):
        return folder_splits(folder, skip_bad, exclude)
    return record_splits(data, data_dir, exclude, download)


def _pick(
    splits: dict[str, Callable[[], StoredSplit]], names: Iterable[str], data: str
) -> Callable[[], StoredSplit]:
    for name in names:
        if name in splits:
            return splits[name]
    raise InputError(
        f"{data!r} has no split {' or '.join(map(repr, names))}: expected one of {', '.join(splits)}"
    )


def _refuse_foreign(exclude: Collection[str], found: int, data: str, splits: Iterable[str]) -> None:
    """Raises InputError for a list none of whose images is in what was read, or in another split."""
    here = tuple(f"{split}/" for split in splits) + tuple(
        f"{data} {split} record " for split in splits
    )
    if exclude and not found and not any(name.startswith(here) for name in exclude):
        raise InputError(
            f"none of the {len(exclude)} images to exclude, {min(exclude)!r} for one, is in {data}: expected a list that "
            f"`vgg-jax verify-data {data}` wrote; pass that to --exclude"
        )


def _digits(exclude: Collection[str]) -> StoredSplit:
    """The 1,797 handwritten digits of the UCI test set, 8x8 with values 0-16, as greyscale PNG files in memory."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            f"the data 'digits' needs scikit-learn ({error}): pip install 'vgg-jax[train]'"
        ) from error
    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    encoded = tf.stack([tf.io.encode_png(image) for image in pixels])
    labels = tf.constant(bunch.target, tf.int32)

    def read(indices: tf.data.Dataset) -> tf.data.Dataset:
        return indices.map(
            lambda i: {"index": i, "encoded": tf.gather(encoded, i), "label": tf.gather(labels, i)}
        ).unbatch()

    return StoredSplit(
        name="digits train",
        classes=tuple(map(str, bunch.target_names)),
        order=functools.partial(random_access, read=read),
        file_name=functools.partial(record_name, "digits train"),
        **exclude_records("digits train", "digits", len(labels), exclude),
    )
