"""A run's folder: `run.json` (what is trained on what), `last/` (to go on), `best/` (to use), `metrics.jsonl`; all that knows orbax.

A step folder becomes visible by one rename when it is whole, and the one before it stays: a process killed in between leaves a readable
run, and so does a disk that loses what was written last. Each carries the checksum of all that it holds.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from vgg_jax.configs import Statistics, TrainConfig
from vgg_jax.errors import InputError
from vgg_jax.model import VGG
from vgg_jax.train_step import TrainState, build_model

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise InputError("reading and writing runs needs orbax-checkpoint: pip install 'vgg-jax[train]'") from error


KEPT = 2  # checkpoints: the one before the newest, should that one be damaged
# What may be otherwise the next time, and says nothing about the files.
_PASSING_ERRNOS = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE}
_UNSUPPORTED_ERRNOS = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}  # of some network file systems


class NotSavedError(Exception):
    """A checkpoint could not be written; those before it are as they were."""


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
    if not last and metrics.exists() and metrics.stat().st_size:
        raise InputError(
            f"{workdir / 'last'} holds no checkpoint, and {metrics} tells of epochs that were done: expected one; restore that folder, "
            "pass another --workdir, or remove this one to begin again"
        )
    # A run that was stopped, or ran out of memory, before its first checkpoint left nothing but its name.
    saved = last or has_checkpoint(workdir / "best")
    run = read_run(workdir) if saved or (workdir / "run.json").exists() else None
    return run if saved else None


def has_checkpoint(folder: Path) -> bool:
    """Whether `last/` or `best/` holds a step, damaged or not, that was not set aside."""
    return any(step.name.isdigit() for step in folder.glob("*"))


def begin_run(workdir: Path, run: Run) -> None:
    """Writes run.json. Raises InputError for a folder that cannot be written to."""
    with _writing(workdir):
        write_whole(workdir / "run.json", json.dumps(_plain(run), indent=1) + "\n")


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """The workdir, made if it is not there, for one process at a time.

    Raises InputError where another one has it, or it cannot be written to. The lock ends with its process, however that ends.
    """
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    path = workdir / "lock"
    with _writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        try:
            _lock(file)
            if os.fstat(file.fileno()).st_ino != path.stat().st_ino:  # who held it has removed it, see below
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
        if error.errno not in _UNSUPPORTED_ERRNOS:
            raise


@contextlib.contextmanager
def _writing(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {workdir} ({error.strerror}): expected a folder of the run; pass another --workdir") from error


def refuse_another(workdir: Path, begun: Run, run: Run) -> None:
    """Raises InputError, with the differences, where the run that was begun in the workdir is not this one."""
    old, new = _flat(_plain(begun)), _flat(_plain(run))
    differences = [f"{name} is {old[name]!r} there and {new[name]!r} here" for name in new if old[name] != new[name]]
    if differences:
        raise InputError(
            f"{workdir} holds another run: {'; '.join(differences)}; pass another --workdir, or the same flags to go on with that run"
        )


def read_run(workdir: Path) -> Run:
    """Raises InputError where there is no run, or none that can be read."""
    path = Path(workdir) / "run.json"
    try:
        content = json.loads(path.read_text())
        config = TrainConfig(**{name: _tuples(value) for name, value in content.pop("config").items()})
        colours = Statistics(**{name: _tuples(value) for name, value in content.pop("colours").items()})
        return Run(config, tuple(content.pop("classes")), colours, **content)
    except FileNotFoundError as error:
        raise InputError(f"no run in {workdir}: expected {path}, which `vgg-jax train` writes; pass the workdir of a run") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, OSError, InputError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): expected what `vgg-jax train` wrote; train again into another --workdir"
        ) from error


def load(workdir: str | os.PathLike) -> tuple[VGG, dict[str, Any], dict[str, Any]]:
    """The network of a run at its best validation accuracy: `(model, variables, metadata)`.

    `model.apply(variables, images)` gives logits, for images as `metadata["preprocessing"]` says. `metadata` has the `config`, `net`,
    `flip` (whether it was trained with mirror images), `classes`, `preprocessing`, `epoch` (from 1) and `validation` (loss, errors,
    count). Raises InputError where there is no such run.
    """
    run = read_run(Path(workdir))
    model = build_model(run.config, len(run.classes))
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), dict(shapes))
    folder = Path(workdir) / "best"
    restored = None
    if folder.is_dir():
        with Saved(folder, read_only=True) as best:
            restored = best.restore(shapes)
    if restored is None:
        raise InputError(f"no trained net in {folder}: expected one after the first epoch; run the same `vgg-jax train` again to go on")
    variables, progress = restored
    preprocessing = {
        "mean_rgb": run.colours.mean_rgb,
        "range": (0, 255),
        "channels": "RGB",
        "image_size": run.config.image_size,
        "scale": run.config.test_scale,  # Q, the shorter side; the centre crop is read
        "interpolation": "bilinear, antialiased",
        "exif": run.config.exif,
    }
    known = {
        "config": run.config,
        "net": run.config.net,
        "flip": run.config.flip,
        "top": True,
        "classes": run.classes,
        "preprocessing": preprocessing,
    }
    return model, variables, known | progress


class Saved:
    """A folder of checkpoints, each a tree of arrays with a JSON object; the newest two are kept."""

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        absl = logging.getLogger("absl")
        level = absl.level
        if read_only:  # orbax warns that it then neither saves nor creates
            absl.setLevel(logging.ERROR)
        try:
            # Without the background thread: on a CPU it would read the very arrays that are donated to the next step.
            options = ocp.CheckpointManagerOptions(
                max_to_keep=KEPT, enable_async_checkpointing=False, read_only=read_only, cleanup_tmp_directories=not read_only
            )
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        finally:
            absl.setLevel(level)
        self._folder = folder
        self._read_only = read_only

    def save(self, step: int, arrays: Any, progress: dict[str, Any]) -> None:
        """Saves what a run holds at a step, unless it is there: the same run came to the same step.

        Raises NotSavedError where it cannot be written: the disk is full, for example.
        """
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(_sealed(arrays, progress)))
        path = self._folder / str(step)
        needed, free = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)), shutil.disk_usage(self._folder).free
        if needed > free:  # with less a hundred threads of orbax's each write what became of them
            raise NotSavedError(f"cannot save to {self._folder} ({needed / 1e6:.0f} MB are needed, and {free / 1e6:.0f} MB free)")
        try:
            self._manager.save(step, args=items, force=True)
            for each in (*path.rglob("*"), path, self._folder, self._folder.parent):
                _sync(each)
        except (OSError, ValueError, RuntimeError) as error:
            if not isinstance(error, OSError) and "Error writing" not in str(error):  # which tensorstore says of a disk
                raise
            # What there is of it would take the room of the next one.
            for part in (path, *self._folder.glob("*.orbax-checkpoint-tmp*")):
                shutil.rmtree(part, ignore_errors=True)
            self._manager.reload()
            raise NotSavedError(f"cannot save to {self._folder} ({_reason(error)})") from error

    def restore(self, shapes: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, its arrays with the shapes and shardings given, or None where there is none.

        Those that are newer and not whole are set aside, with a warning. Raises InputError where none of them is whole.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._read(step, shapes)
            except Exception as error:  # of files that are cut, changed or missing orbax makes any, Exception itself among them
                if _is_passing(error):
                    raise InputError(
                        f"the checkpoint {self._folder / str(step)} cannot be read now ({_reason(error)}): try again"
                    ) from error
                damaged[step] = _reason(error)
                continue
            for other, reason in damaged.items():
                self._set_aside(other, reason, step)
            return found
        if damaged:
            newest = max(damaged)
            raise InputError(
                f"the checkpoint {self._folder / str(newest)} cannot be read ({damaged[newest]}), and no other is there that can: expected "
                "one as it was written; restore that folder, or train again into another --workdir"
            )
        return None

    def _read(self, step: int, shapes: Any) -> tuple[Any, dict[str, Any]]:
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes), progress=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        if "checksum" not in restored.progress:
            raise ValueError("it has no checksums, as those of earlier versions")
        progress = restored.progress["progress"]
        if restored.progress != _sealed(restored.arrays, progress):
            raise ValueError("its checksums are not those of what it holds")
        return restored.arrays, progress

    def _set_aside(self, step: int, reason: str, instead: int) -> None:
        path = self._folder / str(step)
        said = f"warning: the checkpoint {path} is damaged ({reason})"
        if not self._read_only:
            aside = path.with_name(f"{path.name}.damaged")
            while aside.exists():
                aside = aside.with_name(aside.name + "-again")
            path.rename(aside)
            self._manager.reload()
            said += f" and set aside as {aside.name}"
        print(f"{said}; {self._folder / str(instead)} is used", file=sys.stderr, flush=True)

    def __enter__(self) -> "Saved":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()


def restore_state(last: Saved, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """The state to go on with, placed as the given one is, and the run's progress."""
    return last.restore(_shapes(state))


