"""MatConvNet's .mat files, of MATLAB 5 to 7: elements that are a type, a size and so many bytes, arrays within arrays.

Read here, because scipy looks types up in a table without asking whether they are there: a damaged file ends the process.
"""

import itertools
import math
import mmap
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vgg_jax.errors import InputError
from vgg_jax.weights.tensor_file import MAX_BYTES, MAX_ENTRIES, Tensor, TensorFile

NUMBERS = {
    1: "i1",
    2: "u1",
    3: "<i2",
    4: "<u2",
    5: "<i4",
    6: "<u4",
    7: "<f4",
    9: "<f8",
    12: "<i8",
    13: "<u8",
    16: "u1",
    17: "<u2",
    18: "<u4",
}
ARRAY, COMPRESSED = 14, 15
CELL, STRUCT, TEXT = 1, 2, 4
# Of the classes of numbers. A double that is a whole number may be stored as one.
DTYPES = {
    6: "f8",
    7: "f4",
    8: "i1",
    9: "u1",
    10: "i2",
    11: "u2",
    12: "i4",
    13: "u4",
    14: "i8",
    15: "u8",
}
VARIABLES = ("layers", "meta", "normalization")
DEEPEST = 12  # cells and structures within each other
ARRAYS = 20_000  # in a file; a net of MatConvNet has some hundred, and 2,000 names of classes
GROWTH = (
    2**13
)  # bytes by which numbers may grow, from a whole number of one byte to a double, at the price of an array
SLACK = 2**20  # bytes that a file may unpack to, however small it is


def read(path: Path) -> TensorFile:
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if data[126:128] != b"IM":
        raise InputError(f"{path} is big-endian: expected MatConvNet's net, which is little-endian")
    found = {}
    budget = iter(range(ARRAYS))
    for part in _unpacked(data[128:], min(MAX_BYTES, 4 * len(data) + SLACK)):
        name, value = _array(part, 0, budget)
        found[name] = value
    tensors = {}
    notes = {}
    for place in (found, *found.get("meta", [])):
        for normalization in place.get("normalization", []):
            mean = np.asarray(normalization.get("averageImage", ()), np.float64)
            if mean.size:
                notes["mean_rgb"] = (
                    mean.reshape(-1, 3).mean(0) if mean.shape[-1] == 3 else mean.ravel()
                )
    for (layer,) in found["layers"]:
        if len(layer.get("weights", [])):
            filters, biases = layer["weights"][:2]
        elif len(layer.get("filters", [])):  # before MatConvNet 1.0-beta12
            filters, biases = layer["filters"], layer["biases"]
        else:
            continue
        name = layer["name"]
        for leaf, array in (("filters", filters), ("biases", biases.ravel())):
            if array.dtype.kind != "f":
                raise InputError(f"{path}: {name} has {array.dtype}: expected numbers")
            if leaf == "filters":
                array = array.reshape(
                    array.shape + (1,) * (4 - array.ndim)
                )  # MATLAB drops ones at the end
            tensors[f"{name}/{leaf}"] = Tensor(array.shape, partial(np.asarray, array))
    return TensorFile(tensors, notes)


def _unpacked(data: memoryview, most: int) -> Iterator[memoryview]:
    """The arrays of a file, of which `most` bytes may be unpacked: weights hardly compress."""
    left = most
    for kind, part in _elements(data):
        if kind == COMPRESSED:
            unpacker = zlib.decompressobj()
            part = memoryview(unpacker.decompress(part, max(1, left)))
            left -= len(part)
            if unpacker.unconsumed_tail:
                raise ValueError(f"it unpacks to more than {most:,} bytes")
            kind, part = _next(_elements(part))
        if kind != ARRAY:
            raise ValueError(f"an element of the type {kind} where an array belongs")
        yield part


