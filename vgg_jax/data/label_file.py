"""Label files: texts and CSV files that name the class of each photo.

A line is `file,label` or `file,label,split`. Commas, tabs or spaces separate the columns. A first
line with names of columns is optional.
"""

import csv
import logging
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vgg_jax.data.filesystem import exists
from vgg_jax.errors import InputError, install_hint, shorten_names
from vgg_jax.image_files import has_image_suffix
from vgg_jax.paths import to_path

SUFFIXES = (".csv", ".tsv", ".txt", ".lst")
# Column names that people use, from Kaggle's competitions and the examples of libraries.
FILE_COLUMNS = (
    *("file", "filename", "file_name", "filepath", "file_path", "path", "image", "images", "img"),
    *("image_name", "image_path", "image_id", "imageid", "id", "name"),
)
LABEL_COLUMNS = (
    *("label", "labels", "label_name", "class", "class_name", "classname", "class_id"),
    *("category", "target", "breed", "species", "predictionstring", "classid", "y"),
)
SPLIT_COLUMNS = ("split", "subset", "set", "partition", "dataset", "data set", "phase", "usage")
DEVKIT = "ILSVRC2012_devkit_t12/data"  # ImageNet's development kit, as its archive unpacks

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """A line of a label file."""

    file: str
    label: str
    split: str | None
    number: int  # of the line, from 1


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
        names += ["LOC_val_solution.csv", truth, f"{DEVKIT}/{truth}"]
    places = dict.fromkeys((root, folder))
    found = [
        path for place in places for name in names if exists(path := os.path.join(place, name))
    ]
    if len(found) > 1:
        raise InputError(
            f"{len(found)} files may have the labels of {folder!r}: "
            f"{', '.join(map(repr, found))}; expected one; rename or move the others"
        )
    return found[0] if found else None


def read_rows(path: str) -> list[Row]:
    """Reads a label file.

    Args:
        path: Path of the file, in UTF-8.

    Returns:
        Its lines, without a line of column names, empty lines and comments that begin with "#".

    Raises:
        InputError: The file cannot be read, or a line has no label.
    """
    lines = _read_lines(path)
    if not lines:
        raise InputError(f"{path} is empty: expected lines of `file,label`")
    file_column, label_column, split_column, has_header = _find_columns(path, lines[0][1])
    if has_header and len(lines) == 1:
        raise InputError(f"{path} has names of columns only: expected lines of `file,label` below")
    rows = []
    for number, cells in lines[has_header:]:
        if len(cells) <= max(file_column, label_column) or not cells[label_column]:
            raise InputError(
                f"line {number} of {path} has no label: expected `file,label`, got {cells}"
            )
        if len(cells) > len(lines[0][1]):
            raise InputError(
                f"line {number} of {path} has {len(cells)} columns: expected the "
                f"{len(lines[0][1])} of the first line"
            )
        split = None
        if split_column is not None and split_column < len(cells):
            split = cells[split_column]
        rows.append(Row(cells[file_column], cells[label_column], split, number))
    return rows


def read_numbers(path: str) -> list[int] | None:
    """Reads a label file that has one number on each line, and nothing else.

    Args:
        path: Path of the file.

    Returns:
        The numbers, or None for another label file.

    Raises:
        InputError: The file cannot be read.
    """
    lines = _read_lines(path)
    if not lines or any(len(cells) > 1 or not cells[0].isdecimal() for _, cells in lines):
        return None
    return [int(cells[0]) for _, cells in lines]


def read_synsets(path: str) -> dict[int, str]:
    """Reads which synset each ILSVRC2012_ID means.

    The numbers are not the order of the sorted synsets.

    Args:
        path: `meta.mat` of ImageNet's development kit.

    Returns:
        Synsets by number: {1: "n02119789"}.

    Raises:
        InputError: The file cannot be read.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise InputError(f"{path} needs scipy ({error}): {install_hint('train')}") from error
    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    except Exception as error:  # scipy has no class of its own for its errors
        raise InputError(
            f"{path} cannot be read ({' '.join(str(error).split())[:100]}): expected meta.mat of "
            "ImageNet's development kit"
        ) from error


def sort_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Sorts the distinct labels: as numbers if all are numbers, else as texts.

    Args:
        labels: The labels.

    Returns:
        Names of the classes.
    """
    distinct = set(labels)
    key = int if all(label.isdecimal() for label in distinct) else None
    return tuple(sorted(sorted(distinct), key=key))  # type: ignore[type-var, arg-type]


