"""The checkpoints of a run: `last/` (to go on) and `best/` (to use); all that knows orbax.

A step folder becomes visible by one rename when it is whole (in an object store by a mark), and the one before it stays: a process killed
in between leaves a readable run, and so does a disk that loses what was written last. Each carries the checksum of all that it holds.
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.errors import InputError, single_line
from vgg_jax.model import VGG, build_model
from vgg_jax.paths import is_remote, to_path
from vgg_jax.runs.files import fsync
from vgg_jax.runs.metadata import load_run

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise InputError(
        "reading and writing runs needs orbax-checkpoint: pip install 'vgg-jax[train]'"
    ) from error


MAX_RETRIES = 3  # to save in an object store, which fails at times
MAX_TO_KEEP = 2  # checkpoints: the one before the newest, should that one be damaged
# What may be otherwise the next time, and says nothing about the files.
_PASSING_ERRNOS = {
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EIO,
    errno.ESTALE,
}


class CheckpointSaveError(Exception):
    """A checkpoint could not be written; those before it are as they were."""


def load_best(workdir: str | os.PathLike) -> tuple[VGG, dict[str, Any], dict[str, Any]]:
    """The network of a run at its best validation accuracy: `(model, variables, metadata)`.

    `model.apply(variables, images)` gives logits, for images as `metadata["preprocessing"]` says. `metadata` has the `config`, `net`,
    `flip` (whether it was trained with mirror images), `classes`, `preprocessing`, `epoch` (from 1) and `validation` (loss, errors,
    count). Raises InputError where there is no such run.
    """
    run = load_run(to_path(workdir))
    model = build_model(run.config, len(run.classes))
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    folder = to_path(workdir) / "best"
    restored = None
    if folder.is_dir():
        with CheckpointStore(folder, read_only=True) as best:
            restored = best.restore(dict(shapes))
    if restored is None:
        raise InputError(
            f"no trained net in {folder}: expected one after the first epoch; run the same `vgg-jax train` again to go on"
        )
    arrays, progress = restored
    variables = jax.tree.map(jnp.array, arrays)
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


class CorruptCheckpointError(ValueError):
    """What a checkpoint holds is not what was written."""


class CheckpointStore:
    """A folder of checkpoints, each a tree of arrays with a JSON object; the newest two are kept."""

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
        absl = logging.getLogger("absl")
        level = absl.level
        if read_only:  # orbax warns that it then neither saves nor creates
            absl.setLevel(logging.ERROR)
        try:
            # Not orbax's own thread: on a CPU it would read the very arrays that are donated to the next step.
            # Of several processes this one alone: by default orbax asks them all, by an exchange of its own.
            me, several = jax.process_index(), jax.process_count() > 1
            who = (
                {
                    "primary_host": me,
                    "active_processes": {me},
                    "barrier_sync_key_prefix": f"process_{me}",
                }
                if several
                else {}
            )
            options = ocp.CheckpointManagerOptions(
                max_to_keep=MAX_TO_KEEP,
                create=False,
                enable_async_checkpointing=False,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
                multiprocessing_options=ocp.options.MultiprocessingOptions(**who),
            )
            self._manager = ocp.CheckpointManager(
                folder if is_remote(folder) else folder.absolute(), options=options
            )
        finally:
            absl.setLevel(level)
        self._folder = folder
        self._read_only = read_only

    def save(self, step: int, arrays: Any, progress: dict[str, Any]) -> None:
        """Saves what a run holds at a step, unless it is there: the same run came to the same step.

        Raises CheckpointSaveError where it cannot be written: the disk is full, for example.
        """
        if step in self._manager.all_steps():
            return
        for _ in range(MAX_RETRIES - 1 if is_remote(self._folder) else 0):
            try:
                return self._save(step, arrays, progress)
            except CheckpointSaveError:
                time.sleep(1)
        self._save(step, arrays, progress)

    def _save(self, step: int, arrays: Any, progress: dict[str, Any]) -> None:
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays),
            progress=ocp.args.JsonSave(_with_checksums(arrays, progress)),
        )
        path = self._folder / str(step)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        try:
            free = float("inf") if is_remote(self._folder) else shutil.disk_usage(self._folder).free
            if (
                needed > free
            ):  # with less a hundred threads of orbax's each write what became of them
                raise OSError(f"{needed / 1e6:.0f} MB are needed, and {free / 1e6:.0f} MB free")
            self._manager.save(step, args=items, force=True)
            if not is_remote(path):
                for each in (*path.rglob("*"), path, self._folder, self._folder.parent):
                    fsync(each)
        except Exception as error:
            told = isinstance(error, OSError) or "Error writing" in str(
                error
            )  # the latter tensorstore says of a disk
            if not (told or is_remote(path)):  # of stores each library has errors of its own
                raise
            # What there is of it would take the room of the next one.
            with (
                contextlib.suppress(Exception) if is_remote(path) else contextlib.nullcontext()
            ):  # a store that fails may fail again
                parts: list[Any] = [path, *self._folder.glob("*.orbax-checkpoint-tmp*")]
                for part in parts:
                    if is_remote(part):
                        part.rmtree(missing_ok=True)
                    else:
                        shutil.rmtree(part, ignore_errors=True)
                self._manager.reload()
            raise CheckpointSaveError(
                f"cannot save to {self._folder} ({single_line(error)})"
            ) from error

    def restore(self, shapes: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, its arrays those of the shapes given, on the host, or None where there is none.

        Those that are newer and not whole are set aside, with a warning; in an object store only those whose checksums are wrong, since
        what cannot be read there may be read later. Raises InputError where none of them is whole.
        """
        with _unfinished_reads_ignored():
            return self._newest_whole(shapes)

    def _newest_whole(self, shapes: Any) -> tuple[Any, dict[str, Any]] | None:
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._read(step, shapes)
            except Exception as error:  # of files that are cut, changed or missing orbax makes any, Exception itself among them
                if _is_transient(error) or (
                    is_remote(self._folder) and not isinstance(error, CorruptCheckpointError)
                ):
                    raise InputError(
                        f"the checkpoint {self._folder / str(step)} cannot be read now ({single_line(error)}): try again"
                    ) from error
                damaged[step] = single_line(error)
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
        # Into numpy's arrays: jax's own orbax refuses where several processes have devices and one of them reads.
        hosts = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
        items = ocp.args.Composite(
            arrays=ocp.args.StandardRestore(hosts), progress=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=items)
        if "checksum" not in restored.progress:
            raise CorruptCheckpointError("it has no checksums, as those of earlier versions")
        progress = restored.progress["progress"]
        if restored.progress != _with_checksums(restored.arrays, progress):
            raise CorruptCheckpointError("its checksums are not those of what it holds")
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

    def delete_after(self, step: int) -> None:
        """Removes what was saved at later steps."""
        for later in [each for each in self._manager.all_steps() if each > step]:
            self._manager.delete(later)

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._manager.close()


def _with_checksums(arrays: Any, progress: dict[str, Any]) -> dict[str, Any]:
    """`progress` with the type, the shape and the checksum of each array, and one of all that."""
    seals = {
        jax.tree_util.keystr(path): _checksum(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }
    content = {"progress": progress, "arrays": seals}
    return content | {"checksum": zlib.crc32(json.dumps(content, sort_keys=True).encode())}


def _checksum(array: np.ndarray) -> list[Any]:
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


def _is_transient(error: BaseException) -> bool:
    return (isinstance(error, OSError) and error.errno in _PASSING_ERRNOS) or any(
        each in str(error)
        for each in (
            "PERMISSION_DENIED",
            "RESOURCE_EXHAUSTED",
            "UNAVAILABLE",
            "DEADLINE_EXCEEDED",
            "UNAUTHENTICATED",
        )
    )
