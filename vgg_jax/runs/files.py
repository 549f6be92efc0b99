"""The files of a workdir: a lock for one process at a time, and writes that are whole or not there."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vgg_jax.errors import InputError
from vgg_jax.paths import is_remote

UNSUPPORTED_ERRNOS = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOLCK,
}  # of some network file systems


@contextlib.contextmanager
def workdir_lock(workdir: Path) -> Iterator[None]:
    """The workdir, made if it is not there, for one process at a time.

    Raises InputError where another one has it, or it cannot be written to. The lock ends with its process, however that ends. In an object
    store there is none.
    """
    if is_remote(workdir):  # a store of objects has no locks
        yield
        return
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    path = workdir / "lock"
    with translate_write_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        try:
            _lock(file)
            if (
                os.fstat(file.fileno()).st_ino != path.stat().st_ino
            ):  # who held it has removed it, see below
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError) as error:
            raise InputError(
                f"another process trains in {workdir}: expected one at a time; wait for it, or pass another --workdir"
            ) from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if made and os.listdir(workdir) == ["lock"]:  # nothing was begun: nothing is left
                    path.unlink()
                    for folder in made:
                        folder.rmdir()


def _lock(file: IO) -> None:
    """Raises BlockingIOError where another process has it. Does nothing on Windows and on file systems that know no locks."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRNOS:
            raise


@contextlib.contextmanager
def translate_write_errors(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {workdir} ({error.strerror}): expected a folder of the run; pass another --workdir"
        ) from error


def fsync(path: Path) -> None:
    """Has the system write a file, or a folder's list of files, to the disk."""
    if os.name != "posix" or is_remote(
        path
    ):  # elsewhere a folder cannot be opened; what a store has taken it keeps
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in UNSUPPORTED_ERRNOS):
            raise
    finally:
        os.close(descriptor)


def atomic_write(path: Path, content: bytes) -> None:
    """Replaces a file in one step: a reader, or a killed writer, never leaves half of it."""
    if is_remote(path):  # an object appears when it is whole
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync(path.parent)


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Gives a temporary path whose file or folder replaces `path` when the block ends well.

    Args:
        path: A file or a folder on this machine. It keeps its content if the block raises.

    Yields:
        A path beside it at which nothing exists yet.
    """
    temporary = path.with_name(path.name + ".new")
    _remove(temporary)
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
