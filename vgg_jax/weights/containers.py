"""Weight files as names with shapes. Where the format allows it, the numbers are read once the shapes are known to be a VGG's.

Nothing here runs code from a file: no pickle but by `torch.load(weights_only=True)`, no external storage of HDF5, no path out of a file.
"""

import contextlib
import json
import math
import mmap
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vgg_jax.errors import InputError


class Tensor(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Contents(NamedTuple):
    """What a file holds: its tensors by name, and what it says of them."""

    tensors: dict[str, Tensor]
    notes: dict[str, Any]


def open_file(path: Path) -> Contents:
    """Recognises the kind by the first bytes. Raises InputError for a file that is not there, of no known kind, or damaged."""
    try:
        with path.open("rb") as file:
            head = file.read(128)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): expected a file of weights, or a run's folder") from error
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        kind, read = "HDF5", _hdf5
    elif head.startswith(b"PK\x03\x04") or head[:1] == b"\x80":
        kind, read = "PyTorch", _pytorch
    elif head[:6] == b"MATLAB" and head[124:128] in (b"\x00\x01IM", b"\x01\x00MI"):
        kind, read = "MATLAB", _matlab
    elif head[8:9] == b"{" and len(head) > 9:
        kind, read = "safetensors", _safetensors
    elif path.suffix == ".caffemodel":
        kind, read = "Caffe", _caffe
    else:
        raise InputError(
            f"{path} is of no known kind: expected .safetensors, .pth (PyTorch), .h5 (Keras, flaxmodels), .caffemodel, or .mat (MatConvNet)"
        )
    try:
        with damage_named(path, kind):
            return read(path)
    except ImportError as error:
        raise InputError(f"reading {path} needs {error.name}: {_INSTALL[kind]}") from error


@contextlib.contextmanager
def damage_named(path: Path, kind: str = "weights") -> Iterator[None]:
    """Turns what a library says of a damaged file into InputError: each has its own ways to say it."""
    try:
        yield
    except (InputError, ImportError):
        raise
    except MemoryError as error:
        raise InputError(f"{path} says that it is larger than this machine's memory: expected a VGG's weights") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{path} cannot be read as a {kind} file ({reason}): expected it whole, as it was written") from error


LARGEST = 2**31  # bytes; E with ImageNet's classes has 575 MB
MANY = 2000  # names, groups or fields: more than any VGG has

_INSTALL = {
    "HDF5": "pip install 'vgg-jax[weights]'",
    "MATLAB": "pip install 'vgg-jax[weights]'",
    "PyTorch": "pip install torch, or convert it where torch is: "
    "safetensors.torch.save_file(torch.load('x.pth', weights_only=True), 'x.safetensors')",
    "safetensors": "pip install safetensors",
}


def _safetensors(path: Path) -> Contents:
    from safetensors import safe_open

    file = safe_open(path, framework="numpy")

    def read(name: str) -> np.ndarray:
        if file.get_slice(name).get_dtype() == "BF16":  # NumPy has no such type, jax's arrays do
            return np.asarray(safe_open(path, framework="flax").get_tensor(name))
        return file.get_tensor(name)

    names = list(file.keys())
    tensors = {name: Tensor(tuple(file.get_slice(name).get_shape()), partial(read, name)) for name in names}
    notes = json.loads((file.metadata() or {}).get("vgg_jax", "{}"))
    if not isinstance(notes, dict):
        raise InputError(f"{path}: its metadata are {type(notes).__name__}: expected an object")
    return Contents(tensors, notes)


def _pytorch(path: Path) -> Contents:
    import torch

    found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise InputError(f"{path} holds {type(found).__name__}: expected a state_dict, as torch.save(model.state_dict(), …) writes")
    tensors = {}
    for name, value in found.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise InputError(f"{path}: {name} is no plain tensor: expected a state_dict of arrays")
        # A view may claim to be larger than what is stored.
        if value.numel() and value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise InputError(f"{path}: {name} of the shape {tuple(value.shape)} is larger than what is stored of it")
        tensors[str(name).removeprefix("module.")] = Tensor(tuple(value.shape), partial(_of_torch, value))
    return Contents(tensors, {})


def _of_torch(value: Any) -> np.ndarray:
    return value.detach().float().numpy()


