"""A user's paths: of this machine, or of an object store such as gs://, which etils' epath reaches, TensorFlow and orbax."""

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


def path_of(path: str | os.PathLike) -> Any:
    """A pathlib.Path, or, of an object store, what behaves as one. Raises InputError for a store that epath does not know."""
    if not is_remote(path):
        return Path(path)
    from etils import epath

    try:
        return epath.Path(path)
    except KeyError as error:
        raise InputError(
            f"{path} begins with {os.fspath(path).split('://')[0]}://: expected gs://, s3:// or a path of this machine"
        ) from error


@contextlib.contextmanager
def here(path: str | os.PathLike) -> Iterator[Path]:
    """A file on this machine, for libraries that read no other: the one given, or a copy while the block lasts. Raises InputError."""
    if not is_remote(path):
        yield Path(path)
        return
    there = path_of(path)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / there.name
        try:
            with there.open("rb") as source, copy.open("wb") as target:
                shutil.copyfileobj(source, target)
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error}): expected a file in that store") from error
        yield copy
