"""Search for images that cannot be read, and lists of them to exclude."""

import json
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from vgg_jax.data.batches import BatchIterator, error_summary, with_progress
from vgg_jax.data.decode import decode, exif_orientation
from vgg_jax.data.file_split import relative_name
from vgg_jax.data.filesystem import exists, is_dangling_link, is_dir, read_header
from vgg_jax.data.sources import open_split, split_names
from vgg_jax.data.splits import DataSource
from vgg_jax.errors import InputError
from vgg_jax.image_files import FORMATS
from vgg_jax.paths import is_remote, to_path

IMAGES_PER_BATCH = 64


class BadImage(NamedTuple):
    """An image that cannot be used."""

    file: str  # path relative to the data's folder, or "cifar10 train record 17"
    reason: str


def verify_images(
    data: str, *, data_dir: str | None = None, download: bool = False
) -> Iterator[tuple[str, int, list[BadImage]]]:
    """Reads and decodes each image of each split once. The images need no labels.

    Args:
        data: "digits", an image folder, a list of files, or a name of TensorFlow Datasets.
        data_dir: Folder of the prepared data sets of TensorFlow Datasets.
        download: Download a data set that is not prepared.

    Yields:
        For each split its name, the number of its files, and the bad ones.

    Raises:
        InputError: The data is missing or cannot be used.
        DataError: A file of records is damaged.
    """
    data = data if is_remote(data) else os.path.expanduser(data)
    root = os.path.dirname(data) or "." if os.path.isfile(data) else data
    for split in split_names(data, data_dir=data_dir, download=download):
        source = open_split(data, split, data_dir=data_dir, skip_bad=True, labelled=False)
        bad = [BadImage(relative_name(name, root), _why_skipped(name)) for name in source.skipped]
        for index, fault in _decode_each(source):
            if fault:
                bad.append(BadImage(relative_name(source.file_name(index), root), fault.decode()))
        yield split, source.size + len(source.skipped), bad


def write_exclude_list(path: str, bad: list[BadImage]) -> None:
    """Writes a list of images to exclude.

    It has one JSON object per line, since a file name may contain anything but a slash.

    Args:
        path: Path of the list.
        bad: The images.
    """
    to_path(path).write_text("".join(json.dumps(image._asdict()) + "\n" for image in bad))


def check_exclude_list_path(path: str) -> None:
    """Checks that a list of images to exclude can be written, and replaces no other file.

    Args:
        path: Path of the list.

    Raises:
        InputError: The folder is missing, or another file has that name.
    """
    target = to_path(path)
    if not target.parent.exists() or target.is_dir():
        raise InputError(f"cannot write {path}: expected the name of a file in an existing folder")
    if target.exists() and target.stat().st_size:
        try:
            read_exclude_list(path)
        except InputError as error:
            raise InputError(
                f"{path} exists and is not a list of verify-data: expected another name for --out"
            ) from error


def read_exclude_list(path: str) -> tuple[str, ...]:
    """Reads a list of images to exclude.

    Args:
        path: Path of the list.

    Returns:
        The names of the images, sorted.

    Raises:
        InputError: The file cannot be read, or `write_exclude_list` did not write it.
    """
    try:
        with to_path(path).open() as file:
            names = [json.loads(line)["file"] for line in file]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a name is not a string")
    except OSError as error:
        raise InputError(
            f"cannot read {path} ({error.strerror or error}): "
            "expected the list that `vgg-jax verify-data` writes"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): expected the list that `vgg-jax verify-data` writes"
        ) from error
    return tuple(sorted(set(names)))


def _why_skipped(path: str) -> str:
    """Says why a file is no image."""
    if is_dangling_link(path):
        return f"a link to {os.readlink(path)!r}, which does not exist"
    if not exists(path):
        return "no such file"
    if is_dir(path):
        return "a folder"
    if not read_header(os.fsencode(path)):
        return "an empty file, or one that cannot be opened"
    return f"not an image: it does not begin as {FORMATS} does"


def _decode_each(source: DataSource) -> Iterator[tuple[int, bytes]]:
    """Yields the index and the fault of each example; the fault is empty for a good one."""
    batches = BatchIterator(
        source,
        lambda number: source.examples(None, number * IMAGES_PER_BATCH),
        _with_fault,
        IMAGES_PER_BATCH,
    )
    for batch in with_progress(batches, source.name, source.size):
        yield from zip(batch["index"].tolist(), batch["fault"].tolist(), strict=True)


def _with_fault(example: dict) -> dict:
    fault = tf.numpy_function(_find_fault, [example["encoded"]], tf.string)
    return {"index": example["index"], "fault": fault}


def _find_fault(encoded: bytes | np.ndarray) -> bytes:
    """Tries to decode a whole image. Training decodes it all, or a part of it."""
    if not encoded:
        return b"it cannot be read"
    try:
        image = tf.constant(encoded)
        decode(image)
        exif_orientation(image)
    except (tf.errors.OpError, ValueError) as error:
        return error_summary(error).encode()
    return b""