def _hdf5(path: Path) -> Contents:
    import h5py

    tensors: dict[str, Tensor] = {}

    seen = 0

    def walk(group: Any, prefix: str, depth: int) -> None:
        nonlocal seen
        for name in group:
            seen += 1
            if depth > 8 or seen > MANY:
                raise InputError(f"{path} has more groups than a VGG: expected the weights of one net")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise InputError(f"{path}: {prefix}{name} is a link: expected the weights in the file itself")
            item = group[name]
            if isinstance(item, h5py.Group):
                walk(item, f"{prefix}{name}/", depth + 1)
            elif isinstance(item, h5py.Dataset):
                if item.external or item.is_virtual:
                    raise InputError(f"{path}: {prefix}{name} is stored in another file: expected the weights in the file itself")
                if item.dtype.kind == "f":
                    tensors[_keras_name(prefix + name)] = Tensor(item.shape, partial(reread, prefix + name))

    def reread(name: str) -> np.ndarray:
        with h5py.File(path, "r") as file:
            return file[name][()]

    with h5py.File(path, "r") as file:
        walk(file, "", 0)
    return Contents(tensors, {})


def _keras_name(path: str) -> str:
    """`block1_conv1/0` for a kernel and `…/1` for a bias, however Keras before version 3 wrote it; other names as they are."""
    found = re.fullmatch(r"(?:model_weights/)?(block\d_conv\d|fc[12]|predictions)/(?:\w+/)*(?:\w+_)?(W|W_1|kernel|b|b_1|bias)(?::0)?", path)
    return path if found is None else f"{found[1]}/{0 if found[2] in ('W', 'W_1', 'kernel') else 1}"


def _matlab(path: Path) -> Contents:
    from scipy.io import loadmat

    _check_matlab(path)
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


def _check_matlab(path: Path) -> None:
    """Raises InputError for nesting that would exhaust scipy's stack, and for more than a VGG's numbers behind a compression."""
    data = memoryview(path.read_bytes())[128:]
    waiting = [(data, 0)]
    while waiting:
        part, depth = waiting.pop()
        at = 0
        while at + 8 <= len(part):
            kind, size = (int.from_bytes(part[at + i : at + i + 4], "little") for i in (0, 4))
            if kind >> 16:  # a small element: its bytes lie in the tag
                at += 8
                continue
            inside = part[at + 8 : at + 8 + size]
            if kind == 15:
                unpacker = zlib.decompressobj()
                inside = memoryview(unpacker.decompress(inside, LARGEST))
                if unpacker.unconsumed_tail:
                    raise InputError(f"{path} unpacks to more than {LARGEST:,} bytes: expected a VGG's weights")
            if kind in (14, 15):
                if depth > 12:
                    raise InputError(f"{path} is nested more than 12 deep: expected MatConvNet's net")
                waiting.append((inside, depth + 1))
            at += 8 + size + (0 if kind == 15 else -size % 8)


def _caffe(path: Path) -> Contents:
    """NetParameter, both of its encodings: `layers` (V1LayerParameter, field 2) and `layer` (LayerParameter, field 100)."""
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    tensors = {}
    for number, message in _fields(data):
        if number not in (2, 100) or isinstance(message, int):
            continue
        name_field, blobs_field = {2: (4, 6), 100: (1, 7)}[number]
        layer = list(_fields(message))
        names = [bytes(value).decode() for field, value in layer if field == name_field and not isinstance(value, int)]
        blobs = [value for field, value in layer if field == blobs_field and not isinstance(value, int)]
        for i, blob in enumerate(blobs):
            tensors[f"{names[-1]}/{i}"] = _blob(blob, f"{path}: {names[-1]}")
    return Contents(tensors, {})


def _blob(data: memoryview, name: str) -> Tensor:
    """BlobProto: num, channels, height and width, or shape; packed float or double data."""
    legacy: dict[int, int] = {}
    shape: list[int] | None = None
    parts: list[tuple[memoryview, str]] = []
    for field, value in _fields(data):
        if field <= 4 and isinstance(value, int):
            legacy[field] = value
        elif field == 7 and not isinstance(value, int):
            shape = [number for _, dims in _fields(value) for number in ([dims] if isinstance(dims, int) else _varints(dims))][:9]
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
        raise InputError(f"{name} has the shape {tuple(shape)} and {stored} numbers: expected as many as the shape says")
    return Tensor(tuple(shape), lambda: np.concatenate([np.frombuffer(part, kind) for part, kind in parts]).reshape(shape))


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a protocol buffer message: numbers, and strings, messages and packed arrays as views of the file."""
    at = count = 0
    while at < len(data):
        count += 1
        if count > MANY:
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
