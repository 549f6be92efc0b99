"""Weight files as names with shapes. Where the format allows it, the numbers are read once the shapes are known to be a VGG's.

Nothing here runs code from a file: no pickle but by the `torch.load(weights_only=True)` of releases without known holes in it, no external
storage of HDF5, no path out of a file.
"""

import contextlib
import json
import mmap
import pickletools
import re
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from vgg_jax.errors import InputError
from vgg_jax.weights import caffe, matconvnet
from vgg_jax.weights.tensor_file import MAX_ENTRIES, Tensor, TensorFile

SAFE_TORCH = (2, 10)


def open_file(path: Path) -> TensorFile:
    """Recognises the kind by the first bytes. Raises InputError for a file that is not there, of no known kind, or damaged."""
    try:
        with path.open("rb") as file:
            head = file.read(128)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}): expected a file of weights, or a run's folder"
        ) from error
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        kind, read = "HDF5", _hdf5
    elif head.startswith(b"PK\x03\x04") or head[:1] == b"\x80":
        kind, read = "PyTorch", _pytorch
    elif head[:6] == b"MATLAB" and head[124:128] in (b"\x00\x01IM", b"\x01\x00MI"):
        kind, read = "MATLAB", matconvnet.read
    elif head[8:9] == b"{" and len(head) > 9:
        kind, read = "safetensors", _safetensors
    elif path.suffix == ".caffemodel":
        kind, read = "Caffe", caffe.read
    else:
        raise InputError(
            f"{path} is of no known kind: expected .safetensors, .pth (PyTorch), .h5 (Keras, flaxmodels), .caffemodel, or .mat (MatConvNet)"
        )
    try:
        with reraise_damaged(path, kind):
            return read(path)
    except ImportError as error:
        raise InputError(f"reading {path} needs {error.name}: {_INSTALL[kind]}") from error


@contextlib.contextmanager
def reraise_damaged(path: Path, kind: str = "weights") -> Iterator[None]:
    """Turns what a library says of a damaged file into InputError: each has its own ways to say it."""
    try:
        yield
    except (InputError, ImportError):
        raise
    except MemoryError as error:
        raise InputError(
            f"{path} says that it is larger than this machine's memory: expected a VGG's weights"
        ) from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"{path} cannot be read as a {kind} file ({reason}): expected it whole, as it was written"
        ) from error


_INSTALL = {
    "HDF5": "pip install 'vgg-jax[weights]'",
    "PyTorch": "pip install torch, or convert it where torch is: "
    "safetensors.torch.save_file(torch.load('x.pth', weights_only=True), 'x.safetensors')",
    "safetensors": "pip install safetensors",
}


def _safetensors(path: Path) -> TensorFile:
    from safetensors import safe_open

    file = safe_open(path, framework="numpy")

    def read(name: str) -> np.ndarray:
        if file.get_slice(name).get_dtype() == "BF16":  # NumPy has no such type, jax's arrays do
            return np.asarray(safe_open(path, framework="flax").get_tensor(name))
        return file.get_tensor(name)

    names = list(file.keys())
    tensors = {
        name: Tensor(tuple(file.get_slice(name).get_shape()), partial(read, name)) for name in names
    }
    notes = json.loads((file.metadata() or {}).get("vgg_jax", "{}"))
    if not isinstance(notes, dict):
        raise InputError(f"{path}: its metadata are {type(notes).__name__}: expected an object")
    return TensorFile(tensors, notes)


def _pytorch(path: Path) -> TensorFile:
    import torch

    if (
        tuple(map(int, torch.__version__.split(".")[:2])) < SAFE_TORCH
    ):  # CVE-2025-32434, CVE-2026-24747
        raise InputError(
            f"reading {path} needs torch {'.'.join(map(str, SAFE_TORCH))} or newer, and {torch.__version__} is installed, which a file can "
            "make run code: pip install -U torch"
        )
    is_zip = zipfile.is_zipfile(path)
    if not is_zip:
        _check_legacy(path)
    found = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise InputError(
            f"{path} holds {type(found).__name__}: expected a state_dict, as torch.save(model.state_dict(), …) writes"
        )
    tensors = {}
    for name, value in found.items():
        if (
            not isinstance(value, torch.Tensor)
            or value.layout != torch.strided
            or value.is_quantized
            or value.is_meta
        ):
            raise InputError(f"{path}: {name} is no plain tensor: expected a state_dict of arrays")
        # A view may claim to be larger than what is stored.
        if (
            value.numel()
            and value.numel() * value.element_size() > value.untyped_storage().nbytes()
        ):
            raise InputError(
                f"{path}: {name} of the shape {tuple(value.shape)} is larger than what is stored of it"
            )
        tensors[str(name).removeprefix("module.")] = Tensor(
            tuple(value.shape), partial(_of_torch, value)
        )
    return TensorFile(tensors, {})


def _check_legacy(path: Path) -> None:
    """Raises InputError or ValueError for a file of before PyTorch 1.6 that names more than it has: PyTorch would ask for that memory."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for part in range(
            5
        ):  # two numbers of its version, the machine's sizes, the state_dict, and the storages' names
            for _, argument, _ in pickletools.genops(
                cast(IO[bytes], data)
            ):  # reads the instructions, and follows none
                if part == 3 and isinstance(argument, int) and argument > size:
                    raise InputError(
                        f"{path} names {argument:,} numbers in {size:,} bytes: expected them all in the file"
                    )


def _of_torch(value: Any) -> np.ndarray:
    return value.detach().float().numpy()


def _hdf5(path: Path) -> TensorFile:
    import h5py

    tensors: dict[str, Tensor] = {}

    seen = 0

    def walk(group: Any, prefix: str, depth: int) -> None:
        nonlocal seen
        for name in group:
            seen += 1
            if depth > 8 or seen > MAX_ENTRIES:
                raise InputError(
                    f"{path} has more groups than a VGG: expected the weights of one net"
                )
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise InputError(
                    f"{path}: {prefix}{name} is a link: expected the weights in the file itself"
                )
            item = group[name]
            if isinstance(item, h5py.Group):
                walk(item, f"{prefix}{name}/", depth + 1)
            elif isinstance(item, h5py.Dataset):
                if item.external or item.is_virtual:
                    raise InputError(
                        f"{path}: {prefix}{name} is stored in another file: expected the weights in the file itself"
                    )
                if item.dtype.kind == "f":
                    tensors[_keras_name(prefix + name)] = Tensor(
                        item.shape, partial(reread, prefix + name)
                    )

    def reread(name: str) -> np.ndarray:
        with h5py.File(path, "r") as file:
            return file[name][()]

    with h5py.File(path, "r") as file:
        walk(file, "", 0)
    return TensorFile(tensors, {})


def _keras_name(path: str) -> str:
    """`block1_conv1/0` for a kernel and `…/1` for a bias, however Keras before version 3 wrote it; other names as they are."""
    found = re.fullmatch(
        r"(?:model_weights/)?(block\d_conv\d|fc[12]|predictions)/(?:\w+/)*(?:\w+_)?(W|W_1|kernel|b|b_1|bias)(?::0)?",
        path,
    )
    return path if found is None else f"{found[1]}/{0 if found[2] in ('W', 'W_1', 'kernel') else 1}"
