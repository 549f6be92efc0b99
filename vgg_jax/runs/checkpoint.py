"""Checkpoints of a run: `last/` resumes the training, `best/` holds the network to use.

Only this module imports orbax. A checkpoint is committed atomically: by a rename on a disk, by a
marker in an object store. The previous one is kept, so a crash, or a disk that loses the newest
writes, leaves a readable run. Each checkpoint carries the checksums of its content.
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

from vgg_jax.configs.train import KEEP
from vgg_jax.errors import InputError, install_hint, single_line
from vgg_jax.model import VGG, build_model
from vgg_jax.paths import is_remote, to_path
from vgg_jax.runs.files import fsync
from vgg_jax.runs.metadata import RunMetadata, load_run

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise InputError(
        f"reading and writing runs needs orbax-checkpoint: {install_hint('train')}"
    ) from error

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # of a save in an object store, which fails at times
# These errors may be gone at the next attempt, so they do not prove that a file is damaged.
_TRANSIENT_ERRNOS = {
    errno.EACCES,
    errno.EPERM,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EIO,
    errno.ESTALE,
}
_TRANSIENT_STATUSES = (
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "UNAUTHENTICATED",
)


class CheckpointSaveError(Exception):
    """A checkpoint could not be written. The earlier ones are unchanged."""


class CorruptCheckpointError(ValueError):
    """The content of a checkpoint differs from the content that was written."""


def load_best(workdir: str | os.PathLike) -> tuple[VGG, dict[str, Any], dict[str, Any]]:
    """Loads the network of a run at its best validation accuracy.

    Args:
        workdir: The folder of a run, local or in an object store.

    Returns:
        `(model, variables, metadata)`. `model.apply(variables, images)` gives logits for images
        prepared as `metadata["preprocessing"]` says. The other keys of `metadata` are `config`,
        `net`, `flip` (trained with mirror images), `top`, `classes`, `epoch` (from 1),
        `validation` (loss, errors, count) and `path`, the workdir.

    Raises:
        InputError: The workdir holds no run, or the run has no readable network yet.
    """
    run = load_run(to_path(workdir))
    model = build_model(run.config, len(run.classes))
    shapes = jax.eval_shape(model.init, jax.random.key(0), model.one_image())
    folder = to_path(workdir) / "best"
    restored = None
    if folder.is_dir():
        with CheckpointStore(folder, read_only=True) as best:
            restored = best.restore(dict(shapes))
    if restored is None:
        raise InputError(
            f"no trained network in {folder}: expected one after the first epoch; "
            "run the same `vgg-jax train` again to resume"
        )
    arrays, progress = restored
    metadata = _network_metadata(run) | progress | {"path": str(workdir)}
    return model, jax.tree.map(jnp.array, arrays), metadata


def _network_metadata(run: RunMetadata) -> dict[str, Any]:
    return {
        "config": run.config,
        "net": run.config.net,
        "flip": run.config.flip,
        "top": True,
        "classes": run.classes,
        "preprocessing": {
            "mean_rgb": run.colours.mean_rgb,
            "range": (0, 255),
            "channels": "RGB",
            "image_size": run.config.image_size,
            "scale": run.config.test_scale,  # Q, the shorter side; the centre crop is read
            "interpolation": "bilinear, antialiased",
            "exif": run.config.exif,
            "rounding": "nearest",
        },
    }


class CheckpointStore:
    """A folder of checkpoints, of which the newest are kept.

    A checkpoint is a tree of arrays and a JSON object, the progress. The store is a context
    manager, which closes it.

    Args:
        folder: The folder, local or in an object store. It is created unless `read_only`.
        read_only: Never writes to the folder, so that another process may use it.
        keep: Number of checkpoints to keep. Older ones are deleted after a save.
    """

    def __init__(self, folder: Path, read_only: bool = False, keep: int = KEEP) -> None:
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._read_only = read_only
        self._is_remote = is_remote(folder)
        self._manager = _open_manager(folder, read_only, keep)

    def save(self, number: int, arrays: Any, progress: dict[str, Any]) -> None:
        """Saves a checkpoint.

        Does nothing if `number` is already saved, as when a resumed run reaches it again.

        Args:
            number: Ordinal of the checkpoint: a later one is larger.
            arrays: A tree of NumPy arrays.
            progress: A JSON object.

        Raises:
            CheckpointSaveError: The checkpoint cannot be written, for example on a full disk.
        """
        if number in self._manager.all_steps():
            return
        attempts = MAX_ATTEMPTS if self._is_remote else 1
        for attempt in range(1, attempts + 1):
            try:
                self._save_once(number, arrays, progress)
                return
            except CheckpointSaveError:
                if attempt == attempts:
                    raise
                time.sleep(1)

    def _save_once(self, number: int, arrays: Any, progress: dict[str, Any]) -> None:
        items = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays),
            progress=ocp.args.JsonSave(_with_checksums(arrays, progress)),
        )
        try:
            self._check_free_space(arrays)
            self._manager.save(number, args=items, force=True)
            self._sync(number)
        except Exception as error:
            # tensorstore reports a failing disk by a ValueError. Each library of an object store
            # has exceptions of its own.
            is_write_error = isinstance(error, OSError) or "Error writing" in str(error)
            if not (is_write_error or self._is_remote):
                raise
            self._remove_partial(number)
            raise CheckpointSaveError(
                f"cannot save to {self._folder} ({single_line(error)})"
            ) from error

    def _check_free_space(self, arrays: Any) -> None:
        """Raises OSError if the disk is too full.

        On a full disk, each of orbax's threads, about a hundred, would log an error.
        """
        if self._is_remote:  # a store has no free space to ask for
            return
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise OSError(f"{needed / 1e6:.0f} MB are needed, and {free / 1e6:.0f} MB free")

    def _sync(self, number: int) -> None:
        """Makes the system write a checkpoint to the disk."""
        if self._is_remote:  # the store keeps each object that it has accepted
            return
        path = self._folder / str(number)
        for entry in (*path.rglob("*"), path, self._folder, self._folder.parent):
            fsync(entry)

    def _remove_partial(self, number: int) -> None:
        """Removes the remains of a failed save, which would take up the space of the next one."""
        partial: list[Any] = [
            self._folder / str(number),
            *self._folder.glob("*.orbax-checkpoint-tmp*"),
        ]
        for path in partial:
            if not self._is_remote:
                shutil.rmtree(path, ignore_errors=True)  # removes as much as it can
                continue
            with contextlib.suppress(Exception):  # the store may fail again
                path.rmtree(missing_ok=True)
        with contextlib.suppress(Exception):
            self._manager.reload()

    def restore(self, shapes: Any) -> tuple[Any, dict[str, Any]] | None:
        """Restores the newest checkpoint that is valid.

        Newer ones that are damaged are set aside, with a warning. In an object store, only wrong
        checksums count as damage, since a file that cannot be read now may be readable later.

        Args:
            shapes: The tree of the arrays, or of their `jax.ShapeDtypeStruct`s.

        Returns:
            `(arrays, progress)`, with NumPy arrays, or None if there is no checkpoint.

        Raises:
            InputError: There are checkpoints, and none of them is valid, or the newest cannot be
                read at the moment.
        """
        with _ignore_unfinished_reads():
            return self._restore_latest_valid(shapes)

    def _restore_latest_valid(self, shapes: Any) -> tuple[Any, dict[str, Any]] | None:
        damaged: dict[int, str] = {}
        for number in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._read(number, shapes)
            # For damaged files, orbax raises errors of any type, even a plain Exception.
            except Exception as error:
                if self._may_be_transient(error):
                    raise InputError(
                        f"the checkpoint {self._folder / str(number)} cannot be read now "
                        f"({single_line(error)}): try again"
                    ) from error
                damaged[number] = single_line(error)
                continue
            # Only now, so that nothing is moved if no checkpoint is valid.
            for damaged_number, reason in damaged.items():
                self._quarantine(damaged_number, reason, replacement=number)
            return restored
        if damaged:
            newest = max(damaged)
            raise InputError(
                f"the checkpoint {self._folder / str(newest)} cannot be read ({damaged[newest]}), "
                "and there is no other valid one: expected it unchanged; restore that folder, "
                "or train again into another --workdir"
            )
        return None

    def _may_be_transient(self, error: Exception) -> bool:
        if self._is_remote and not isinstance(error, CorruptCheckpointError):
            return True
        return _is_transient(error)

    def _read(self, number: int, shapes: Any) -> tuple[Any, dict[str, Any]]:
        # orbax restores jax arrays only if every process takes part, and here one process reads.
        # So it restores NumPy arrays.
        templates = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), shapes)
        items = ocp.args.Composite(
            arrays=ocp.args.StandardRestore(templates), progress=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(number, args=items)
        if "checksum" not in restored.progress:
            raise CorruptCheckpointError("it has no checksums, like those of early versions")
        progress = restored.progress["progress"]
        if restored.progress != _with_checksums(restored.arrays, progress):
            raise CorruptCheckpointError("its checksums do not match its content")
        return restored.arrays, progress

    def _quarantine(self, number: int, reason: str, replacement: int) -> None:
        """Renames a damaged checkpoint, unless the store is read-only, and logs a warning."""
        path = self._folder / str(number)
        message = f"the checkpoint {path} is damaged ({reason})"
        if not self._read_only:
            target = path.with_name(f"{path.name}.damaged")
            while target.exists():
                target = target.with_name(target.name + "-again")
            path.rename(target)
            self._manager.reload()
            message += f" and set aside as {target.name}"
        logger.warning(f"{message}; {self._folder / str(replacement)} is used")

    def delete_after(self, number: int) -> None:
        """Deletes the checkpoints with a larger number."""
        for later in [saved for saved in self._manager.all_steps() if saved > number]:
            self._manager.delete(later)

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the store. It cannot be used afterwards."""
        self._manager.close()


