"""Folders and files of this machine, and of the stores that TensorFlow reaches.

Local paths use Python's own functions, since TensorFlow fails at names that are not Unicode and
waits forever at named pipes. `etils.epath` has one interface for both, but it knows fewer stores
than TensorFlow, which reads the images, and it hides names that end with "~".
"""

import os

import tensorflow as tf

from vgg_jax.image_files import HEADER_BYTES, read_local_header
from vgg_jax.paths import is_remote


def is_dir(path: str) -> bool:
    """Tells whether a path is a folder."""
    return tf.io.gfile.isdir(path) if is_remote(path) else os.path.isdir(path)


def exists(path: str | os.PathLike) -> bool:
    """Tells whether a path exists."""
    return tf.io.gfile.exists(path) if is_remote(path) else os.path.exists(path)


def listdir(folder: str) -> list[str]:
    """Lists the names in a folder. Names that are not Unicode are as from `os.fsdecode`."""
    if is_remote(folder):
        return [name.rstrip("/") for name in tf.io.gfile.listdir(folder)]
    return os.listdir(folder)


def list_subfolders(folder: str) -> list[str]:
    """Lists the names of the folders in a folder."""
    if is_remote(folder):
        return [name for name in listdir(folder) if is_dir(os.path.join(folder, name))]
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if os.path.isdir(entry.path)]


def read_header(path: bytes) -> bytes:
    """Reads the first bytes of a file.

    Args:
        path: Path of the file, or of a link to it.

    Returns:
        At most `HEADER_BYTES` bytes; none if this is no file or it cannot be opened.
    """
    if is_remote(os.fsdecode(path)):
        try:
            with tf.io.gfile.GFile(path, "rb") as file:
                return file.read(HEADER_BYTES)
        except tf.errors.OpError:
            return b""
    return read_local_header(path)


def is_dangling_link(path: str) -> bool:
    """Tells whether a path of this machine is a link that leads to nothing."""
    return not is_remote(path) and os.path.islink(path) and not os.path.exists(path)
