"""Opens weight files of any format as names with shapes.

Most formats let us read the values later, once the shapes are known to be those of a VGG.

No code from a file runs: pickles go through `torch.load(weights_only=True)` of releases without
known holes in it. HDF5 links and external storage are refused.
"""

import argparse
import contextlib
import io
import json
import logging
import math
import mmap
import pickle
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from vgg_jax.errors import InputError, install_hint, single_line
from vgg_jax.weights import caffe, matconvnet
from vgg_jax.weights.file_kinds import (
    HEAD_SIZE,
    describe_archive,
    describe_file,
    describe_shard,
)
from vgg_jax.weights.keras_names import BACKBONE, is_head, keras_names
from vgg_jax.weights.state_dict import CHECKPOINT_KEYS, Names, find_state_dict, plain_names
from vgg_jax.weights.tensor_file import (
    MAX_BYTES,
    MAX_CONFIG_BYTES,
    MAX_ENTRIES,
    Tensor,
    TensorFile,
)

logger = logging.getLogger(__name__)

SAFE_TORCH = (2, 10)  # older releases have CVE-2025-32434 or CVE-2026-24747
_MAX_HDF5_DEPTH = 8
_EXPECTED = (
    "a .safetensors, .pth (PyTorch), .h5 or .keras (Keras, flaxmodels), .caffemodel or .mat "
    "(MatConvNet) file"
)
_KERAS_WEIGHTS = "model.weights.h5"  # in a .keras file
# Values that training scripts save beside the weights: an accuracy, a random state, a path, a time.
_SKIPPED_VALUES = (
    *(f"numpy.{name}" for name in ("dtype", "ndarray", "bool_")),
    *sorted({f"numpy.{scalar.__name__}" for scalar in np.sctypeDict.values()}),
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")  # of NumPy 1 and 2
        for name in ("scalar", "_reconstruct")
    ),
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")  # the second is Python 3.13's
        for name in ("PosixPath", "WindowsPath")
    ),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    # What a defaultdict makes.
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "int", "list", "str", "tuple")),
)


class _Placeholder:
    """Stands for a value of `_SKIPPED_VALUES`, so that a file calls no code of its class."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _empty_dict(*factory: Any) -> dict[Any, Any]:
    """Stands for `collections.defaultdict`. PyTorch adds the items."""
    return {}


def open_file(path: Path) -> TensorFile:
    """Opens a weight file; its first bytes decide the format.

    Args:
        path: A file on this machine.

    Returns:
        The tensors and the metadata of the file.

    Raises:
        InputError: The file does not exist, has an unknown format, or is damaged.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_SIZE)
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{path} cannot be read ({reason}): expected a file of weights, or a run's folder"
        ) from error
    problem = describe_shard(path)
    if problem:
        raise InputError(f"{path} {problem}")
    file_format = _detect_format(path, head)
    try:
        with reraise_damaged(path, file_format):
            content = _READERS[file_format](path)
            content = content._replace(num_bytes=path.stat().st_size)
            if file_format == "HDF5" and is_head(content.tensors):
                content = _add_backbone(path, content)
    except ImportError as error:
        raise InputError(f"reading {path} needs {error.name}: {_INSTALL[file_format]}") from error
    return _unwrap(path, content, file_format) if file_format in _PLAIN_NAMES else content


def _unwrap(path: Path, content: TensorFile, file_format: str) -> TensorFile:
    """Gives the tensors of a net inside another model their plain names."""
    try:
        names = _PLAIN_NAMES[file_format]({n: t.shape for n, t in content.tensors.items()})
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if names.others:
        others = single_line(", ".join(names.others), max_length=None)
        logger.warning(f"{path}: the net is under {names.prefix!r}; left out: {others}")
    tensors = {
        plain: _to_matrix(content.tensors[name])
        if re.fullmatch(r"layers/dense(_\d+)?/vars/0", plain)
        else content.tensors[name]
        for name, plain in names.plain.items()
    }
    return content._replace(tensors=tensors, note=names.note)


