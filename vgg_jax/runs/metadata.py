"""What a run is: its `run.json`, and its folder, which one process at a time has."""

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vgg_jax.configs.models import Statistics, TrainConfig
from vgg_jax.errors import InputError
from vgg_jax.paths import is_remote, path_of

UNSUPPORTED_ERRNOS = {
    errno.EINVAL,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOLCK,
}  # of some network file systems


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is besides its parameters: all that using the net later needs to know, and all that its course depends on."""

    config: TrainConfig
    classes: tuple[str, ...]
    colours: Statistics
    storage: str  # of the training images
    train_size: int
    validation_size: int


def begun_run(workdir: Path) -> Run | None:
    """The run that the workdir holds a checkpoint of, if any.

    Raises InputError for a run.json that cannot be read, and where epochs were done and there is nothing to go on from.
    """
    last = has_checkpoint(workdir / "last")
    metrics = workdir / "metrics.jsonl"
    if not last and metrics.exists() and metrics.read_text():
        raise InputError(
            f"{workdir / 'last'} holds no checkpoint, and {metrics} tells of epochs that were done: expected one; restore that folder, "
            "pass another --workdir, or remove this one to begin again"
        )
    # A run that was stopped, or ran out of memory, before its first checkpoint left nothing but its name.
    saved = last or has_checkpoint(workdir / "best")
    run = read_run(workdir) if saved or (workdir / "run.json").exists() else None
    return run if saved else None


def has_checkpoint(folder: Path) -> bool:
    """Whether `last/` or `best/` holds a step, damaged or not, that was not set aside.

    On a disk a step appears when it is whole; in an object store orbax marks it when it is.
    """
    steps = [step for step in folder.glob("*") if step.name.isdigit()]
    return (
        any((step / "commit_success.txt").exists() for step in steps)
        if is_remote(folder)
        else bool(steps)
    )


def begin_run(workdir: Path, run: Run) -> None:
    """Writes run.json. Raises InputError for a folder that cannot be written to."""
    with _writing(workdir):
        write_whole(workdir / "run.json", (json.dumps(as_json(run), indent=1) + "\n").encode())


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """The workdir, made if it is not there, for one process at a time.

    Raises InputError where another one has it, or it cannot be written to. The lock ends with its process, however that ends. In an object
    store there is none.
    """
    if is_remote(workdir):  # a store of objects has no locks
        yield
        return
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    path = workdir / "lock"
    with _writing(workdir):
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
def _writing(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {workdir} ({error.strerror}): expected a folder of the run; pass another --workdir"
        ) from error


def refuse_another(workdir: Path, begun: Run, run: Run) -> None:
    """Raises InputError, with the differences, where the run that was begun in the workdir is not this one."""
    old, new = _flat(as_json(begun)), _flat(as_json(run))
    differences = [
        f"{name} is {_shown(old[name])} there and {_shown(new[name])} here"
        for name in new
        if old[name] != new[name]
    ]
    if differences:
        raise InputError(
            f"{workdir} holds another run: {'; '.join(differences)}; pass another --workdir, or the same flags to go on with that run"
        )


def read_run(workdir: Path) -> Run:
    """Raises InputError where there is no run, or none that can be read."""
    path = path_of(workdir) / "run.json"
    try:
        return from_json(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise InputError(
            f"no run in {workdir}: expected {path}, which `vgg-jax train` writes; pass the workdir of a run"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read ({' '.join(str(error).split())[:200]}): expected what `vgg-jax train` wrote; "
            "train again into another --workdir"
        ) from error


def from_json(content: dict[str, Any]) -> Run:
    """The run that `as_json` made this JSON object of. Raises one of many errors for another."""
    rest = dict(content)
    config = TrainConfig(**{name: _tuples(value) for name, value in rest.pop("config").items()})
    colours = Statistics(**{name: _tuples(value) for name, value in rest.pop("colours").items()})
    run = Run(config, tuple(rest.pop("classes")), colours, **rest)
    _check_types(run)
    return run


def as_json(run: Run) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(run)))


def _check_types(run: Run) -> None:
    """Raises TypeError: what a stranger wrote may be anything."""
    colours = (run.colours.mean_rgb, run.colours.eigenvalues, *run.colours.eigenvectors)
    triples = len(colours) == 5 and all(isinstance(row, tuple) and len(row) == 3 for row in colours)
    if not triples or not all(isinstance(value, int | float) for row in colours for value in row):
        raise TypeError("its colours are no numbers, three by three")
    if not run.classes or not all(isinstance(name, str) for name in (*run.classes, run.storage)):
        raise TypeError("its classes and its storage are no names")
    if not all(isinstance(size, int) for size in (run.train_size, run.validation_size)):
        raise TypeError("its sizes are no numbers")


def sync(path: Path) -> None:
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


def write_whole(path: Path, content: bytes) -> None:
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
    sync(path.parent)


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "config"} | run["config"]


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
