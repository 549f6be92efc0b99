"""Labels of photos without class folders, from a label file beside them or from ImageNet's kit."""

import logging
import os
import re
import unicodedata
import zlib
from collections.abc import Sequence

import numpy as np

from vgg_jax.data.filesystem import exists
from vgg_jax.data.label_file import SUFFIXES, read_numbers, read_rows, sort_labels
from vgg_jax.division import split_kind
from vgg_jax.errors import InputError, install_hint, shorten_names, single_line

DEVKIT = "ILSVRC2012_devkit_t12/data"  # ImageNet's development kit, as its archive unpacks
SOLUTION = "LOC_val_solution.csv"  # of Kaggle's ImageNet, with boxes after the class
_NUMBERED = re.compile(r"ILSVRC2012_val_([0-9]{8})(?![0-9])")  # ImageNet's names, line 1 for 1

logger = logging.getLogger(__name__)


def find_label_file(root: str, split: str, folder: str) -> str | None:
    """Finds the label file of a folder of photos without class folders.

    Args:
        root: Folder of the data.
        split: Name of the split's folder: "val".
        folder: The split's folder.

    Returns:
        Path of the file, or None.

    Raises:
        InputError: Several files may be meant.
    """
    stems = [split, f"{split}_labels", f"{split}_annotations", "labels"]
    names = [stem + suffix for stem in stems for suffix in SUFFIXES]
    if split.lower().startswith("val"):
        truth = "ILSVRC2012_validation_ground_truth.txt"
        names += [SOLUTION, truth, f"{DEVKIT}/{truth}"]
    parents = dict.fromkeys((root, folder))
    paths = [os.path.join(parent, name) for parent in parents for name in names]
    label_files = list(filter(exists, paths))
    if len(label_files) > 1:
        raise InputError(
            f"{len(label_files)} files may have the labels of {folder!r}: "
            f"{', '.join(map(repr, label_files))}; expected one; rename or move the others"
        )
    return label_files[0] if label_files else None


