"""A user's paths: of this machine, or of Google's object store (gs://), which etils' epath, TensorFlow and orbax reach."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vgg_jax.errors import InputError


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


def to_path(path: str | os.PathLike) -> Any:
    """A pathlib.Path, or, of the object store, what behaves as one. Raises InputError for another store."""
    if not is_remote(path):
        return Path(path)
    if not os.fspath(path).startswith("gs://"):
        raise InputError(
            f"{path} is in a store that is not known: expected gs:// or a path of this machine"
        )
    from etils import epath

    return epath.Path(path)


def require_local(path: str | os.PathLike) -> Path:
    """For what is written by libraries that know no store. Raises InputError for a path in one."""
    if is_remote(path):
        raise InputError(
            f"{path} is in an object store: expected a path of this machine; copy it there afterwards"
        )
    return Path(path)


def is_store_error(error: BaseException) -> bool:
    """Whether a library that reaches the store has raised it: TensorFlow, gcsfs or Google's own."""
    return type(error).__module__.startswith(
        ("tensorflow.python.framework.errors", "gcsfs", "google", "aiohttp")
    )


@contextlib.contextmanager
def local_copy(path: str | os.PathLike) -> Iterator[Path]:
    """A file on this machine, for libraries that read no other: the one given, or a copy while the block lasts. Raises InputError."""
    if not is_remote(path):
        yield Path(path)
        return
    there = to_path(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / there.name
        try:
            with there.open("rb") as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target)
        except Exception as error:
            if not (isinstance(error, OSError) or is_store_error(error)):
                raise
            raise InputError(
                f"{path} cannot be read ({error}): expected a file in that store"
            ) from error
        yield copy
