"""What the sources ask of a file system: this machine's by Python, an object store's by TensorFlow, which reads the images there."""

import os
import stat

import tensorflow as tf

from vgg_jax.paths import is_remote

HEAD = 16  # bytes that tell the kind of an image


def is_dir(path: str) -> bool:
    return tf.io.gfile.isdir(path) if is_remote(path) else os.path.isdir(path)


def exists(path: str | os.PathLike) -> bool:
    return tf.io.gfile.exists(path) if is_remote(path) else os.path.exists(path)


def listdir(folder: str) -> list[str]:
    """The names in a folder; of this machine's, one that is no Unicode as `os.fsdecode` gives it."""
    return (
        [name.rstrip("/") for name in tf.io.gfile.listdir(folder)]
        if is_remote(folder)
        else os.listdir(folder)
    )


def list_subfolders(folder: str) -> list[str]:
    """The names of the folders in a folder."""
    if is_remote(folder):
        return [name for name in listdir(folder) if is_dir(os.path.join(folder, name))]
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries if os.path.isdir(entry.path)]


def read_header(path: bytes) -> bytes:
    """The first bytes of a file, or of what a link leads to; none where it cannot be opened."""
    if is_remote(os.fsdecode(path)):
        try:
            with tf.io.gfile.GFile(path, "rb") as file:
                return file.read(HEAD)
        except tf.errors.OpError:
            return b""
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_NONBLOCK
        )  # a named pipe would wait for a writer
        try:
            return os.read(descriptor, HEAD) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
        finally:
            os.close(descriptor)
    except OSError:
        return b""
