"""Reads Caffe's .caffemodel files: protocol buffers, field by field.

The field numbers are those of caffe.proto. Tensors stay in Caffe's order of axes and in BGR;
`vgg_jax.weights.layouts` converts them.
"""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vgg_jax.errors import InputError
from vgg_jax.weights.tensor_file import MAX_ENTRIES, Tensor, TensorFile

# Field of NetParameter: (field of the layer's name, field of its blobs).
_LAYER_FIELDS = {2: (4, 6), 100: (1, 7)}  # `layers` (V1LayerParameter), `layer` (LayerParameter)
_MAX_AXES = 8
# Wire types of protocol buffers.
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


def read(path: Path) -> TensorFile:
    """Reads a NetParameter, in either encoding of its layers.

    Args:
        path: A .caffemodel file.

    Returns:
        Tensors named "conv1_1/0" (kernel) and "conv1_1/1" (bias); no metadata.

    Raises:
        InputError: A blob has another size than its shape says, or too many axes.
        ValueError: The file is damaged.
    """
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    tensors = {}
    for number, message in _fields(data):
        if number not in _LAYER_FIELDS or isinstance(message, int):
            continue
        name_field, blobs_field = _LAYER_FIELDS[number]
        layer = [(field, value) for field, value in _fields(message) if not isinstance(value, int)]
        names = [bytes(value).decode() for field, value in layer if field == name_field]
        blobs = [value for field, value in layer if field == blobs_field]
        for i, blob in enumerate(blobs):
            tensors[f"{names[-1]}/{i}"] = _parse_blob(blob, f"{path}: {names[-1]}")
    return TensorFile(tensors, {})


def _parse_blob(data: memoryview, name: str) -> Tensor:
    """Parses a BlobProto: num, channels, height, width, or shape; packed float or double data."""
    legacy_shape: dict[int, int] = {}
    shape: list[int] | None = None
    chunks: list[tuple[memoryview, str]] = []
    for field, value in _fields(data):
        if field <= 4 and isinstance(value, int):
            legacy_shape[field] = value
        elif field == 7 and not isinstance(value, int):
            shape = _parse_shape(value)
        elif field in (5, 8) and not isinstance(value, int):
            chunks.append((value, "<f4" if field == 5 else "<f8"))
    if shape is None:
        shape = [legacy_shape.get(field, 1) for field in (1, 2, 3, 4)]
        while len(shape) > 1 and shape[0] == 1:  # matrices and vectors use the last axes
            shape = shape[1:]
    if len(shape) > _MAX_AXES:
        raise InputError(f"{name} has {len(shape)} or more axes: expected at most {_MAX_AXES}")
    size = sum(len(chunk) // np.dtype(dtype).itemsize for chunk, dtype in chunks)
    if size != math.prod(shape):
        raise InputError(
            f"{name} has the shape {tuple(shape)} and {size} values: "
            f"expected {math.prod(shape)} values"
        )

    def read_blob() -> np.ndarray:
        return np.concatenate([np.frombuffer(*chunk) for chunk in chunks]).reshape(shape)

    return Tensor(tuple(shape), read_blob)


def _parse_shape(data: memoryview) -> list[int]:
    """Parses a BlobShape, up to one axis more than `_MAX_AXES`."""
    shape: list[int] = []
    for _, sizes in _fields(data):
        shape += [sizes] if isinstance(sizes, int) else _varints(sizes)
    return shape[: _MAX_AXES + 1]


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yields the fields of a message, each as (number, value).

    Strings, messages and packed arrays are views of the file.
    """
    position = count = 0
    while position < len(data):
        count += 1
        if count > MAX_ENTRIES:
            raise ValueError(f"more than {MAX_ENTRIES} fields")
        key, position = _varint(data, position)
        wire_type = key & 7
        if wire_type == _VARINT:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire_type == _LENGTH_DELIMITED:
            length, position = _varint(data, position)
        elif wire_type in (_FIXED64, _FIXED32):
            length = 8 if wire_type == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if length > len(data) - position:
            raise ValueError(f"a field of {length} bytes at byte {position} of {len(data)}")
        yield key >> 3, data[position : position + length]
        position += length


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """Returns a number and the position after it."""
    value = shift = 0
    start = position
    while shift < 70:
        if position >= len(data):
            raise ValueError(f"truncated varint at byte {start}")
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise ValueError(f"varint longer than 10 bytes at byte {start}")


def _varints(data: memoryview) -> list[int]:
    """Parses packed numbers in the first 100 bytes, which are more than a shape has."""
    values, position = [], 0
    while position < min(len(data), 100):
        value, position = _varint(data, position)
        values.append(value)
    return values
