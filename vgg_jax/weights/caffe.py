"""Caffe's .caffemodel files: protocol buffers, read field by field."""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vgg_jax.errors import InputError
from vgg_jax.weights.tensor_file import MAX_ENTRIES, Tensor, TensorFile


def read(path: Path) -> TensorFile:
    """NetParameter, both of its encodings: `layers` (V1LayerParameter, field 2) and `layer` (LayerParameter, field 100)."""
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    tensors = {}
    for number, message in _fields(data):
        if number not in (2, 100) or isinstance(message, int):
            continue
        name_field, blobs_field = {2: (4, 6), 100: (1, 7)}[number]
        layer = list(_fields(message))
        names = [
            bytes(value).decode()
            for field, value in layer
            if field == name_field and not isinstance(value, int)
        ]
        blobs = [
            value for field, value in layer if field == blobs_field and not isinstance(value, int)
        ]
        for i, blob in enumerate(blobs):
            tensors[f"{names[-1]}/{i}"] = _blob(blob, f"{path}: {names[-1]}")
    return TensorFile(tensors, {})


def _blob(data: memoryview, name: str) -> Tensor:
    """BlobProto: num, channels, height and width, or shape; packed float or double data."""
    legacy: dict[int, int] = {}
    shape: list[int] | None = None
    parts: list[tuple[memoryview, str]] = []
    for field, value in _fields(data):
        if field <= 4 and isinstance(value, int):
            legacy[field] = value
        elif field == 7 and not isinstance(value, int):
            shape = [
                number
                for _, dims in _fields(value)
                for number in ([dims] if isinstance(dims, int) else _varints(dims))
            ][:9]
        elif field in (5, 8) and not isinstance(value, int):
            parts.append((value, {5: "<f4", 8: "<f8"}[field]))
    if shape is None:
        shape = [legacy.get(field, 1) for field in (1, 2, 3, 4)]
        while len(shape) > 1 and shape[0] == 1:  # a matrix and a vector lie in the last axes
            shape = shape[1:]
    if len(shape) > 8:
        raise InputError(f"{name} has {len(shape)} or more axes: expected at most four")
    stored = sum(len(part) // int(kind[2]) for part, kind in parts)
    if stored != math.prod(shape):
        raise InputError(
            f"{name} has the shape {tuple(shape)} and {stored} numbers: expected as many as the shape says"
        )
    return Tensor(
        tuple(shape),
        lambda: np.concatenate([np.frombuffer(part, kind) for part, kind in parts]).reshape(shape),
    )


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protocol buffer message: numbers, and strings, messages and packed arrays as views of the file."""
    at = count = 0
    while at < len(data):
        count += 1
        if count > MAX_ENTRIES:
            raise ValueError("more fields than a VGG has")
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(data, at)
        elif kind in (1, 5):
            length = {1: 8, 5: 4}[kind]
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if length > len(data) - at:
            raise ValueError(f"a field of {length} bytes at byte {at} of {len(data)}")
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        if at >= len(data):
            raise ValueError("cut short")
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError(f"a number without end at byte {at}")


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < min(len(data), 100):
        value, at = _varint(data, at)
        yield value