def _to_matrix(tensor: Tensor) -> Tensor:
    """Joins the window and the inputs of a convolution that is a fully connected layer of VGG."""
    if len(tensor.shape) != 4:
        return tensor
    shape = (math.prod(tensor.shape[:3]), tensor.shape[3])
    return Tensor(shape, lambda: tensor.read().reshape(shape))


def _detect_format(path: Path, head: bytes) -> str:
    """Returns a key of `_READERS`. An InputError says what a file of no such format is."""
    # The length of the header, below 2**32, and a JSON object. The length's low byte may be a
    # pickle's 0x80; in all other formats bytes 4 to 7 are not 0, or byte 8 is no brace.
    if head[4:9] == b"\0\0\0\0{" and len(head) > 9:
        return "safetensors"
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "HDF5"
    if head[:6] == b"MATLAB" and head[124:128] in (b"\x00\x01IM", b"\x01\x00MI"):
        return "MATLAB"
    if head.startswith(b"PK\x03\x04"):
        return _detect_zip_format(path)
    problem = describe_file(path, head)
    if not problem and head[:1] == b"\x80":
        return "PyTorch"
    if not problem and path.suffix == ".caffemodel":
        return "Caffe"
    raise _unreadable(path, problem or "is of an unknown format")


def _detect_zip_format(path: Path) -> str:
    """Returns "Keras" for a .keras file, else "PyTorch"."""
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except (
        Exception
    ):  # a damaged archive raises errors of many types; its reader says what is wrong
        return "Keras" if path.suffix == ".keras" else "PyTorch"
    if _KERAS_WEIGHTS in names:
        return "Keras"
    problem = describe_archive(path, names)
    if problem:
        raise _unreadable(path, problem)
    return "PyTorch"


def _unreadable(path: Path, problem: str) -> InputError:
    if ": expected" in problem:
        return InputError(f"{path} {problem}")
    problem, mark, remedy = problem.partition("; ")
    expected = "a file of weights" if remedy else _EXPECTED
    return InputError(f"{path} {problem}: expected {expected}{mark}{remedy}")


@contextlib.contextmanager
def reraise_damaged(path: Path, file_format: str = "weights") -> Iterator[None]:
    """Turns the errors of a reader into an InputError that names the file.

    Args:
        path: The file that is read in the block.
        file_format: Name of the format for the message.

    Raises:
        InputError: Reading failed. Errors of a missing library pass as they are.
    """
    try:
        yield
    except (InputError, ImportError):
        raise
    except MemoryError as error:
        raise InputError(
            f"{path} claims more data than fits into memory: expected a VGG's weights"
        ) from error
    except Exception as error:  # each library has errors of its own for a damaged file
        raise InputError(
            f"{path} cannot be read as a {file_format} file "
            f"({type(error).__name__}: {single_line(error)}): expected a complete, unmodified file"
        ) from error


def unsupported_dtype(path: Path, name: str, dtype: Any) -> InputError:
    """Names a tensor of integers or small floats, which mean nothing without their scale.

    Args:
        path: The file.
        name: Name of the tensor.
        dtype: Its type.

    Returns:
        The error to raise.
    """
    return InputError(
        f"{path}: {name} is {dtype}: expected float16, bfloat16, float32 or float64; convert a "
        "quantised net with the library that wrote it, with its scales"
    )


_INSTALL = {
    "HDF5": install_hint("weights"),
    "Keras": install_hint("weights"),
    "PyTorch": "pip install torch, or convert it on a machine with torch: "
    "safetensors.torch.save_file(torch.load('x.pth', weights_only=True), 'x.safetensors')",
    "safetensors": "pip install safetensors",
}


