"""Label files: texts and CSV files that name the class of each photo.

A line is `file,label` or `file,label,split`. Commas, tabs or spaces separate the columns. A first
line with names of columns is optional, and so are comments: lines that begin with "#" and name no
image.
"""

import csv
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vgg_jax.division import split_kind
from vgg_jax.errors import InputError, shorten_names
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

logger = logging.getLogger(__name__)


class Row(NamedTuple):
    """A line of a label file."""

    file: str
    label: str
    split: str | None
    number: int  # of the line, from 1


def read_rows(path: str) -> list[Row]:
    """Reads a label file.

    Args:
        path: Path of the file, in UTF-8.

    Returns:
        Its lines, without a line of column names, empty lines and comments.

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


def sort_labels(labels: Sequence[str]) -> tuple[str, ...]:
    """Sorts the distinct labels: as numbers if all are numbers, else as texts.

    Args:
        labels: The labels.

    Returns:
        Names of the classes.
    """
    distinct = set(labels)
    spellings: dict[str, str] = {}
    for label in sorted(distinct):
        other = spellings.setdefault(label.casefold(), label)
        if other != label:
            logger.warning(
                "the classes %r and %r differ only in capital letters: expected one spelling if "
                "they are the same",
                other,
                label,
            )
    key = int if all(label.isdecimal() for label in distinct) else None
    return tuple(sorted(sorted(distinct), key=key))  # type: ignore[type-var, arg-type]


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
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
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
            cells = _split_at_spaces(line.strip())
        cells = [cell.strip() for cell in cells]
        is_row = len(cells) > 1 and any(map(has_image_suffix, cells))
        if is_row or not line.startswith("#"):  # "#1.jpg,ants" is no comment
            yield number, cells


def _split_at_spaces(line: str) -> list[str]:
    """Splits a line into file, label and perhaps split. The file and the label may have spaces."""
    words = line.split()
    ends = [end for end, word in enumerate(words[:-1], 1) if has_image_suffix(word)]
    if len(words) < 3 or (not ends and "." not in words[0]):
        return line.rsplit(None, 1)
    rest = line.split(None, ends[-1] if ends else 1)[-1]
    file = line[: -len(rest)]
    label, *last = rest.rsplit(None, 1)
    return [file, label, *last] if last and split_kind(last[0]) else [file, rest]


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
        missing, columns = (
            ("label", LABEL_COLUMNS) if label_column is None else ("file", FILE_COLUMNS)
        )
        raise InputError(
            f"{path} has the columns {', '.join(map(repr, first))}: expected one for the "
            f"{missing}, for example {columns[0]!r}; rename it"
        )
    return 0, 1, 2 if len(first) > 2 else None, False