def read_flat_labels(
    label_file: str, file_names: Sequence[str], classes: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Reads the labels of a folder of photos without class folders.

    Args:
        label_file: Path of the label file. Lines of one number each are ImageNet's ground truth.
            They belong to the sorted photos, and need `meta.mat` beside the file.
        file_names: Names of the photos, sorted.
        classes: Names of the training classes, or none to take them from the file.

    Returns:
        Labels, int32 (n,), and the names of the classes.

    Raises:
        InputError: A photo has no label, or a label is no class.
    """
    numbers = read_numbers(label_file)
    if numbers is not None:
        names = _ground_truth(label_file, numbers, len(file_names))
    else:
        names = _labels_by_file(label_file, file_names)
    if not classes:
        classes = sort_labels(names)
    index = {name: label for label, name in enumerate(classes)}
    reading = "its labels are class names"
    if any(name not in index for name in names) and all(name.isdecimal() for name in names):
        reading = "its numbers count the sorted class names from 0"
        index = {str(label): label for label in range(len(classes))}
        names = [str(int(name)) for name in names]
    for file, name in zip(file_names, names, strict=True):
        if name not in index:
            raise InputError(
                f"{label_file} gives {file!r} the label {name!r}: expected one of the "
                f"{len(classes)} training classes ({shorten_names(classes)}) or its number from 0"
            )
    logger.info("labels of %d photos are from %s: %s", len(names), label_file, reading)
    return np.array([index[name] for name in names], np.int32), classes


def _ground_truth(label_file: str, numbers: Sequence[int], num_photos: int) -> list[str]:
    """Converts ImageNet's ground truth to synsets."""
    if len(numbers) != num_photos:
        raise InputError(
            f"{label_file} has {len(numbers)} labels for {num_photos} photos: expected one for each"
        )
    meta = os.path.join(os.path.dirname(label_file), "meta.mat")
    if not os.path.exists(meta):
        raise InputError(
            f"{label_file} has numbers without files, which count ImageNet's classes in an order "
            f"of their own: expected the development kit's meta.mat beside it; copy it to {meta}"
        )
    synsets = read_synsets(meta)
    unknown = [number for number in numbers if number not in synsets]
    if unknown:
        raise InputError(f"{label_file} has the number {unknown[0]}, which {meta} does not have")
    return [synsets[number] for number in numbers]


def _labels_by_file(label_file: str, file_names: Sequence[str]) -> list[str]:
    labels: dict[str, str] = {}
    for row in read_rows(label_file):
        file = os.path.basename(row.file.replace("\\", "/"))
        # ImageNet's LOC_val_solution.csv has the boxes after the class.
        label = row.label.split()[0] if "solution" in label_file.lower() else row.label
        if labels.setdefault(file, label) != label:
            raise InputError(
                f"line {row.number} of {label_file} gives {file!r} a second label, {label!r} after "
                f"{labels[file]!r}: expected one"
            )
    # Some lists have no extensions.
    names = [file if file in labels else os.path.splitext(file)[0] for file in file_names]
    missing = [file for file, name in zip(file_names, names, strict=True) if name not in labels]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(file_names)} photos have no label in {label_file}, for "
            f"example {missing[0]!r}: expected a line for each"
        )
    return [labels[name] for name in names]


def _read_lines(path: str) -> list[tuple[int, list[str]]]:
    """Reads the cells of each line with its number."""
    try:
        content = to_path(path).read_bytes()
        # Excel's "Unicode text" is UTF-16, with a mark at the start.
        is_utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
        if "\0" in text:
            raise ValueError("it has zero bytes")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(
            f"{path} cannot be read as a label file ({reason}): expected lines of `file,label` in "
            "UTF-8"
        ) from error
    lines = [
        (number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.startswith("#")
    ]
    try:
        return list(_split_cells(path, lines))
    except csv.Error as error:
        raise InputError(
            f"{path} cannot be read as a label file ({error}): expected lines of `file,label`"
        ) from error


def _split_cells(path: str, lines: Sequence[tuple[int, str]]) -> Iterator[tuple[int, list[str]]]:
    is_csv = path.lower().endswith(".csv")
    for number, line in lines:
        if is_csv or ("\t" not in line and "," in line):
            delimiter = next((mark for mark in ",;\t" if mark in line), ",")
            cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
        elif "\t" in line:
            cells = line.split("\t")
        else:
            words = line.split()
            # A name of a file may have spaces.
            cells = words if len(words) < 4 and "." in words[0] else line.rsplit(None, 1)
        yield number, [cell.strip() for cell in cells]


def _find_columns(path: str, first: Sequence[str]) -> tuple[int, int, int | None, bool]:
    """Finds the columns of file, label and split, and whether the first line names them."""
    names = [cell.lower() for cell in first]

    def find(columns: Sequence[str]) -> int | None:
        return next((names.index(column) for column in columns if column in names), None)

    file_column, label_column, split_column = map(
        find, (FILE_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMNS)
    )
    if file_column is not None and label_column is not None:
        used = (file_column, label_column, split_column)
        ignored = [name for column, name in enumerate(first) if column not in used]
        if ignored:
            logger.info("ignored the columns of %s: %s", path, shorten_names(ignored))
        return file_column, label_column, split_column, True
    if len(first) > 1 and has_image_suffix(first[1]) and not has_image_suffix(first[0]):
        raise InputError(
            f"{path} has files in its second column, for example {first[1]!r}: expected "
            "`file,label`; move the column, or name the columns in a first line"
        )
    if file_column is not None or label_column is not None:
        missing, known = (
            ("label", LABEL_COLUMNS) if label_column is None else ("file", FILE_COLUMNS)
        )
        raise InputError(
            f"{path} has the columns {', '.join(map(repr, first))}: expected one for the "
            f"{missing}, for example {known[0]!r}; rename it"
        )
    return 0, 1, 2 if len(first) > 2 else None, False
