"""Paths that a user passes: local ones, and gs:// ones in Google's object store.

etils' epath, TensorFlow and orbax read and write both kinds. Other libraries need a local file.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vgg_jax.errors import InputError


def is_remote(path: str | os.PathLike) -> bool:
    """Tells if a path has a scheme such as gs://, so that it lies in an object store.

    Args:
        path: A path that a user passed.

    Raises:
        InputError: It is no path, or one of bytes.
    """
    text = path.__fspath__() if isinstance(path, os.PathLike) else path
    if not isinstance(text, str):
        raise InputError(f"the path is {path!r}: expected a string, or a pathlib.Path")
    return "://" in text


def is_npz(data: Any) -> bool:
    """Tells if the data of a run are a path of an .npz file."""
    return isinstance(data, (str, os.PathLike)) and os.fspath(data).lower().endswith(".npz")


def to_path(path: str | os.PathLike) -> Any:
    """Converts a user's path to an object with the methods of `pathlib.Path`.

    Args:
        path: A local path, or one that begins with gs://.

    Returns:
        A `pathlib.Path` for a local path. An `etils.epath.Path`, which has the same methods, for a
        path in the store.

    Raises:
        InputError: The path lies in another store.
    """
    if not is_remote(path):
        return Path(path)
    if not os.fspath(path).startswith("gs://"):
        raise InputError(f"{path} is in an unknown store: expected gs:// or a local path")
    from etils import epath  # not at the top: `vgg-jax --help` should not wait for it

    return epath.Path(path)


def require_local(path: str | os.PathLike, is_output: bool = False) -> Path:
    """Checks a path for libraries that read and write local files only.

    Args:
        path: Any path.
        is_output: The path will be written, not read.

    Returns:
        The same path.

    Raises:
        InputError: The path lies in an object store.
    """
    if is_remote(path):
        remedy = (
            "write it there, and copy it to the store"
            if is_output
            else "copy the file to this machine"
        )
        raise InputError(f"{path} is in an object store: expected a local path; {remedy}")
    return Path(path)


def is_store_error(error: BaseException) -> bool:
    """Tells if an exception comes from a library that reaches the object store.

    Args:
        error: The exception.

    Returns:
        True for exceptions of TensorFlow, gcsfs, Google's libraries and aiohttp.
    """
    return type(error).__module__.startswith(
        ("tensorflow.python.framework.errors", "gcsfs", "google", "aiohttp")
    )


@contextlib.contextmanager
def local_copy(path: str | os.PathLike) -> Iterator[Path]:
    """Provides a local file for libraries that read no other.

    Args:
        path: A file, local or in the object store.

    Yields:
        The path itself if it is local. Otherwise a copy that exists while the block lasts.

    Raises:
        InputError: The file in the store cannot be read.
    """
    if not is_remote(path):
        yield Path(path)
        return
    remote = to_path(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / remote.name
        try:
            with remote.open("rb") as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target)
        except Exception as error:
            if not (isinstance(error, OSError) or is_store_error(error)):
                raise
            raise InputError(
                f"{path} cannot be read ({error}): expected a file in that store; "
                "check the path and the credentials"
            ) from error
        yield copy
