"""A folder of images: <root>/<class>/*, or <root>/{train,val,test}/<class>/*.

A split may also hold its images directly, with a label file.
"""

import functools
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vgg_jax.data.file_split import (
    LabelledFiles,
    check_images,
    exclude_files,
    split_images,
    storage_with_labels,
    stored_split,
)
from vgg_jax.data.filesystem import (
    exists,
    is_dangling_link,
    is_dir,
    list_subfolders,
    listdir,
    read_header,
)
from vgg_jax.data.flat_labels import find_label_file, read_flat_labels
from vgg_jax.data.label_file import SUFFIXES as LIST_SUFFIXES
from vgg_jax.data.splits import StoredSplit
from vgg_jax.division import SPLIT_NAMES, split_kind
from vgg_jax.errors import InputError, shorten_names
from vgg_jax.image_files import has_image_suffix, is_image, is_note, is_system_name

# Folders that are parts of a data set and not classes: "train2017", "images", "HAM_images_part_1".
_PART = re.compile(
    r"(?P<prefix>.*[ _-])?"
    r"(?P<word>train|training|test|testing|val|valid|validation|images?|imgs|photos|labels|masks"
    r"|annotations?|lists?)"
    r"(?P<suffix>[ _-]?(\d+|[a-c]|images?|data|set|input|part))*",
    re.IGNORECASE,
)

logger = logging.getLogger(__name__)


def folder_splits(
    root: str, skip_bad: bool, exclude: Collection[str], labelled: bool = True
) -> dict[str, Callable[[], StoredSplit]]:
    """Finds the splits of an image folder.

    Args:
        root: Path of the folder.
        skip_bad: Leave out files that are not images. A file that cannot be read later becomes an
            example with empty bytes.
        exclude: Images to leave out, as paths relative to `root`.
        labelled: Read label files, and compare the classes with those of the training split.
            Otherwise the labels of the splits mean nothing.

    Returns:
        For each split, a function that reads it. A label is the index of the class folder in the
        sorted class folders of the training split, or of the only split. The function raises
        DataError for files that are not images, unless `skip_bad`. It raises InputError for photos
        without labels, for a class folder without images, and for a class that the training split
        does not have.

    Raises:
        InputError: There are no images, or the names of the folders have two readings.
    """
    if exists(root) and not is_dir(root):
        raise InputError(
            f"{root!r} is a file: expected a folder of images, or a list that ends in "
            f"{', '.join(LIST_SUFFIXES)}; unpack an archive first"
        )
    if not is_dir(root):
        raise InputError(
            f"no folder {root!r}: expected {_pattern(root)} there; pass another one as DATA"
        )
    folders = _split_folders(root)
    splits = {name: _Split(root, name, folder) for name, folder in folders.items()}
    reference = next(iter(splits.values()))  # the training split, if there is one
    return {
        name: functools.partial(
            _read_split, split, reference if labelled else None, skip_bad, frozenset(exclude)
        )
        for name, split in splits.items()
    }


class _Split(NamedTuple):
    root: str
    name: str
    folder: str


def _split_folders(root: str) -> dict[str, str]:
    """Finds the folders of the splits. Without any, the root is the training split."""
    names = _class_names(root)
    splits = {name: os.path.join(root, name) for name in names if split_kind(name)}
    others = [name for name in names if name not in splits]
    kinds = _name_by_kind(root, splits)
    if others and not any(map(_class_names, splits.values())):
        are_parts = all(map(_PART.fullmatch, names))
        if are_parts and not _has_labelled_photos(root, kinds) and not _are_classes(root, names):
            raise InputError(_named_like_parts(root, names))
        if list(kinds) == ["train"] and not are_parts:
            return {"train": root}  # a class of its own: trains beside cars
    if not splits:
        return {"train": root}
    if others and "train" not in kinds:
        raise InputError(
            f"{root!r} has class folders ({shorten_names(others)}) and a folder of a split "
            f"({shorten_names(list(splits))}): expected the class folders in {root}/train; move "
            "them, or rename the split if it is a class"
        )
    if others:
        logger.info("ignored beside the splits of %s: %s", root, shorten_names(others))
    return {kinds[kind]: splits[kinds[kind]] for kind in SPLIT_NAMES if kind in kinds}


def _name_by_kind(root: str, names: Iterable[str]) -> dict[str, str]:
    """Maps the kinds of splits to the names of their folders."""
    kinds: dict[str, str] = {}
    for name in names:
        kind = str(split_kind(name))
        if kind in kinds:
            raise InputError(
                f"{kinds[kind]!r} and {name!r} under {root!r} are both names of the {kind} split: "
                "expected one of them; rename the other or move it"
            )
        kinds[kind] = name
    return kinds


def _has_labelled_photos(root: str, kinds: Mapping[str, str]) -> bool:
    """Tells whether a label file belongs to the training split, a folder without class folders."""
    name = kinds.get("train")
    return name is not None and find_label_file(root, name, os.path.join(root, name)) is not None