def _open_manager(folder: Path, read_only: bool, keep: int) -> ocp.CheckpointManager:
    multiprocessing: dict[str, Any] = {}
    if jax.process_count() > 1:
        # Only this process uses the store. By default, orbax would wait for all the others.
        index = jax.process_index()
        multiprocessing = {
            "primary_host": index,
            "active_processes": {index},
            "barrier_sync_key_prefix": f"process_{index}",
        }
    # A path in a store is absolute already, and `absolute` would put the current folder before it.
    path = folder if is_remote(folder) else folder.absolute()
    # orbax warns that a read-only manager neither saves nor creates.
    with _absl_errors_only() if read_only else contextlib.nullcontext():
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=False,
            # On a CPU, orbax's own thread would read arrays that were donated to the next step.
            enable_async_checkpointing=False,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            multiprocessing_options=ocp.options.MultiprocessingOptions(**multiprocessing),
        )
        return ocp.CheckpointManager(path, options=options)


@contextlib.contextmanager
def _absl_errors_only() -> Iterator[None]:
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        absl.setLevel(level)


def _with_checksums(arrays: Any, progress: dict[str, Any]) -> dict[str, Any]:
    """Adds the dtype, shape and checksum of each array, and a checksum of all of that."""
    content = {
        "progress": progress,
        "arrays": {
            jax.tree_util.keystr(path): _checksum(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
        },
    }
    return content | {"checksum": zlib.crc32(json.dumps(content, sort_keys=True).encode())}


def _checksum(array: np.ndarray) -> list[Any]:
    array = np.ascontiguousarray(array)
    return [str(array.dtype), list(array.shape), zlib.crc32(array.reshape(-1).view(np.uint8).data)]


@contextlib.contextmanager
def _ignore_unfinished_reads() -> Iterator[None]:
    """Hides tracebacks of reads that orbax abandons after it finds a damaged file.

    Python would print one for each of them, since nothing waits for their results.
    """
    previous_hook = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            previous_hook(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = previous_hook


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return any(status in str(error) for status in _TRANSIENT_STATUSES)