def _read_safetensors(path: Path) -> TensorFile:
    from safetensors import safe_open

    file = safe_open(path, framework="numpy")  # checks the header
    content = np.memmap(path, np.uint8, "r")
    data_start = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:data_start].tobytes())

    def read(name: str) -> np.ndarray:
        dtype = file.get_slice(name).get_dtype()
        if dtype == "F32":
            start, end = (data_start + offset for offset in header[name]["data_offsets"])
            return content[start:end].view("<f4").reshape(header[name]["shape"])
        if re.match(r"F\d(_|$)", dtype):
            raise unsupported_dtype(path, name, dtype)
        if dtype == "BF16":  # NumPy has no such type, JAX has
            return np.asarray(safe_open(path, framework="flax").get_tensor(name))
        return file.get_tensor(name)

    names = list(file.keys())
    tensors = {
        name: Tensor(tuple(file.get_slice(name).get_shape()), partial(read, name)) for name in names
    }
    metadata = json.loads((file.metadata() or {}).get("vgg_jax", "{}"))
    if not isinstance(metadata, dict):
        raise InputError(
            f"{path} has metadata of the type {type(metadata).__name__}: expected an object"
        )
    return TensorFile(tensors, metadata)


def _read_pytorch(path: Path) -> TensorFile:
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH:
        raise InputError(
            f"reading {path} needs torch {'.'.join(map(str, SAFE_TORCH))} or newer: "
            f"torch {torch.__version__} is installed, and a file can make it run code; "
            "pip install -U torch"
        )
    is_zip = zipfile.is_zipfile(path)
    if not is_zip:
        _check_legacy(path)
    try:
        # The arguments of torchvision's and timm's training scripts: attributes, and no code.
        allowed: list[Any] = [
            argparse.Namespace,
            (_empty_dict, "collections.defaultdict"),
            *((_Placeholder, name) for name in _SKIPPED_VALUES),
        ]
        # At its end, the block would remove what the caller had allowed before.
        allowed_before = torch.serialization.get_safe_globals()
        with torch.serialization.safe_globals(
            [item for item in allowed if item not in allowed_before]
        ):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} {_describe_pickle(str(error))}: expected a state_dict; where the file was "
            "written, save it with torch.save(model.state_dict(), …)"
        ) from error
    try:
        state, key, others = find_state_dict(state)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if others:
        logger.warning(
            f"{path}: the key {key!r} is read; left out: {', '.join(map(repr, others))}; to read "
            "another, save its weights to a file of their own"
        )
    if not isinstance(state, dict):
        raise InputError(
            f"{path} holds {type(state).__name__}: "
            "expected a state_dict, as torch.save(model.state_dict(), …) writes"
        )
    tensors = {}
    for name, value in state.items():
        if (
            not isinstance(value, torch.Tensor)
            or value.layout != torch.strided
            or value.is_quantized
            or value.is_meta
        ):
            raise InputError(
                f"{path}: {name} is not a plain tensor: expected a state_dict of arrays, alone or "
                f"under one of the keys {', '.join(CHECKPOINT_KEYS)}"
            )
        # A view may claim to be larger than its storage.
        num_bytes = value.numel() * value.element_size()
        if num_bytes and num_bytes > value.untyped_storage().nbytes():
            raise InputError(
                f"{path}: {name} of the shape {tuple(value.shape)} is larger than its storage: "
                "expected all of its values in the file"
            )
        tensors[str(name)] = Tensor(
            tuple(value.shape), partial(_torch_to_numpy, path, str(name), value)
        )
    return TensorFile(tensors, {})


def _describe_pickle(error: str) -> str:
    """Says why PyTorch does not read a pickle, from its error."""
    if objects := re.search(r"Unsupported global: GLOBAL (\S+)", error):
        return f"holds a Python object, {objects[1]}, and to read it could run code"
    reason = error.partition("WeightsUnpickler error:")[2].strip().partition("\n")[0] or error
    if reason == "Unsupported operand 149":  # the first instruction of these protocols
        return "has a pickle_protocol of 4 or 5, and PyTorch reads 2 without running code"
    return f"cannot be read without running code ({reason[:200]})"


