"""Which images of a data set cannot be read: found in one pass, written as a list, read again to leave them out."""

import functools
import json
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from vgg_jax.data.batches import BatchIterator, error_summary
from vgg_jax.data.decode import decode, exif_orientation
from vgg_jax.data.folder import relative
from vgg_jax.data.sources import open_split, split_names
from vgg_jax.data.splits import DataSource
from vgg_jax.errors import InputError
from vgg_jax.paths import is_remote, to_path

AT_ONCE = 64  # images that are handed over in one piece


class BadImage(NamedTuple):
    """An image that cannot be used. Its name is its path below the data's folder, or "cifar10 train record 17"."""

    file: str
    reason: str


def verify_images(
    data: str, *, data_dir: str | None = None, download: bool = False
) -> Iterator[tuple[str, int, list[BadImage]]]:
    """Reads and decodes each image of each split once: for each split its name, the number of its files, and the bad ones.

    Raises InputError for data that is not there, DataError for files of records that are damaged themselves.
    """
    data = data if is_remote(data) else os.path.expanduser(data)
    for split in split_names(data, data_dir=data_dir, download=download):
        source = open_split(data, split, data_dir=data_dir, skip_bad=True)
        bad = [
            BadImage(relative(name, data), "no image: it cannot be opened, or begins otherwise")
            for name in source.skipped
        ]
        batches = BatchIterator(source, functools.partial(_examples, source), _examined, AT_ONCE)
        with tqdm(total=source.size, desc=source.name, unit="image", disable=None) as bar:
            for batch in batches:
                for index, reason in zip(
                    batch["index"].tolist(), batch["reason"].tolist(), strict=True
                ):
                    if reason:
                        bad.append(
                            BadImage(relative(source.file_name(index), data), reason.decode())
                        )
                bar.update(len(batch["index"]))
        yield split, source.size + len(source.skipped), bad


def _examples(source: DataSource, batch: int) -> tf.data.Dataset:
    return source.examples(None, batch * AT_ONCE)


def _examined(example: dict) -> dict:
    return {
        "index": example["index"],
        "reason": tf.numpy_function(_what_is_wrong, [example["encoded"]], tf.string),
    }


def _what_is_wrong(encoded: bytes | np.ndarray) -> bytes:
    """Nothing where it can be decoded. What training decodes is all or a part of that."""
    if not encoded:
        return b"it cannot be read"
    try:
        image = tf.constant(encoded)
        decode(image)
        exif_orientation(image)
    except (tf.errors.OpError, ValueError) as error:
        return error_summary(error).encode()
    return b""


def write_exclude_list(path: str, bad: list[BadImage]) -> None:
    """One JSON object a line, since a file name may hold anything but a slash."""
    to_path(path).write_text("".join(json.dumps(each._asdict()) + "\n" for each in bad))


def read_exclude_list(path: str) -> tuple[str, ...]:
    """The names in a list, sorted. Raises InputError for a file that `write_exclude_list` did not write."""
    try:
        with to_path(path).open() as file:
            names = [json.loads(line)["file"] for line in file]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a name is no text")
    except OSError as error:
        raise InputError(
            f"cannot read {path} ({error.strerror or error}): expected the list that `vgg-jax verify-data` writes"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): expected the list that `vgg-jax verify-data` writes"
        ) from error
    return tuple(sorted(set(names)))
