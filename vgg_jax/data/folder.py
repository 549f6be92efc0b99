"""A folder of images: <root>/<class>/*, or <root>/{train,val,test}/<class>/*."""

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from vgg_jax.data.filesystem import is_dir, list_subfolders, listdir, read_header
from vgg_jax.data.splits import CORES, StoredSplit, map_with_fallback, random_access
from vgg_jax.errors import DataError, InputError

SPLITS = ("train", "val", "validation", "valid", "test")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM")
FILES_PER_TASK = 256  # handing single files to threads would take longer than to read them
THREADS = 16  # they wait for the disk or the network, not for a core
MAX_FILES_SHOWN = 10  # in an error message


def folder_splits(
    root: str, skip_bad: bool, exclude: Collection[str]
) -> dict[str, Callable[[], StoredSplit]]:
    """Finds the splits of an image folder.

    Args:
        root: Path of the folder.
        skip_bad: Leave out files that are not images. A file that cannot be read later becomes an
            example with empty bytes.
        exclude: Images to leave out, as paths relative to `root`.

    Returns:
        For each split, a function that reads it. A label is the index of the class folder in the
        sorted class folders of the training split. The function raises DataError for files that
        are not images, unless `skip_bad`. It raises InputError for a class folder without images,
        and for a class that the training split does not have.

    Raises:
        InputError: There are no class folders.
    """
    if not is_dir(root):
        pattern = os.path.join(root, "<class>", "*.jpg")
        raise InputError(f"no folder {root!r}: expected {pattern} there; pass another one as DATA")
    names = [name for name in SPLITS if is_dir(os.path.join(root, name))]
    if names and names[0] != "train" and set(_class_names(root)) <= set(SPLITS):
        pattern = os.path.join(root, "train", "<class>", "*.jpg")
        raise InputError(
            f"no training images under {root!r}: expected {pattern} beside {names[0]!r}"
        )
    if "train" in names:
        folders = {name: os.path.join(root, name) for name in names}
    else:
        folders = {"train": root}
    classes = _class_names(folders["train"])
    if not classes:
        pattern = os.path.join(folders["train"], "<class>", "*.jpg")
        raise InputError(
            f"no images under {folders['train']!r}: expected {pattern}; pass another folder as DATA"
        )
    return {
        name: functools.partial(
            _read_split, f"{root} {name}", root, folder, classes, skip_bad, exclude
        )
        for name, folder in folders.items()
    }


def relative_name(name: str, root: str) -> str:
    """Names an image as in a list of images to exclude.

    Args:
        name: Path of an image, or the name of a record.
        root: Folder of the data.

    Returns:
        The path relative to `root`, so that the data may be moved. Other names stay as they are.
    """
    return os.path.relpath(name, root) if name.startswith(os.path.join(root, "")) else name


class _Files(NamedTuple):
    """Files of one split, sorted by class and name."""

    paths: list[bytes]  # bytes, because a file name need not be Unicode
    labels: np.ndarray  # int32 (n,)

    def select(self, mask: np.ndarray) -> "_Files":
        return _Files(list(itertools.compress(self.paths, mask)), self.labels[mask])


def _read_split(
    name: str,
    root: str,
    folder: str,
    classes: tuple[str, ...],
    skip_bad: bool,
    exclude: Collection[str],
) -> StoredSplit:
    class_names = _class_names(folder)
    listed = _list_files(folder, class_names, classes)
    files = listed.select(_not_excluded(listed.paths, root, exclude))
    is_image = _sniff(files.paths, name)
    not_images = [os.fsdecode(path) for path in itertools.compress(files.paths, ~is_image)]
    if not_images and not skip_bad:
        raise DataError(_not_images_message(not_images, len(files.paths), folder))
    images = files.select(is_image)
    for class_name in class_names:
        if not np.any(images.labels == classes.index(class_name)):
            raise InputError(
                f"the class folder {os.path.join(folder, class_name)!r} has no images: "
                "expected at least one; add some or remove the folder"
            )

    # One tensor of all paths, because a list of a million str is several times as large.
    paths = tf.constant(images.paths, tf.string)
    read = functools.partial(_read_images, paths, tf.constant(images.labels), skip_bad)
    return StoredSplit(
        name=name,
        storage=f"folder, names {_digest_names(images.paths, folder)}",
        classes=classes,
        usable=np.arange(len(images.paths)),
        select=functools.partial(random_access, read=read),
        file_name=lambda index: os.fsdecode(paths[index].numpy()),
        skipped=tuple(not_images),
        excluded=len(listed.paths) - len(files.paths),
        labels=images.labels,
    )


