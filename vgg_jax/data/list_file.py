"""A data set as a list: a label file whose lines name files, labels and perhaps splits."""

import functools
import itertools
import logging
import os
import unicodedata
from collections.abc import Callable, Collection, Sequence

import numpy as np

from vgg_jax.data.file_split import (
    LabelledFiles,
    check_images,
    exclude_files,
    relative_name,
    split_images,
    storage_with_labels,
    stored_split,
)
from vgg_jax.data.filesystem import exists
from vgg_jax.data.label_file import Row, read_rows, sort_labels
from vgg_jax.data.splits import StoredSplit
from vgg_jax.division import SPLIT_NAMES, split_kind
from vgg_jax.errors import DataError, InputError, shorten_names
from vgg_jax.paths import is_remote

logger = logging.getLogger(__name__)


def list_splits(
    path: str, skip_bad: bool, exclude: Collection[str], labelled: bool = True
) -> dict[str, Callable[[], StoredSplit]]:
    """Finds the splits of a list.

    Args:
        path: Path of the list, as for `read_rows`. Names of files are relative to its folder, or
            absolute. Without a column for splits, all files are for training.
        skip_bad: As for `folder_splits`.
        exclude: Images to leave out, as paths relative to the folder of the list.
        labelled: Read the labels. Otherwise all images have the same one.

    Returns:
        For each split, a function that reads it, as `folder_splits` returns it. The classes are the
        labels of the training split, sorted: as numbers if all are numbers.

    Raises:
        InputError: The list cannot be read, or a file has two labels.
    """
    by_split: dict[str, list[Row]] = {}
    for row in read_rows(path):
        kind = split_kind(row.split) if row.split else "train"
        if kind is None:
            raise InputError(
                f"line {row.number} of {path} has the split {row.split!r}: "
                f"expected {', '.join(SPLIT_NAMES)}"
            )
        by_split.setdefault(kind, []).append(row if labelled else row._replace(label=""))
    _warn_of_repeated_files(path, by_split)
    reference = by_split.get("train") or next(iter(by_split.values()))
    classes = sort_labels([row.label for row in reference])
    return {
        kind: functools.partial(
            _read_split, path, kind, rows, classes, skip_bad, frozenset(exclude)
        )
        for kind, rows in by_split.items()
    }


def listed_names(path: str) -> set[str]:
    """Names all images of a list as lists of images to exclude do.

    Args:
        path: Path of the list.

    Returns:
        Paths relative to the folder of the list.
    """
    root = os.path.dirname(path) or "."
    return {relative_name(_resolve(root, row.file), root) for row in read_rows(path)}


def _warn_of_repeated_files(path: str, by_split: dict[str, list[Row]]) -> None:
    """Warns of files that a split has twice, and of files that two splits have."""
    files = {kind: [row.file for row in rows] for kind, rows in by_split.items()}
    for kind, names in files.items():
        if len(set(names)) < len(names):
            count = len(names) - len(set(names))
            logger.warning(
                "%d lines of %s repeat a file of the %s split: expected each file once; it now "
                "counts as often as it is listed",
                count,
                path,
                kind,
            )
    for kind, other in itertools.combinations(files, 2):
        shared = sorted(set(files[kind]) & set(files[other]))
        if shared:
            logger.warning(
                "%d files of %s are in two splits, %s and %s, for example %r: expected each in "
                "one; results on seen photos are too good",
                len(shared),
                path,
                kind,
                other,
                shared[0],
            )


def _read_split(
    path: str,
    kind: str,
    rows: Sequence[Row],
    classes: tuple[str, ...],
    skip_bad: bool,
    exclude: Collection[str],
) -> StoredSplit:
    root = os.path.dirname(path) or "."
    index = {name: label for label, name in enumerate(classes)}
    by_file: dict[str, str] = {}
    for row in rows:
        if is_remote(row.file) and not row.file.startswith("gs://"):
            raise InputError(
                f"line {row.number} of {path} names {row.file!r}: expected a file; download it"
            )
        if row.label not in index:
            raise InputError(
                f"line {row.number} of {path} has the label {row.label!r}, which no training image "
                f"has: expected one of {shorten_names(classes)}"
            )
        if by_file.setdefault(row.file, row.label) != row.label:
            raise InputError(
                f"line {row.number} of {path} gives {row.file!r} a second label, {row.label!r} "
                f"after {by_file[row.file]!r}: expected one"
            )
    paths = [os.fsencode(_resolve(root, row.file)) for row in rows]
    labels = np.array([index[row.label] for row in rows], np.int32)
    name = f"{path} {kind}"
    files = exclude_files(LabelledFiles(paths, labels), root, exclude)
    images, others = split_images(files, name)
    if others.paths:
        _check_exist(path, rows, root, skip_bad and bool(images.paths))
    check_images(others.paths, len(files.paths), path, skip_bad)
    if not images.paths:
        raise InputError(f"{name} has no images: expected at least one")
    return stored_split(
        name,
        storage_with_labels("list", images.labels),
        root,
        images,
        classes,
        skip_bad,
        others.paths,
        len(paths) - len(files.paths),
    )


def _check_exist(path: str, rows: Sequence[Row], root: str, skip_bad: bool) -> None:
    """Checks that all files exist; with `skip_bad`, only the file of the first line."""
    missing = [row for row in rows if not exists(_resolve(root, row.file))]
    if not missing or (skip_bad and missing[0].number > 1):
        return
    first = missing[0]
    hint = "pass --skip-bad to leave them out"
    if len(missing) == len(rows):
        hint = "move the list to the folder that its paths start from"
    elif first.number == 1:
        hint = "a first line with names of columns has `file,label`"
    raise DataError(
        f"{len(missing)} of the {len(rows)} files that {path} names do not exist, for example "
        f"{first.file!r} in line {first.number}: expected paths from {root!r}, or absolute ones; "
        f"{hint}"
    )


def _resolve(root: str, file: str) -> str:
    """Completes the name of a file.

    Lists from Windows have backslashes. Lists and folders from macOS may differ in Unicode form.
    """
    if is_remote(file):
        return file
    path = os.path.join(root, os.path.expanduser(file))
    if is_remote(root) or ("\\" not in file and file.isascii()) or os.path.exists(path):
        return path
    slashed = file.replace("\\", "/")
    forms = [slashed, *(unicodedata.normalize(form, slashed) for form in ("NFC", "NFD"))]
    paths = [os.path.join(root, form) for form in forms]
    return next(filter(os.path.exists, paths), paths[0])
