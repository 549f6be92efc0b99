"""Reads MatConvNet's .mat files (MATLAB 5 to 7).

A file is a sequence of elements. An element is a type, a size, and that many bytes. An array is an
element that consists of elements.

scipy is not used: it indexes a type table without a bounds check, so a damaged file can crash the
process.
"""

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

Element = tuple[int, memoryview]  # type and content

# Element types.
NUMBER_TYPES = {
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
# Classes of arrays. An array may be stored in a smaller type: a double that is whole, as a byte.
CELL, STRUCT, TEXT = 1, 2, 4
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
MAX_DEPTH = 12  # cells and structures within each other
MAX_ARRAYS = 20_000  # in a file; MatConvNet's nets have some hundred, and 2,000 class names
BYTES_PER_ARRAY = 2**13  # bytes by which reading grows an array; they count as one more
UNPACK_SLACK = 2**20  # bytes that even the smallest file may unpack to


class ArrayBudget:
    """Number of arrays that a file may still have; it bounds the memory and the time."""

    def __init__(self, arrays: int) -> None:
        self.limit = self.left = arrays

    def spend(self, arrays: int) -> None:
        """Counts arrays. Raises ValueError if more are spent than are left."""
        if arrays > self.left:
            raise ValueError(f"too many arrays: expected at most {self.limit:,}")
        self.left -= arrays


def read(path: Path) -> TensorFile:
    """Reads the layers of a net, and its mean colour.

    Args:
        path: A .mat file.

    Returns:
        Tensors named "conv1_1/filters" and "conv1_1/biases"; metadata with "mean_rgb" if the
        file has an average image.

    Raises:
        InputError: The file is big-endian, or weights are not floating-point.
        ValueError: The file is damaged or too large; other errors if it is no net.
    """
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if data[126:128] != b"IM":
        raise InputError(f"{path} is big-endian: expected MatConvNet's net, which is little-endian")
    budget = ArrayBudget(MAX_ARRAYS)
    max_bytes = min(MAX_BYTES, 4 * len(data) + UNPACK_SLACK)
    variables = dict(
        parse_array(content, 0, budget) for content in iter_arrays(data[128:], max_bytes)
    )
    metadata = {}
    for struct in (variables, *variables.get("meta", [])):
        for normalization in struct.get("normalization", []):
            mean = np.asarray(normalization.get("averageImage", ()), np.float64)
            if mean.size:
                is_image = mean.shape[-1] == 3
                metadata["mean_rgb"] = mean.reshape(-1, 3).mean(0) if is_image else mean.ravel()
    if "layers" not in variables:
        raise InputError(
            f"{path} has no layers of MatConvNet: expected the weights of a VGG; it has "
            f"{', '.join(map(str, variables)) or 'no variables'}"
        )
    tensors = {}
    for (layer,) in variables["layers"]:
        if len(layer.get("weights", [])):
            filters, biases = layer["weights"][:2]
        elif len(layer.get("filters", [])):  # before MatConvNet 1.0-beta12
            filters, biases = layer["filters"], layer["biases"]
        else:
            continue
        name, biases = layer["name"], biases.ravel()
        for array in (filters, biases):
            if array.dtype.kind != "f":
                raise InputError(
                    f"{path}: {name} has the dtype {array.dtype}: expected floating point"
                )
        # MATLAB drops trailing axes of size 1.
        filters = filters.reshape(filters.shape + (1,) * (4 - filters.ndim))
        tensors[f"{name}/filters"] = Tensor(filters.shape, partial(np.asarray, filters))
        tensors[f"{name}/biases"] = Tensor(biases.shape, partial(np.asarray, biases))
    return TensorFile(tensors, metadata)


def iter_arrays(data: memoryview, max_bytes: int) -> Iterator[memoryview]:
    """Yields the content of each array of a file, unpacked.

    Args:
        data: The file after its header.
        max_bytes: Bytes that all arrays may unpack to. Weights hardly compress.

    Yields:
        The content of one array, for `parse_array`.

    Raises:
        ValueError: Arrays unpack to more, or the file is damaged.
    """
    left = max_bytes
    for element_type, content in _elements(data):
        if element_type == COMPRESSED:
            decompressor = zlib.decompressobj()
            content = memoryview(decompressor.decompress(content, max(1, left)))
            left -= len(content)
            if decompressor.unconsumed_tail:
                raise ValueError(f"it unpacks to more than {max_bytes:,} bytes")
            element_type, content = _next(_elements(content))
        _require_array(element_type)
        yield content


def parse_array(data: memoryview, depth: int, budget: ArrayBudget) -> tuple[str, Any]:
    """Parses an array, and the arrays within it.

    Args:
        data: The content of the array.
        depth: Number of arrays around it. At depth 0, only `VARIABLES` are parsed.
        budget: Arrays that the file may still have.

    Returns:
        The name and the value: a list for cells, a list of dicts for structures, a str for
        text, a NumPy array for numeric arrays, None for anything else.

    Raises:
        ValueError: The array is damaged or too large.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    budget.spend(1)
    elements = _elements(data)
    flags = int(_numbers(_next(elements))[0])
    array_class, is_complex = flags & 0xFF, bool(flags & 0x800)
    if array_class not in (CELL, STRUCT, TEXT, *DTYPES):  # objects and functions differ from here
        return "", None
    shape = _numbers(_next(elements))
    name = bytes(_next(elements)[1][:64]).decode("latin-1")
    if depth == 0 and name not in VARIABLES:
        return name, None
    if not 2 <= len(shape) <= 8 or min(shape) < 0:
        raise ValueError(f"array shape {shape.tolist()[:9]}: expected 2 to 8 non-negative sides")
    count = math.prod(int(side) for side in shape)
    if array_class in (CELL, STRUCT, TEXT) and count > MAX_ENTRIES:
        raise ValueError(
            f"{count:,} cells, structures or characters: expected at most {MAX_ENTRIES:,}"
        )
    if array_class == CELL:
        return name, [_parse_inner(elements, depth, budget) for _ in range(count)]
    if array_class == STRUCT:
        return name, _parse_structs(elements, count, depth, budget)
    if array_class == TEXT:
        return name, _parse_text(elements, count)
    if is_complex:
        return name, None
    numbers = _parse_numbers(elements, count, DTYPES[array_class], budget)
    return name, numbers.reshape(shape, order="F")


def _parse_structs(
    elements: Iterator[Element], count: int, depth: int, budget: ArrayBudget
) -> list[dict[str, Any]]:
    length = int(_numbers(_next(elements))[0])
    packed = bytes(_next(elements)[1])
    if not 0 < length <= 64 or not 0 < len(packed) <= 100 * length:
        raise ValueError(f"{len(packed)} bytes of field names, {length} per name")
    names = [
        packed[start : start + length].split(b"\0")[0].decode("latin-1")
        for start in range(0, len(packed), length)
    ]
    return [{name: _parse_inner(elements, depth, budget) for name in names} for _ in range(count)]


def _parse_text(elements: Iterator[Element], count: int) -> str:
    codes = _numbers(_next(elements)) if count else np.zeros(0, "u1")
    if len(codes) > 4 * count:  # UTF-8 has at most 4 bytes per character
        raise ValueError(f"{len(codes):,} bytes of text for {count:,} characters")
    return "".join(map(chr, codes.tolist()))


def _parse_numbers(
    elements: Iterator[Element], count: int, dtype: str, budget: ArrayBudget
) -> np.ndarray:
    numbers = _numbers(_next(elements)) if count else np.zeros(0)
    if len(numbers) != count:
        raise ValueError(f"{len(numbers):,} values in an array of {count:,}")
    growth = np.dtype(dtype).itemsize * count - numbers.nbytes
    budget.spend(max(0, growth) // BYTES_PER_ARRAY)
    return numbers.astype(dtype, copy=False)


def _parse_inner(elements: Iterator[Element], depth: int, budget: ArrayBudget) -> Any:
    """Parses the array in a cell or a field of a structure."""
    element_type, content = _next(elements)
    _require_array(element_type)
    if not len(content):
        budget.spend(1)
        return np.zeros((0, 0))
    return parse_array(content, depth + 1, budget)[1]


def _require_array(element_type: int) -> None:
    if element_type != ARRAY:
        raise ValueError(f"element type {element_type}: expected an array ({ARRAY})")


def _elements(data: memoryview) -> Iterator[Element]:
    """Yields the elements that follow each other in `data`."""
    position = 0
    while position + 8 <= len(data):
        tag = data[position : position + 8]
        element_type, size = (int.from_bytes(tag[i : i + 4], "little") for i in (0, 4))
        if element_type >> 16:  # a small element: its content is in the tag
            element_type, size = element_type & 0xFFFF, element_type >> 16
            start, end = position + 4, position + 8
            if size > 4:
                raise ValueError(f"small element of {size} bytes: expected at most 4")
        else:
            start = position + 8
            end = start + size + (0 if element_type == COMPRESSED else -size % 8)
        if start + size > len(data):
            raise ValueError(f"truncated: element of {size:,} bytes, {len(data) - start:,} left")
        yield element_type, data[start : start + size]
        position = end


def _next(elements: Iterator[Element]) -> Element:
    for element in elements:
        return element
    raise ValueError("truncated array")


def _numbers(element: Element) -> np.ndarray:
    element_type, content = element
    if element_type not in NUMBER_TYPES:
        raise ValueError(f"element type {element_type}: expected numbers")
    return np.frombuffer(content, NUMBER_TYPES[element_type])
