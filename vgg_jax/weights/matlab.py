"""MatConvNet's .mat files."""

import math
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from vgg_jax.errors import InputError
from vgg_jax.weights.contents import LARGEST, Contents, Tensor

SLACK = 2**20  # bytes that a file may unpack to, however small it is


def read(path: Path) -> Contents:
    from scipy.io import loadmat

    _check(path)
    found = loadmat(path, variable_names=("layers", "meta", "normalization"))
    tensors = {}
    notes = {}
    for place in (found, found["meta"][0, 0] if "meta" in found else {}):
        names = place.dtype.names if isinstance(place, np.void) else place
        if "normalization" in (names or ()) and "averageImage" in place["normalization"].dtype.names:
            mean = np.asarray(place["normalization"][0, 0]["averageImage"], np.float64)
            notes["mean_rgb"] = mean.reshape(-1, 3).mean(0) if mean.shape[-1] == 3 else mean.ravel()
    for layer in found["layers"].ravel():
        layer = layer[0, 0]
        names = layer.dtype.names
        if "weights" in names and layer["weights"].size:
            filters, biases = layer["weights"].ravel()[:2]
        elif "filters" in names and layer["filters"].size:  # before MatConvNet 1.0-beta12
            filters, biases = layer["filters"], layer["biases"]
        else:
            continue
        name = str(layer["name"].item())
        for leaf, array in (("filters", np.asarray(filters)), ("biases", np.asarray(biases).ravel())):
            if array.dtype.kind != "f":
                raise InputError(f"{path}: {name} has {array.dtype}: expected numbers")
            if leaf == "filters":
                array = array.reshape(array.shape + (1,) * (4 - array.ndim))  # MATLAB drops ones at the end
            tensors[f"{name}/{leaf}"] = Tensor(array.shape, partial(np.asarray, array))
    return Contents(tensors, notes)


def _check(path: Path) -> None:
    """Raises InputError for what would exhaust scipy's stack or the memory: deep nesting, compression, arrays that are not there."""
    data = memoryview(path.read_bytes())
    if data[126:128] != b"IM":
        raise InputError(f"{path} is big-endian: expected MatConvNet's net, which is little-endian")
    waiting = [(data[128:], 0)]
    unpacked = 0
    while waiting:
        part, depth = waiting.pop()
        at = 0
        while at + 8 <= len(part):
            kind, size = (int.from_bytes(part[at + i : at + i + 4], "little") for i in (0, 4))
            if kind >> 16:  # a small element: its bytes lie in the tag
                at += 8
                continue
            inside = part[at + 8 : at + 8 + size]
            if len(inside) < size:
                raise InputError(f"{path} says that {size:,} bytes come where {len(inside):,} are left: expected it whole")
            if kind == 15:
                unpacker = zlib.decompressobj()
                limit = min(LARGEST, 4 * len(data) + SLACK) - unpacked  # weights hardly compress
                inside = memoryview(unpacker.decompress(inside, max(1, limit)))
                unpacked += len(inside)
                if unpacker.unconsumed_tail:
                    raise InputError(f"{path} unpacks to more than {unpacked:,} bytes: expected a VGG's weights")
            if kind == 14 and _elements(inside) > len(inside):
                raise InputError(
                    f"{path} says that an array in {len(inside):,} bytes has {_elements(inside):,} elements: expected them there"
                )
            if kind in (14, 15):
                if depth > 12:
                    raise InputError(f"{path} is nested more than 12 deep: expected MatConvNet's net")
                waiting.append((inside, depth + 1))
            at += 8 + size + (0 if kind == 15 else -size % 8)


def _elements(array: memoryview) -> int:
    """How many elements an array says that it has: its second part, behind 16 bytes of flags, holds its sides."""
    size = int.from_bytes(array[20:24], "little")
    sides = array[24 : 24 + min(size, len(array) - 24) // 4 * 4].cast("i") if len(array) > 24 else ()
    return math.prod(abs(side) for side in sides)
