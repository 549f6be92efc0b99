"""A folder of images: <root>/<class>/*, or <root>/{train,val,test}/<class>/*."""

import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from vgg_jax.data.filesystem import is_dir, list_subfolders, listdir, read_header
from vgg_jax.data.splits import CORES, StoredSplit, map_with_fallback, random_access
from vgg_jax.errors import DataError, InputError

SPLITS = ("train", "val", "validation", "valid", "test")
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM")
SNIFFED_AT_ONCE = 256  # files per task of a thread: one by one, handing out the tasks takes longer than the reading
THREADS = 16  # they wait for the disk or the network, not for a core


def folder_splits(
    root: str, skip_bad: bool, exclude: Collection[str]
) -> dict[str, Callable[[], StoredSplit]]:
    """The splits of an image folder; each is read when it is called. Labels index the sorted class folders of the training split.

    Leaves out what is named in `exclude`, and if `skip_bad` what is no image, or cannot be read when its turn comes: its bytes are none.
    Raises InputError where there are no class folders, and, when a split is read, for files that are not images (unless `skip_bad`),
    for a class folder without images and for a class that the training split does not have.
    """
    if not is_dir(root):
        raise InputError(
            f"no folder {root!r}: expected {os.path.join(root, '<class>', '*.jpg')} there; pass another one as DATA"
        )
    names = [name for name in SPLITS if is_dir(os.path.join(root, name))]
    if names and names[0] != "train" and set(_class_names(root)) <= set(SPLITS):
        raise InputError(
            f"no training images under {root!r}: expected {os.path.join(root, 'train', '<class>', '*.jpg')} beside {names[0]!r}"
        )
    folders = (
        {name: os.path.join(root, name) for name in names} if "train" in names else {"train": root}
    )
    classes = _class_names(folders["train"])
    if not classes:
        expected = os.path.join(folders["train"], "<class>", "*.jpg")
        raise InputError(
            f"no images under {folders['train']!r}: expected {expected}; pass another folder as DATA"
        )
    return {
        name: functools.partial(
            _records, f"{root} {name}", root, folder, classes, skip_bad, exclude
        )
        for name, folder in folders.items()
    }


def _records(
    name: str,
    root: str,
    folder: str,
    classes: tuple[str, ...],
    skip_bad: bool,
    exclude: Collection[str],
) -> StoredSplit:
    present = _class_names(folder)
    if unknown := [each for each in present if each not in classes]:
        raise InputError(
            f"the class folder {os.path.join(folder, unknown[0])!r} is none of training's {len(classes)}: remove or rename it"
        )
    # Bytes, because a file name need not be Unicode, and one tensor of all, because a list of a million str is several times as large.
    names_in = [sorted(map(os.fsencode, listdir(os.path.join(folder, each)))) for each in present]
    entries_in = [[entry for entry in entries if not _hidden(entry)] for entries in names_in]
    paths = [
        os.path.join(os.fsencode(folder), os.fsencode(each), entry)
        for each, entries in zip(present, entries_in, strict=True)
        for entry in entries
    ]
    labels = np.repeat(
        np.array([classes.index(each) for each in present], np.int32),
        [len(entries) for entries in entries_in],
    )
    kept = np.array(
        [not exclude or relative(os.fsdecode(path), root) not in exclude for path in paths], bool
    )
    excluded = int((~kept).sum())
    paths, labels = list(itertools.compress(paths, kept)), labels[kept]
    good = _sniff(paths, name)
    bad = list(itertools.compress(paths, ~good))
    if bad and not skip_bad:
        shown = ", ".join(repr(os.fsdecode(path)) for path in bad[:10]) + (
            ", …" if len(bad) > 10 else ""
        )
        raise DataError(
            f"{len(bad)} of {len(paths)} files under {folder!r} are not images, or cannot be read: {shown}; remove them or pass --skip-bad"
        )
    for each in present:
        if not np.any(labels[good] == classes.index(each)):
            raise InputError(
                f"the class folder {os.path.join(folder, each)!r} has no images: expected at least one; add some or remove the folder"
            )
    paths = list(itertools.compress(paths, good))
    names = hashlib.sha256(
        b"\0".join(os.path.relpath(path, os.fsencode(folder)) for path in paths)
    ).hexdigest()
    files = tf.constant(paths, tf.string)
    label_of = tf.constant(labels[good])

    def read(indices: tf.data.Dataset) -> tf.data.Dataset:
        def one(index: tf.Tensor) -> dict[str, tf.Tensor]:
            return {
                "index": index,
                "encoded": tf.io.read_file(files[index]),
                "label": label_of[index],
            }

        def unreadable(index: tf.Tensor) -> dict[str, tf.Tensor]:
            return {"index": index, "encoded": tf.constant(b""), "label": label_of[index]}

        if skip_bad:
            return map_with_fallback(indices.unbatch(), one, unreadable, CORES)
        return indices.unbatch().map(one, num_parallel_calls=CORES, deterministic=True)

    return StoredSplit(
        name=name,
        storage=f"folder, names {names[:16]}",
        classes=classes,
        usable=np.arange(len(paths)),
        order=functools.partial(random_access, read=read),
        file_name=lambda index: os.fsdecode(files[index].numpy()),
        skipped=tuple(map(os.fsdecode, bad)),
        excluded=excluded,
    )


def relative(name: str, root: str) -> str:
    """The name of an image in a list: its path below the data's folder, so that the data may be moved. Other names are left as they are."""
    return os.path.relpath(name, root) if name.startswith(os.path.join(root, "")) else name


def _class_names(folder: str) -> tuple[str, ...]:
    return tuple(sorted(name for name in list_subfolders(folder) if not name.startswith(".")))


def _hidden(name: bytes) -> bool:
    return name.startswith(b".") or name == b"Thumbs.db"


def _sniff(paths: list[bytes], name: str) -> np.ndarray:
    """bool (n,): which files begin as an image does. Their extensions say little: ImageNet has a PNG named .JPEG."""
    good = np.zeros(len(paths), bool)
    starts = range(0, len(paths), SNIFFED_AT_ONCE)
    bar = tqdm(
        total=len(paths), desc=f"looking at the files of {name}", unit="file", disable=None, delay=2
    )
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for start, found in zip(
            starts,
            pool.map(
                lambda start: [*map(_is_image, paths[start : start + SNIFFED_AT_ONCE])], starts
            ),
            strict=True,
        ):
            good[start : start + len(found)] = found
            bar.update(len(found))
    return good


def _is_image(path: bytes) -> bool:
    """Whether it is a file that can be opened and begins as a JPEG, PNG, GIF, BMP or WebP does."""
    begins = read_header(path)
    return begins.startswith(MAGIC) or (begins.startswith(b"RIFF") and begins[8:12] == b"WEBP")
