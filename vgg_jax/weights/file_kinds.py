"""Says what a file or a folder is that holds no weights in a format of `formats`."""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

HEAD_SIZE = 512  # bytes that `describe_file` wants
_UNPACK = "; unpack it, and pass the file of weights in it"
_MAGIC = {
    b"version https://git-lfs": "is a pointer of Git LFS, without the weights (git lfs pull gets "
    "them)",
    b"\x93NUMPY": "is one NumPy array (.npy)",
    b"\x1f\x8b": f"is compressed by gzip{_UNPACK}",
    b"BZh": f"is compressed by bzip2{_UNPACK}",
    b"\xfd7zXZ": f"is compressed by xz{_UNPACK}",
    b"7z\xbc\xaf": f"is a 7z archive{_UNPACK}",
    b"Rar!": f"is a RAR archive{_UNPACK}",
    b"\xff\xd8\xff": "is a JPEG image",
    b"\x89PNG": "is a PNG image",
    b"%PDF": "is a PDF document",
    b"GGUF": "is a language model (GGUF)",
}
_SUFFIXES = {
    ".onnx": "is an ONNX program",
    ".pb": "is a graph of TensorFlow",
    ".tflite": "is a program of TensorFlow Lite",
    ".t7": "is a file of Torch7 (Lua)",
    ".msgpack": "is a file of Flax (MessagePack)",
    ".params": "is a file of MXNet",
    ".mat": "is no file of MATLAB 5 to 7; save it with -v7 in MATLAB",
}
_FOLDER_MARKS = {
    "saved_model.pb": "is a SavedModel of TensorFlow",
    "_CHECKPOINT_METADATA": "is a checkpoint of Orbax",
    "_METADATA": "is a checkpoint of Orbax",
    "checkpoint": "is a folder of TensorFlow checkpoints",
}
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".h5", ".keras", ".caffemodel", ".mat")
# The end of the tables in which TensorFlow lists the tensors of a checkpoint.
_TABLE_END = b"W\xfb\x80\x8b$uG\xdb"
_TF_DATA = re.compile(r"\.data-\d{5}-of-\d{5}$")
# The number that begins a file of PyTorch before 1.6.
_TORCH_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_SHARD = re.compile(r"(?P<stem>.+-)(?P<index>\d{5})-of-(?P<count>\d{5})(?P<suffix>\..+)")
_JOIN = (
    "expected one file; join the parts with "
    "safetensors.numpy.save_file(load_file(part1) | load_file(part2), 'net.safetensors')"
)


def describe_file(path: Path, head: bytes) -> str:
    """Says what a file is that holds no weights which vgg_jax reads.

    Args:
        path: The file.
        head: Its first `HEAD_SIZE` bytes.

    Returns:
        A clause such as "is an ONNX program", or "" if nothing speaks against weights.
    """
    if not head:
        return "is empty"
    for magic, text in _MAGIC.items():
        if head.startswith(magic):
            return text
    if head[257:262] == b"ustar":
        return f"is a tar archive{_UNPACK}"
    if head[:6] == b"MATLAB" and head[124:128] == b"\x00\x02IM":
        return "is a file of MATLAB 7.3; save it with -v7 in MATLAB"
    if head[:1] == b"\x80" and _TORCH_MAGIC not in head[:32]:
        return "is a pickle that torch.save did not write"
    if _is_text(head):
        return _describe_text(path, head)
    if _TF_DATA.search(path.name) or _tail(path) == _TABLE_END:
        return "is a part of a TensorFlow checkpoint"
    return _SUFFIXES.get(path.suffix, "")


def describe_archive(path: Path, names: Collection[str]) -> str:
    """Says what a zip archive is that is neither of PyTorch nor of Keras.

    Args:
        path: The archive.
        names: Names of its members.

    Returns:
        A clause, or "" for an archive of PyTorch.
    """
    if any(name.endswith(".npy") for name in names):
        return (
            "holds NumPy arrays (.npz), whose names tell no layers; "
            "write the arrays with safetensors.numpy.save_file"
        )
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "is a TorchScript program; write its weights with "
            f"torch.save(torch.jit.load({path.name!r}).state_dict(), …)"
        )
    if any(name.endswith("archive_format") for name in names):
        return (
            "is a program of torch.export; write its weights with "
            f"torch.save(torch.export.load({path.name!r}).state_dict, …)"
        )
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        return ""
    listed = ", ".join(sorted(names)[:3]) + ", …" * (len(names) > 3)
    return f"is a zip archive of {listed or 'nothing'}{_UNPACK}"


def describe_shard(path: Path) -> str:
    """Says which part of a set of files a file is, from its name.

    Args:
        path: The file, such as model-00001-of-00002.safetensors.

    Returns:
        A clause, or "" for a whole file.
    """
    match = _SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) < 2:
        return ""
    names = [
        f"{match['stem']}{index:05}-of-{match['count']}{match['suffix']}"
        for index in range(1, min(int(match["count"]), 100) + 1)
    ]
    missing = [name for name in names if not (path.parent / name).exists()]
    part = f"is part {int(match['index'])} of {int(match['count'])}"
    if missing:
        return f"{part}, and {missing[0]} is missing beside it: {_JOIN}"
    return f"{part}: {_JOIN}"


def describe_folder(folder: Any) -> str:
    """Says what a folder is that holds no run.

    Args:
        folder: A path with the methods of `pathlib.Path`.

    Returns:
        A clause, or "" if nothing is known.
    """
    names = sorted(item.name for item in folder.iterdir())
    for name, text in _FOLDER_MARKS.items():
        if name in names:
            return text
    if any(_TF_DATA.search(name) for name in names):
        return _FOLDER_MARKS["checkpoint"]
    files = [name for name in names if name.endswith(_WEIGHTS)]
    return f"is a folder with files of weights; pass one, such as {files[0]}" if files else ""


def _is_text(head: bytes) -> bool:
    """True for UTF-8 without control characters, perhaps cut within a character."""
    text = head.decode("utf-8", "replace").rstrip("\ufffd")
    return "\ufffd" not in text and all(char.isprintable() or char in "\t\n\r" for char in text)


def _describe_text(path: Path, head: bytes) -> str:
    text = head.lstrip()
    if text.startswith(b"<"):
        return "is a web page, perhaps of a failed download"
    if not text.startswith(b"{"):
        return "is a text file"
    try:
        parts = set(json.loads(path.read_text())["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return "is JSON text"
    return f"is the index of {len(parts)} files ({', '.join(sorted(map(str, parts)))}): {_JOIN}"


def _tail(path: Path) -> bytes:
    """The last bytes of a file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(_TABLE_END)))
        return file.read()