def _are_classes(root: str, names: Sequence[str]) -> bool:
    """Tells whether folders of images named like parts are classes: freight and passenger train."""
    matches = [match for name in names if (match := _PART.fullmatch(name))]
    prefixes = [(match["prefix"] or "").rstrip(" _-") for match in matches]
    return (
        len({match["word"].lower() for match in matches}) == 1 < len(matches)
        and all(prefix and not _PART.fullmatch(prefix) for prefix in prefixes)
        and not any(match["suffix"] for match in matches)
        and all(_has_images(os.path.join(root, name)) for name in names)
    )


def _named_like_parts(root: str, names: Sequence[str]) -> str:
    folders = [os.path.join(root, name) for name in names]
    with_classes = list(filter(_has_class_images, folders))
    remedy = f"pass {with_classes[0]!r} as DATA, or " if with_classes else ""
    return (
        f"the folders of {root!r} are named like parts of a data set, not like classes "
        f"({shorten_names(names)}): expected {_pattern(root)}, or {root}/train and a label "
        f"file {root}/train.csv; {remedy}rename them if they are classes"
    )


def _read_split(
    split: _Split, reference: _Split | None, skip_bad: bool, exclude: Collection[str]
) -> StoredSplit:
    """Reads a split. The classes are those of the reference, the training split.

    Without a reference they are its own, and photos without class folders get no labels.
    """
    root, folder = split.root, split.folder
    classes = _class_names((reference or split).folder)
    if not classes and reference and split != reference:
        classes = _read_split(reference, reference, skip_bad, exclude).classes
    is_flat = not _class_names(folder)
    listed, system_files = _list_flat(folder) if is_flat else _list_class_folders(folder, classes)
    name = f"{root} {split.name}"
    all_images, others = split_images(listed, name)
    if is_flat and not all_images.paths:
        raise InputError(
            f"no images under {folder!r}: expected {_pattern(folder)}; pass another folder as DATA"
        )
    label_file = None
    if is_flat and reference:
        label_file = _require_label_file(split, len(all_images.paths))
        bad = [path for path in others.paths if not _is_note(path)]
        all_images, classes = _label_images(label_file, split, all_images.paths, bad, classes)
    images = exclude_files(all_images, root, exclude)
    not_images = exclude_files(others, root, exclude)
    empty = _classes_without_images(folder, images, classes)
    _check_nested(split, empty)
    damaged = _without_notes(name, not_images.paths, system_files, label_file)
    _check_deeper_images(damaged)
    if not is_flat:
        _report_loose_images(folder)
    check_images(damaged, len(images.paths) + len(damaged), folder, skip_bad)
    if empty:
        raise InputError(
            f"the class folder {os.path.join(folder, empty[0])!r} has no images: expected at least "
            "one; add some, or move the folder elsewhere"
        )
    num_excluded = len(listed.paths) - len(images.paths) - len(not_images.paths)
    storage = storage_with_labels("folder", images.labels) if is_flat else "folder"
    return stored_split(name, storage, folder, images, classes, skip_bad, damaged, num_excluded)


def _without_notes(
    name: str,
    not_images: Sequence[bytes],
    system_files: Sequence[bytes],
    label_file: str | None,
) -> list[bytes]:
    """Leaves out texts and the like, and logs their number without the label file."""
    is_skipped = {path: _is_note(path) for path in not_images}
    notes = [path for path, skip in is_skipped.items() if skip and os.fsdecode(path) != label_file]
    skipped = [*system_files, *notes]
    if skipped:
        logger.info(
            "skipped beside the images of %s: %d files that are notes, hidden or of the system, "
            "for example %r",
            name,
            len(skipped),
            os.fsdecode(skipped[0]),
        )
    return [path for path, skip in is_skipped.items() if not skip]


def _is_note(path: bytes) -> bool:
    return is_note(os.fsdecode(os.path.basename(path)))


def _class_names(folder: str) -> tuple[str, ...]:
    """Lists the folders in a folder, sorted.

    Raises:
        InputError: One of them is a link to nothing, or two names look the same.
    """
    names = sorted(name for name in list_subfolders(folder) if not is_system_name(name))
    for name in listdir(folder):
        path = os.path.join(folder, name)
        is_file = has_image_suffix(name) or is_note(name) or is_system_name(name)
        if not is_file and is_dangling_link(path):
            raise InputError(
                f"{path!r} is a link to {os.readlink(path)!r}, which cannot be opened: expected a "
                "class folder; mend or remove the link"
            )
    by_form: dict[str, str] = {}
    for name in names:
        other = by_form.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise InputError(
                f"two folders under {folder!r} differ only in their Unicode form, {other!a} "
                f"and {name!a}: expected one folder for each class; merge them"
            )
    return tuple(names)


def _has_class_images(folder: str) -> bool:
    """Tells whether the first class folder of a folder has images."""
    for class_name in _class_names(folder)[:1]:
        return _has_images(os.path.join(folder, class_name))
    return False


def _has_images(folder: str) -> bool:
    """Tells whether images lie in a folder, without its folders."""
    return any(is_image(read_header(path)) for path in _list_files(folder)[0])


