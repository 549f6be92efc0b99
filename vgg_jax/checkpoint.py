"""The checkpoints of a run: `last/` (to go on) and `best/` (to use), with `metrics.jsonl` beside them; all that knows orbax.

A step folder becomes visible by one rename when it is whole, and the one before it stays: a process killed in between leaves a readable
run, and so does a disk that loses what was written last. Each carries the checksum of all that it holds.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vgg_jax.errors import InputError
from vgg_jax.model import VGG
from vgg_jax.run import read_run, sync, write_whole
from vgg_jax.train_step import TrainState, build_model

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise InputError("reading and writing runs needs orbax-checkpoint: pip install 'vgg-jax[train]'") from error


KEPT = 2  # checkpoints: the one before the newest, should that one be damaged
# What may be otherwise the next time, and says nothing about the files.
_PASSING_ERRNOS = {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ESTALE}


class NotSavedError(Exception):
    """A checkpoint could not be written; those before it are as they were."""


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
            # Not orbax's own thread: on a CPU it would read the very arrays that are donated to the next step.
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
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        try:
            free = shutil.disk_usage(self._folder).free
            if needed > free:  # with less a hundred threads of orbax's each write what became of them
                raise OSError(f"{needed / 1e6:.0f} MB are needed, and {free / 1e6:.0f} MB free")
            self._manager.save(step, args=items, force=True)
            for each in (*path.rglob("*"), path, self._folder, self._folder.parent):
                sync(each)
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
        with _unfinished_reads_ignored():
            return self._newest_whole(shapes)

    def _newest_whole(self, shapes: Any) -> tuple[Any, dict[str, Any]] | None:
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

    def drop_after(self, step: int) -> None:
        """Removes what was saved at later steps."""
        for later in [each for each in self._manager.all_steps() if each > step]:
            self._manager.delete(later)

    def __enter__(self) -> "Saved":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._manager.close()


class Best(NamedTuple):
    """What is to be known of a state that is the best so far, besides its variables."""

    epoch: int
    validation: dict[str, Any]


class Saving:
    """Saves a run while it trains on: what is to be saved is copied, and a thread writes the copies, one save after the other.

    A save that fails is warned of and is in `failed` until another one succeeds; the best net is owed until then.
    """

    def __init__(self, workdir: Path) -> None:
        self.last, self.best = Saved(workdir / "last"), Saved(workdir / "best")
        self.failed: NotSavedError | None = None
        self._workdir = workdir
        self._owed: tuple[int, Any, dict[str, Any]] | None = None
        self._thread = ThreadPoolExecutor(1, "saving")
        self._writing: Future[None] | None = None

    def save(self, step: int, state: TrainState, progress: dict[str, Any], best: Best | None = None) -> None:
        """Of a state on the devices, a JSON object that begins with the `history`, and, if it is the best so far, what is known of it."""
        self.wait()  # one copy at a time
        copied = jax.tree.map(_copied, state)
        if best is not None:
            self._owed = best.epoch, variables_of(copied), best._asdict()
        self._writing = self._thread.submit(self._write, step, copied, progress)

    def wait(self) -> None:
        """Until all is written that can be."""
        if self._writing is not None:
            self._writing.result()
        self._writing = None

    def _write(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
        try:
            self._pay()
            self.last.save(step, state, progress)
            write_metrics(self._workdir, progress["history"])
            self.failed = None
        except NotSavedError as error:
            self.failed = error
            print(f"warning: {error}; what was saved before is still there", file=sys.stderr, flush=True)

    def _pay(self) -> None:
        if self._owed is not None:
            self.best.save(*self._owed)
        self._owed = None

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:  # at once
            self._thread.shutdown(wait=False, cancel_futures=True)
            return
        try:
            self.wait()
            self._pay()
        except NotSavedError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
        finally:
            self._thread.shutdown()
            for saved in (self.last, self.best):
                saved.close()


def write_metrics(workdir: Path, history: list[dict[str, Any]]) -> None:
    """metrics.jsonl, a line an epoch, all anew. Raises NotSavedError."""
    path = workdir / "metrics.jsonl"
    try:
        write_whole(path, "".join(json.dumps(record) + "\n" for record in history))
    except OSError as error:
        raise NotSavedError(f"cannot write to {path} ({error.strerror})") from error


def _copied(array: jax.Array) -> Any:
    """On the host, in memory of its own: the next step reuses the array's."""
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.clone(array)
    return np.array(array)


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


@contextlib.contextmanager
def _unfinished_reads_ignored() -> Iterator[None]:
    """What orbax was still reading when a file turned out to be damaged has nowhere to go, and each says so by a traceback."""
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if "Event loop is closed" not in str(found.exc_value):
            before(found)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _is_passing(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in _PASSING_ERRNOS) or any(
        each in str(error) for each in ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED")
    )