def read_flat_labels(
    label_file: str,
    split: str,
    file_names: Sequence[str],
    bad_names: Sequence[str],
    classes: tuple[str, ...],
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Reads the labels of a folder of photos without class folders.

    Args:
        label_file: Path of the label file. Lines of one number each are ImageNet's ground truth.
            It needs `meta.mat` beside the file. The number in ImageNet's names of photos is that
            of their line. The lines belong to other photos in their order.
        split: Name of the split's folder: "val". The lines of other splits are ignored.
        file_names: Names of the photos, sorted.
        bad_names: Names of the files that should be photos and are not. They need no labels.
        classes: Names of the training classes, or none to take them from the file.

    Returns:
        Labels, int32 (n,), and the names of the classes.

    Raises:
        InputError: A photo has no label, or a label is no class.
    """
    numbers = read_numbers(label_file)
    if numbers is not None:
        lines = _find_lines(label_file, len(numbers), file_names, bad_names)
        names = _to_synsets(label_file, [numbers[line] for line in lines])
    else:
        names = _labels_by_file(label_file, split, file_names)
    if not classes:
        classes = sort_labels(names)
    index = {name: label for label, name in enumerate(classes)}
    reading = "its labels are class names"
    if any(name not in index for name in names) and all(name.isdecimal() for name in names):
        reading = "its numbers count the sorted class names from 0"
        index = {str(label): label for label in range(len(classes))}
        names = [str(int(name)) for name in names]
        if "0" not in names:
            logger.warning(
                "no label of %s is 0, and its numbers count the classes from 0: expected 1 less "
                "for each photo if yours count from 1",
                label_file,
            )
    for file, name in zip(file_names, names, strict=True):
        if name not in index:
            raise InputError(
                f"{label_file} gives {file!r} the label {name!r}: expected one of the "
                f"{len(classes)} training classes ({shorten_names(classes)}) or its number from 0"
            )
    logger.info("labels of %d photos are from %s: %s", len(names), label_file, reading)
    return np.array([index[name] for name in names], np.int32), classes


def _find_lines(
    label_file: str, num_lines: int, file_names: Sequence[str], bad_names: Sequence[str]
) -> list[int]:
    """Finds the line of ImageNet's ground truth for each photo, counted from 0."""
    matches = [_NUMBERED.match(name) for name in file_names]
    if not any(matches):
        in_order = sorted([*file_names, *bad_names], key=os.fsencode)
        if num_lines != len(in_order):
            bad = f", of which {bad_names[0]!r} is no image" if bad_names else ""
            raise InputError(
                f"{label_file} has {num_lines} labels for {len(in_order)} photos{bad}: expected "
                "one for each, or photos named ILSVRC2012_val_00000001 and so on"
            )
        positions = {name: position for position, name in enumerate(in_order)}
        return [positions[name] for name in file_names]
    lines = [int(match[1]) - 1 if match else -1 for match in matches]
    for name, line in zip(file_names, lines, strict=True):
        if not 0 <= line < num_lines:
            raise InputError(
                f"{label_file} has no label for {name!r}: expected a name from "
                f"ILSVRC2012_val_00000001 to {num_lines:08}, as other photos have; rename or "
                "move it"
            )
    return lines


def _to_synsets(label_file: str, numbers: Sequence[int]) -> list[str]:
    """Converts numbers of ImageNet's ground truth to synsets."""
    meta = os.path.join(os.path.dirname(label_file), "meta.mat")
    if not os.path.exists(meta):
        raise InputError(
            f"{label_file} has numbers without files, which count ImageNet's classes in an order "
            f"of their own: expected the development kit's meta.mat beside it; copy it to {meta}"
        )
    synsets = _read_synsets(meta)
    unknown = [number for number in numbers if number not in synsets]
    if unknown:
        raise InputError(f"{label_file} has the number {unknown[0]}, which {meta} does not have")
    return [synsets[number] for number in numbers]


def _labels_by_file(label_file: str, split: str, file_names: Sequence[str]) -> list[str]:
    labels: dict[str, str] = {}
    of_other_splits = set()
    has_boxes = os.path.basename(label_file) == SOLUTION
    for row in read_rows(label_file):
        folder, file = os.path.split(row.file.replace("\\", "/"))
        file = unicodedata.normalize("NFC", file)  # macOS may have changed the form of a name
        kinds = {split_kind(os.path.basename(folder)), split_kind(row.split or "")}
        if kinds - {None, split_kind(split)}:
            of_other_splits.add(os.path.splitext(file)[0])
            continue
        label = row.label.split()[0] if has_boxes else row.label
        if labels.setdefault(file, label) != label:
            raise InputError(
                f"line {row.number} of {label_file} gives {file!r} a second label, {label!r} after "
                f"{labels[file]!r}: expected one"
            )
    names = [unicodedata.normalize("NFC", file) for file in file_names]
    # Some lists have no extensions.
    names = [file if file in labels else os.path.splitext(file)[0] for file in names]
    missing = [file for file, name in zip(file_names, names, strict=True) if name not in labels]
    if missing:
        stems = {os.path.splitext(unicodedata.normalize("NFC", file))[0] for file in missing}
        is_elsewhere = not stems.isdisjoint(of_other_splits)
        hint = "; it has some in other splits, so pass it as DATA" if is_elsewhere else ""
        raise InputError(
            f"{len(missing)} of {len(file_names)} photos have no label in {label_file}, for "
            f"example {missing[0]!r}: expected a line for each{hint}"
        )
    others = sorted(labels.keys() - set(names))
    if others:
        logger.info(
            "%d lines of %s name no photo of the split %r, for example %r",
            len(others),
            label_file,
            split,
            others[0],
        )
    return [labels[name] for name in names]


def _read_synsets(path: str) -> dict[int, str]:
    """Reads the synset of each ILSVRC2012_ID from `meta.mat`: {1: "n02119789"}."""
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as error:
        raise InputError(f"{path} needs scipy ({error}): {install_hint('train')}") from error
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    except (MatReadError, OSError, ValueError, TypeError, LookupError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read ({single_line(error, 100)}): expected meta.mat of ImageNet's "
            "development kit"
        ) from error