def _list_class_folders(folder: str, classes: Sequence[str]) -> tuple[LabelledFiles, list[bytes]]:
    """Lists the files in the class folders, and separately those of systems, also beside them."""
    paths, labels = [], []
    _, system_files = _list_files(folder)
    for class_name in _class_names(folder):
        class_folder = os.path.join(folder, class_name)
        if class_name not in classes:
            raise InputError(_unknown_class(class_folder, class_name, classes))
        files, others = _list_files(class_folder)
        paths += files
        system_files += others
        labels.append(np.full(len(files), classes.index(class_name), np.int32))
    return LabelledFiles(paths, np.concatenate([np.empty(0, np.int32), *labels])), system_files


def _list_flat(folder: str) -> tuple[LabelledFiles, list[bytes]]:
    """Lists the files in a folder without class folders, with labels of -1."""
    files, system_files = _list_files(folder)
    return LabelledFiles(files, np.full(len(files), -1, np.int32)), system_files


def _list_files(folder: str) -> tuple[list[bytes], list[bytes]]:
    """Lists the paths in a folder, and separately the hidden ones and those of systems."""
    files: list[bytes] = []
    system_files: list[bytes] = []
    for name in sorted(map(os.fsencode, listdir(folder))):  # a name need not be Unicode
        paths = system_files if is_system_name(os.fsdecode(name)) else files
        paths.append(os.path.join(os.fsencode(folder), name))
    return files, system_files


def _check_deeper_images(not_images: Sequence[bytes]) -> None:
    """Checks that no folder beside the images of a class has images, too."""
    for path in map(os.fsdecode, not_images):
        if is_dir(path) and _has_images(path):
            raise InputError(
                f"{path!r} is a folder with images, beside other images of its class: expected all "
                "images of a class in its folder; move them up"
            )


def _report_loose_images(folder: str) -> None:
    """Logs how many images lie beside the class folders."""
    loose = [path for path in _list_files(folder)[0] if is_image(read_header(path))]
    if loose:
        logger.warning(
            "%d images of %s lie in no class folder and are left out, for example %r",
            len(loose),
            folder,
            os.fsdecode(loose[0]),
        )


def _unknown_class(path: str, name: str, classes: Sequence[str]) -> str:
    for training_class in classes:
        if unicodedata.normalize("NFC", training_class) == unicodedata.normalize("NFC", name):
            return (
                f"the class folder {path!r} differs from the training class {training_class!a} "
                f"only in its Unicode form, {name!a}: expected the same name; rename it"
            )
        if training_class.casefold() == name.casefold():
            return (
                f"the class folder {path!r} differs from the training class {training_class!r} "
                "only in capital letters: expected the same name; rename it"
            )
    if _PART.fullmatch(name):
        return (
            f"{path!r} is named like a part of a data set, and is no training class "
            f"({shorten_names(classes)}): expected {_pattern(os.path.dirname(path))}, or images "
            f"and a label file in {os.path.dirname(path)!r}; move its images up"
        )
    return (
        f"the class folder {path!r} is not one of the {len(classes)} training classes "
        f"({shorten_names(classes)}): expected the same names; rename or move it"
    )


def _classes_without_images(
    folder: str, images: LabelledFiles, classes: Sequence[str]
) -> list[str]:
    with_images = set(images.labels.tolist())
    return [name for name in _class_names(folder) if classes.index(name) not in with_images]


def _check_nested(split: _Split, class_folders: Sequence[str]) -> None:
    """Checks that class folders without images have no folders instead.

    Raises:
        InputError: The images lie deeper.
    """
    for class_folder in class_folders:
        path = os.path.join(split.folder, class_folder)
        nested = _class_names(path)
        if any(split_kind(name) for name in nested):
            raise InputError(
                f"{path!r} has the folders of splits ({shorten_names(nested)}), and lies deeper "
                f"than expected: pass {path!r} as DATA"
            )
        if nested:
            raise InputError(
                f"the class folder {path!r} has no images, but the folders "
                f"{shorten_names(nested)}: expected {_pattern(split.folder)}; pass the folder "
                "whose folders are the classes, or move the images up"
            )


def _require_label_file(split: _Split, num_images: int) -> str:
    root, name, folder = split
    label_file = find_label_file(root, name, folder)
    if label_file is None:
        raise InputError(
            f"no labels for the {num_images} images of {folder!r}, which can only be predicted: "
            f"expected {_pattern(folder)}, or a label file {root}/{name}.csv with lines of "
            "`file,label`"
        )
    return label_file


def _label_images(
    label_file: str,
    split: _Split,
    paths: list[bytes],
    bad: Sequence[bytes],
    classes: tuple[str, ...],
) -> tuple[LabelledFiles, tuple[str, ...]]:
    """Labels the images of a split without class folders from its label file.

    The bad files take part, since ImageNet's ground truth has labels for them, too.
    """
    file_names, bad_names = (
        [os.fsdecode(os.path.basename(path)) for path in files] for files in (paths, bad)
    )
    labels, classes = read_flat_labels(label_file, split.name, file_names, bad_names, classes)
    return LabelledFiles(paths, labels), classes


def _pattern(folder: str) -> str:
    return os.path.join(folder, "<class>", "*.jpg")