def _elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The types and the bytes of elements that follow each other."""
    at = 0
    while at + 8 <= len(data):
        kind, size = (int.from_bytes(data[at + i : at + i + 4], "little") for i in (0, 4))
        if kind >> 16:  # a small element: its bytes lie in the tag
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
            if size > 4:
                raise ValueError(f"{size} bytes in the four of a small element")
        else:
            start = at + 8
            end = start + size + (0 if kind == COMPRESSED else -size % 8)
        if start + size > len(data):
            raise ValueError(f"{size:,} bytes are to come where {len(data) - start:,} are left")
        yield kind, data[start : start + size]
        at = end


def _next(elements: Iterator[tuple[int, memoryview]]) -> tuple[int, memoryview]:
    for element in elements:
        return element
    raise ValueError("an array is cut short")


def _array(data: memoryview, depth: int, budget: Iterator[int]) -> tuple[str, Any]:
    """An array's name, and its value: of cells a list, of structures a list of dicts, of text a str, of numbers an array, else None.

    `budget` gives a number for each array that may still come. Variables that are not `VARIABLES` are not looked into.
    """
    if depth > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} deep")
    _spend(budget, 1)
    parts = _elements(data)
    flags = _numbers(_next(parts))
    kind, is_complex = int(flags[0]) & 0xFF, int(flags[0]) & 0x800
    if kind not in (CELL, STRUCT, TEXT, *DTYPES):  # an object, a function: laid out in other ways
        return "", None
    sides, name = _numbers(_next(parts)), bytes(_next(parts)[1][:64]).decode("latin-1")
    if depth == 0 and name not in VARIABLES:
        return name, None
    if not 2 <= len(sides) <= 8 or min(sides) < 0:
        raise ValueError(f"an array of the sides {sides.tolist()[:9]}")
    count = math.prod(int(side) for side in sides)
    if kind in (CELL, STRUCT, TEXT) and count > MAX_ENTRIES:
        raise ValueError(f"{count:,} cells, structures or letters")
    if kind == CELL:
        return name, [_inside(parts, depth, budget) for _ in range(count)]
    if kind == STRUCT:
        length, packed = int(_numbers(_next(parts))[0]), bytes(_next(parts)[1])
        if not 0 < length <= 64 or not 0 < len(packed) <= 100 * length:
            raise ValueError(f"{len(packed)} bytes of names, each of {length}")
        fields = [
            packed[at : at + length].split(b"\0")[0].decode("latin-1")
            for at in range(0, len(packed), length)
        ]
        return name, [
            {field: _inside(parts, depth, budget) for field in fields} for _ in range(count)
        ]
    if kind == TEXT:
        codes = _numbers(_next(parts)) if count else np.zeros(0, "u1")
        if len(codes) > 4 * count:  # bytes of UTF-8
            raise ValueError(f"{len(codes):,} bytes of {count:,} letters")
        return name, "".join(map(chr, codes.tolist()))
    if is_complex:
        return name, None
    numbers = _numbers(_next(parts)) if count else np.zeros(0)
    if len(numbers) != count:
        raise ValueError(f"{len(numbers):,} numbers in an array of {count:,}")
    _spend(budget, max(0, np.dtype(DTYPES[kind]).itemsize * count - numbers.nbytes) // GROWTH)
    return name, numbers.astype(DTYPES[kind], copy=False).reshape(sides, order="F")


def _inside(parts: Iterator[tuple[int, memoryview]], depth: int, budget: Iterator[int]) -> Any:
    kind, part = _next(parts)
    if kind != ARRAY:
        raise ValueError(f"an element of the type {kind} where an array belongs")
    if not len(part):
        _spend(budget, 1)
        return np.zeros((0, 0))
    return _array(part, depth + 1, budget)[1]


def _spend(budget: Iterator[int], count: int) -> None:
    if sum(1 for _ in itertools.islice(budget, count)) < count:
        raise ValueError("it has more arrays than a VGG")


def _numbers(element: tuple[int, memoryview]) -> np.ndarray:
    kind, part = element
    if kind not in NUMBERS:
        raise ValueError(f"an element of the type {kind} where numbers belong")
    return np.frombuffer(part, NUMBERS[kind])