def restore_best(best: Saved, state: TrainState) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The variables of the best net, placed as those of the given state are, and what is known of it."""
    return best.restore(_shapes(variables_of(state)))


def variables_of(state: TrainState) -> dict[str, Any]:
    """What the net of a state is applied with: `params`, and with batch normalisation `batch_stats`."""
    return {"params": state.params} | ({"batch_stats": state.batch_stats} if state.batch_stats else {})


def _shapes(arrays: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), arrays)


def _sealed(arrays: Any, progress: dict[str, Any]) -> dict[str, Any]:
    """`progress` with the type, the shape and the checksum of each array, and one of all that."""
    seals = {jax.tree_util.keystr(path): _seal(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)}
    content = {"progress": progress, "arrays": seals}
    return content | {"checksum": zlib.crc32(json.dumps(content, sort_keys=True).encode())}


def _seal(array: jax.Array | np.ndarray) -> list[Any]:
    if isinstance(array, jax.Array) and jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    array = np.ascontiguousarray(array)
    return [str(array.dtype), list(array.shape), zlib.crc32(array.reshape(-1).view(np.uint8).data)]


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _is_passing(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in _PASSING_ERRNOS) or any(
        each in str(error) for each in ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED")
    )


def _sync(path: Path) -> None:
    """Has the system write a file, or a folder's list of files, to the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _UNSUPPORTED_ERRNOS):
            raise
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader, or a killed writer, never leaves half of it."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync(path.parent)


def _plain(run: Run) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(run)))


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "config"} | run["config"]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