def _check_legacy(path: Path) -> None:
    """Checks the sizes in a file of PyTorch before 1.6, without unpickling it.

    PyTorch would allocate the memory that such a file claims.

    Raises:
        InputError: A storage has more values than the file has bytes.
        ValueError: The pickle is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        # Five pickles: a magic number, the version, the machine, the state_dict, storage names.
        for pickle_index in range(5):
            # `genops` parses the instructions and executes none.
            for _, argument, _ in pickletools.genops(cast(IO[bytes], data)):
                if pickle_index == 3 and isinstance(argument, int) and argument > size:
                    raise InputError(
                        f"{path} claims {argument:,} values in {size:,} bytes: "
                        "expected all of them in the file"
                    )


def _torch_to_numpy(path: Path, name: str, value: Any) -> np.ndarray:
    if value.is_floating_point() and value.element_size() == 1:
        raise unsupported_dtype(path, name, value.dtype)
    value = value.detach()
    # NumPy has no bfloat16. Integers stay, and the reader refuses them.
    return (value.float() if value.is_floating_point() else value).numpy()


def _read_keras(path: Path) -> TensorFile:
    """Reads the weights in a .keras file, without its Python objects."""
    with zipfile.ZipFile(path) as file:
        size = file.getinfo(_KERAS_WEIGHTS).file_size
        if size > MAX_BYTES:
            raise InputError(f"{path} claims {size:,} bytes of weights: expected those of one VGG")
        sizes = {info.filename: info.file_size for info in file.infolist()}
        has_config = sizes.get("config.json", MAX_CONFIG_BYTES + 1) <= MAX_CONFIG_BYTES
        config = file.read("config.json") if has_config else b""
        content = _read_hdf5(path, io.BytesIO(file.read(_KERAS_WEIGHTS)))
        return content._replace(config=config)


def _read_hdf5(path: Path, source: io.BytesIO | None = None) -> TensorFile:
    """Reads a file, or `source`, its content in memory."""
    import h5py

    opened = path if source is None else source
    tensors: dict[str, Tensor] = {}
    num_entries = 0

    def walk(group: Any, prefix: str, depth: int) -> None:
        nonlocal num_entries
        for name in group:
            num_entries += 1
            if depth > _MAX_HDF5_DEPTH or num_entries > MAX_ENTRIES:
                raise InputError(
                    f"{path} has more groups than a VGG: expected the weights of one net"
                )
            full_name = prefix + name
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise InputError(
                    f"{path}: {full_name} is a link: expected the weights in the file itself"
                )
            item = group[name]
            if isinstance(item, h5py.Group):
                walk(item, f"{full_name}/", depth + 1)
            elif isinstance(item, h5py.Dataset):
                if item.external or item.is_virtual:
                    raise InputError(
                        f"{path}: {full_name} is stored in another file: "
                        "expected the weights in the file itself"
                    )
                if item.dtype.kind == "f":
                    tensors[full_name] = Tensor(item.shape, partial(read, full_name))

    def read(name: str) -> np.ndarray:
        with h5py.File(opened, "r") as file:
            return file[name][()]

    with h5py.File(opened, "r") as file:
        walk(file, "", 0)
        config = file.attrs.get("model_config", "")
    return TensorFile(tensors, {}, config=config if isinstance(config, str | bytes) else "")


def _add_backbone(path: Path, head: TensorFile) -> TensorFile:
    """Adds the convolutions beside the head of a KerasHub preset."""
    backbone = path.with_name(_KERAS_WEIGHTS)
    if not backbone.is_file():
        raise InputError(
            f"{path} holds the head of a KerasHub preset only: expected its convolutions, "
            f"{_KERAS_WEIGHTS}, in the same folder; copy it there"
        )
    tensors = {
        name if name.startswith(BACKBONE) else f"{BACKBONE}{name.removeprefix('layers/')}": tensor
        for name, tensor in _read_hdf5(backbone).tensors.items()
    }
    num_bytes = head.num_bytes + backbone.stat().st_size
    return TensorFile(tensors | head.tensors, head.metadata, num_bytes)


_PLAIN_NAMES: dict[str, Callable[[Mapping[str, Sequence[int]]], Names]] = {
    "HDF5": keras_names,
    "Keras": keras_names,
    "PyTorch": plain_names,
    "safetensors": plain_names,
}
_READERS: dict[str, Callable[[Path], TensorFile]] = {
    "HDF5": _read_hdf5,
    "Keras": _read_keras,
    "PyTorch": _read_pytorch,
    "MATLAB": matconvnet.read,
    "safetensors": _read_safetensors,
    "Caffe": caffe.read,
}