def _class_names(folder: str) -> tuple[str, ...]:
    return tuple(sorted(name for name in list_subfolders(folder) if not name.startswith(".")))


def _list_files(folder: str, class_names: Sequence[str], classes: Sequence[str]) -> _Files:
    """Lists all files in the class folders, except for hidden ones."""
    paths, labels = [], []
    for class_name in class_names:
        class_folder = os.path.join(folder, class_name)
        if class_name not in classes:
            raise InputError(
                f"the class folder {class_folder!r} is not one of the {len(classes)} training "
                "classes: remove or rename it"
            )
        names = sorted(map(os.fsencode, listdir(class_folder)))
        visible = [name for name in names if not _is_hidden(name)]
        paths += [os.path.join(os.fsencode(class_folder), name) for name in visible]
        labels.append(np.full(len(visible), classes.index(class_name), np.int32))
    return _Files(paths, np.concatenate([np.empty(0, np.int32), *labels]))


def _is_hidden(name: bytes) -> bool:
    return name.startswith(b".") or name == b"Thumbs.db"


def _not_excluded(paths: Sequence[bytes], root: str, exclude: Collection[str]) -> np.ndarray:
    """Tells which files are not in the list of files to exclude, as bool (n,)."""
    if not exclude:
        return np.ones(len(paths), bool)
    return np.array([relative_name(os.fsdecode(path), root) not in exclude for path in paths], bool)


def _sniff(paths: Sequence[bytes], name: str) -> np.ndarray:
    """Tells which files begin as an image does, as bool (n,)."""
    # Extensions are not reliable: ImageNet has a PNG that is named .JPEG.
    result = np.zeros(len(paths), bool)
    starts = range(0, len(paths), FILES_PER_TASK)

    def sniff_from(start: int) -> list[bool]:
        return [_is_image(path) for path in paths[start : start + FILES_PER_TASK]]

    bar = tqdm(
        total=len(paths), desc=f"looking at the files of {name}", unit="file", disable=None, delay=2
    )
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for start, are_images in zip(starts, pool.map(sniff_from, starts), strict=True):
            result[start : start + len(are_images)] = are_images
            bar.update(len(are_images))
    return result


def _is_image(path: bytes) -> bool:
    """Tells whether a file can be opened and begins as a JPEG, PNG, GIF, BMP or WebP does."""
    header = read_header(path)
    is_webp = header.startswith(b"RIFF") and header[8:12] == b"WEBP"
    return header.startswith(SIGNATURES) or is_webp


def _not_images_message(not_images: Sequence[str], count: int, folder: str) -> str:
    shown = ", ".join(map(repr, not_images[:MAX_FILES_SHOWN]))
    ellipsis = ", …" if len(not_images) > MAX_FILES_SHOWN else ""
    return (
        f"{len(not_images)} of {count} files under {folder!r} are not images, or cannot be read: "
        f"{shown}{ellipsis}; remove them or pass --skip-bad"
    )


def _digest_names(paths: Sequence[bytes], folder: str) -> str:
    """Digest of the names of all files, which determine the order of an epoch."""
    names = b"\0".join(os.path.relpath(path, os.fsencode(folder)) for path in paths)
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
