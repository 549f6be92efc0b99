"""A split whose examples are image files with labels."""

import functools
import hashlib
import itertools
import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from vgg_jax.data.filesystem import read_header
from vgg_jax.data.splits import CORES, StoredSplit, map_with_fallback, random_access
from vgg_jax.errors import DataError
from vgg_jax.image_files import FORMATS, is_heic, is_image
from vgg_jax.runtime.progress import ProgressBar

FILES_PER_TASK = 256  # handing single files to threads would take longer than to read them
THREADS = 16  # they wait for the disk or the network, not for a core
MAX_FILES_SHOWN = 10  # in an error message


class LabelledFiles(NamedTuple):
    """Files of one split, in the order of the data."""

    paths: list[bytes]  # bytes, because a file name need not be Unicode
    labels: np.ndarray  # int32 (n,)

    def select(self, mask: np.ndarray) -> "LabelledFiles":
        """Selects the files where `mask`, bool (n,), is true."""
        return LabelledFiles(list(itertools.compress(self.paths, mask)), self.labels[mask])


def relative_name(name: str, root: str) -> str:
    """Names an image as in a list of images to exclude.

    Args:
        name: Path of an image, or the name of a record.
        root: Folder of the data.

    Returns:
        The path relative to `root`, so that the data may be moved. Other names stay as they are.
    """
    return os.path.relpath(name, root) if name.startswith(os.path.join(root, "")) else name


def exclude_files(files: LabelledFiles, root: str, exclude: Collection[str]) -> LabelledFiles:
    """Leaves out the files of a list.

    Args:
        files: The files.
        root: Folder of the data.
        exclude: Names of files to leave out, as from `relative_name`.

    Returns:
        The other files.
    """
    if not exclude:
        return files
    names = [relative_name(os.fsdecode(path), root) for path in files.paths]
    return files.select(np.array([name not in exclude for name in names], bool))


def split_images(files: LabelledFiles, name: str) -> tuple[LabelledFiles, LabelledFiles]:
    """Separates images from other files by their first bytes.

    Args:
        files: The files.
        name: Name of the split, for the progress bar.

    Returns:
        The images, and the other files or those that cannot be opened.
    """
    mask = np.zeros(len(files.paths), bool)
    starts = range(0, len(files.paths), FILES_PER_TASK)

    def look_from(start: int) -> list[bool]:
        paths = files.paths[start : start + FILES_PER_TASK]
        return [is_image(read_header(path)) for path in paths]

    pool = ThreadPoolExecutor(THREADS)
    try:
        with ProgressBar(f"looking at the files of {name}", len(files.paths), "file") as progress:
            for start, are_images in zip(starts, pool.map(look_from, starts), strict=True):
                mask[start : start + len(are_images)] = are_images
                progress.update(len(are_images))
    finally:
        # An interrupt does not wait for the files that are left, nor for a disk that hangs.
        pool.shutdown(wait=False, cancel_futures=True)
    return files.select(mask), files.select(~mask)


def check_images(not_images: Sequence[bytes], num_files: int, where: str, skip_bad: bool) -> None:
    """Checks that all files are images.

    Args:
        not_images: Paths of the files that are not images.
        num_files: Number of all files.
        where: The folder or list of the files, for the message.
        skip_bad: Allow files that are not images.

    Raises:
        DataError: There are files that are not images.
    """
    if skip_bad or not not_images:
        return
    names = map(os.fsdecode, not_images[:MAX_FILES_SHOWN])
    shown = ", ".join(map(repr, names))
    ellipsis = ", …" if len(not_images) > MAX_FILES_SHOWN else ""
    has_heic = any(is_heic(read_header(path)) for path in not_images[:MAX_FILES_SHOWN])
    heic = "; convert HEIC photos to JPEG" if has_heic else ""
    raise DataError(
        f"{len(not_images)} of {num_files} files under {where!r} are not images, or cannot be "
        f"read: {shown}{ellipsis}; expected {FORMATS}; pass --skip-bad to leave them out{heic}"
    )


def storage_with_labels(kind: str, labels: np.ndarray) -> str:
    """Names a storage whose labels are from a file, so that a run notices when they change.

    Args:
        kind: Kind of the storage: "list".
        labels: Class of each image, int32 (n,).

    Returns:
        The kind with a digest of the labels.
    """
    return f"{kind}, labels {hashlib.sha256(labels.tobytes()).hexdigest()[:16]}"


def stored_split(
    name: str,
    storage: str,
    base: str,
    files: LabelledFiles,
    classes: tuple[str, ...],
    skip_bad: bool,
    skipped: Sequence[bytes],
    num_excluded: int,
) -> StoredSplit:
    """Makes a split of image files.

    Args:
        name: Name of the split.
        storage: Kind of the storage, perhaps with a digest of the labels: "folder".
        base: Folder that the names of the files are relative to.
        files: The images.
        classes: Names of the classes.
        skip_bad: A file that cannot be read later becomes an example with empty bytes.
        skipped: Files that are not images.
        num_excluded: Number of files that were excluded.

    Returns:
        The split.
    """
    # One tensor of all paths, because a list of a million str is several times as large.
    paths = tf.constant(files.paths, tf.string)
    read = functools.partial(_read_images, paths, tf.constant(files.labels), skip_bad)
    return StoredSplit(
        name=name,
        storage=f"{storage}, names {_digest_names(files.paths, base)}",
        classes=classes,
        usable=np.arange(len(files.paths)),
        select=functools.partial(random_access, read=read),
        file_name=lambda index: os.fsdecode(paths[index].numpy()),
        skipped=tuple(map(os.fsdecode, skipped)),
        excluded=num_excluded,
        labels=files.labels,
    )


def _digest_names(paths: Sequence[bytes], base: str) -> str:
    """Digest of the names of all files, which determine the order of an epoch."""
    names = b"\0".join(os.path.relpath(path, os.fsencode(base)) for path in paths)
    return hashlib.sha256(names).hexdigest()[:16]


def _read_images(
    paths: tf.Tensor, labels: tf.Tensor, skip_bad: bool, indices: tf.data.Dataset
) -> tf.data.Dataset:
    """Reads the files at batches of indices, and gives them one by one."""

    def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
        encoded = tf.io.read_file(paths[index])
        return {"index": index, "encoded": encoded, "label": labels[index]}

    def read_nothing(index: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"index": index, "encoded": tf.constant(b""), "label": labels[index]}

    if skip_bad:
        return map_with_fallback(indices.unbatch(), read, read_nothing, CORES)
    return indices.unbatch().map(read, num_parallel_calls=CORES, deterministic=True)
