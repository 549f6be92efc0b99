"""Locks for one process at a time, and atomic writes."""

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from vgg_jax.errors import InputError
from vgg_jax.paths import is_remote

# Some network file systems answer a lock, or the fsync of a folder, with one of these.
UNSUPPORTED_ERRNOS = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOLCK,
}


class LockedError(InputError):
    """Another process holds the lock of a workdir."""


@contextlib.contextmanager
def workdir_lock(workdir: Path) -> Iterator[None]:
    """Creates a workdir if necessary, and locks it for one process at a time.

    The lock ends with its process, however the process ends. If the block leaves nothing in a
    workdir that was created here, the workdir and its created parents are removed again.

    Args:
        workdir: The folder of a run. An object store has no locks, so nothing happens there.

    Raises:
        LockedError: Another process holds the lock.
        InputError: The workdir cannot be written to.
    """
    if is_remote(workdir):
        yield
        return
    created = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    path = workdir / "lock"
    with translate_write_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        try:
            _acquire_lock(file)
            # The process that held the lock may have removed the file, see below.
            if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError) as error:
            raise LockedError(
                f"another process trains in {workdir}: expected one at a time; wait until it ends, "
                "or pass another --workdir"
            ) from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if created and os.listdir(workdir) == ["lock"]:
                    path.unlink()
                    for folder in created:
                        folder.rmdir()


@contextlib.contextmanager
def file_lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Locks a file, and waits as long as another process or thread holds its lock.

    Args:
        path: A local file in an existing folder. It is created, and stays.
        on_wait: Called once before waiting.
    """
    with path.open("w") as file:
        try:
            _acquire_lock(file)
        except BlockingIOError:
            on_wait()
            _acquire_lock(file, wait=True)
        yield


def _acquire_lock(file: IO, wait: bool = False) -> None:
    """Locks an open file.

    Raises BlockingIOError if another process holds its lock, unless it waits. Does nothing on
    Windows, and on file systems without locks.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRNOS:
            raise


@contextlib.contextmanager
def translate_write_errors(workdir: Path) -> Iterator[None]:
    """Turns an OSError of the block into an InputError that names the workdir."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {workdir} ({error.strerror}): expected a folder for the run; "
            "pass another --workdir"
        ) from error


def fsync(path: Path) -> None:
    """Makes the system write a file, or the list of a folder's entries, to the disk.

    Args:
        path: A file or a folder. Nothing happens for a path in an object store, which keeps each
            object that it has accepted, and on Windows, which cannot open a folder.
    """
    if os.name != "posix" or is_remote(path):
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
    """Replaces a file in one step, so that neither a reader nor a crash sees half of it.

    Args:
        path: The file, local or in an object store.
        content: All of its new bytes.
    """
    if is_remote(path):  # an object appears once it is complete
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return
    with replace_atomically(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    fsync(path.parent)


def check_free(path: Path, overwrite: bool) -> None:
    """Checks that a command does not replace a file of the user's without being told to.

    Args:
        path: The file or folder that will be written.
        overwrite: Replace what exists.

    Raises:
        InputError: The path exists.
    """
    if path.exists() and not overwrite:
        raise InputError(
            f"{path} exists: expected a name that is free; pass another one, or --overwrite"
        )


@contextlib.contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Provides a temporary path whose file or folder then replaces `path`.

    A file is replaced in one step. A folder is removed first, since no system call replaces a
    folder that has content.

    Args:
        path: A local file or folder. It keeps its content if the block raises.

    Yields:
        The sibling with ".new" at the end of its name. Nothing exists there: the leftover of a
        process that was killed is removed.
    """
    temporary = path.with_name(path.name + ".new")
    _remove(temporary)
    try:
        yield temporary
        # A file never replaces a folder: the folder may hold something else of the user's.
        if temporary.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


@contextlib.contextmanager
def usual_permissions(path: Path) -> Iterator[None]:
    """Gives the block's file or folder the permissions of any new one.

    Some libraries create files that only their owner can read, or folders that others can write to.

    Args:
        path: What the block creates.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    path.unlink()
    yield
    for entry in (path, *path.rglob("*")):
        # Who may read a folder may open it.
        entry.chmod(mode | (mode & 0o444) >> 2 if entry.is_dir() else mode)


def _remove(path: Path) -> None:
    """Removes a file, a link or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
