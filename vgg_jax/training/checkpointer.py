"""Saving of a run in the background, and restoring.

The main process alone reads and writes files. It gathers arrays from the other processes, and
broadcasts those that it reads. A checkpoint therefore does not depend on the number of processes
and the mesh that wrote it, and any other number can read it.
"""

import contextlib
import dataclasses
import json
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from vgg_jax.configs.train import KEEP
from vgg_jax.distributed.multihost import (
    broadcast_from_main,
    is_main_process,
    run_on_main_and_broadcast,
)
from vgg_jax.distributed.sharding import put_global, to_host
from vgg_jax.errors import single_line
from vgg_jax.paths import is_remote
from vgg_jax.runs.checkpoint import CheckpointSaveError, CheckpointStore
from vgg_jax.runs.files import atomic_write
from vgg_jax.training.step import TrainState

logger = logging.getLogger(__name__)


class BestInfo(NamedTuple):
    """The metadata of the best state so far."""

    epoch: int  # from 1
    validation: dict[str, Any]  # loss, errors, accuracy and count


class Checkpointer:
    """Saves a run to `last/` and `best/` while training continues.

    `save` copies the arrays, and a thread writes the copies. A failed save is logged as a warning
    and kept in `last_error` until another one succeeds. A best state that could not be written is
    kept for the next save. With several processes, the main one writes, and the others only take
    part in gathering the arrays.

    Leaving the context waits for the write in progress, except after a KeyboardInterrupt.

    Args:
        workdir: Folder of the run.
        keep: Number of checkpoints in `last/` and in `best/`.
    """

    def __init__(self, workdir: Path, keep: int = KEEP) -> None:
        self._workdir = workdir
        self._stores: dict[str, CheckpointStore] = {}
        if is_main_process():
            self._stores = {
                name: CheckpointStore(workdir / name, keep=keep) for name in ("last", "best")
            }
        self.last_error: CheckpointSaveError | None = None
        # The epoch, the variables and the metadata of a best state that is not written yet.
        self._pending_best: tuple[int, Any, dict[str, Any]] | None = None
        self._thread = ThreadPoolExecutor(1, "saving")
        self._write_in_progress: Future[None] | None = None

    def save(
        self, number: int, state: TrainState, progress: dict[str, Any], best: BestInfo | None = None
    ) -> None:
        """Copies a state to the host and starts to write it.

        All processes must call this.

        Args:
            number: Ordinal of the checkpoint in `last/`: a later one is larger.
            state: The state, on the devices.
            progress: JSON object with the run's "history".
            best: Metadata, if the state is the best so far. It is then also written to `best/`.
        """
        self._wait_for_write()  # so that there is one copy at a time
        host_state = jax.tree.map(_to_host, state)
        if not is_main_process():
            return
        if best is not None:
            self._pending_best = best.epoch, model_variables(host_state), best._asdict()
        self._write_in_progress = self._thread.submit(self._write, number, host_state, progress)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Reads the last checkpoint.

        All processes must call this.

        Args:
            state: A state on the devices, with the shapes and the sharding to restore to.

        Returns:
            The state on the devices and the progress, or None if there is no checkpoint.

        Raises:
            InputError: The checkpoints are damaged.
        """
        arrays = None

        def read() -> dict[str, Any] | None:
            nonlocal arrays
            arrays, progress = self._stores["last"].restore(abstract_state(state)) or (None, None)
            return progress

        progress = run_on_main_and_broadcast(read)
        if progress is None:
            return None
        if arrays is None:  # another process than the main one
            arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_state(state))
        restored = jax.tree.map(
            lambda array, like: _to_devices(broadcast_from_main(array), like), arrays, state
        )
        return restored, progress

    def has_best(self, state: TrainState) -> bool:
        """Tells if `best/` holds an undamaged checkpoint.

        All processes must call this.

        Args:
            state: A state with the shapes to expect.

        Returns:
            The answer of the main process.
        """

        def read() -> bool:
            return self._stores["best"].restore(model_variables(state)) is not None

        return run_on_main_and_broadcast(read)

    def delete_best_after(self, epoch: int) -> None:
        """Deletes the best checkpoints of later epochs."""
        if is_main_process():
            self._stores["best"].delete_after(epoch)

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Writes metrics.jsonl. Ignores an error, because the next save repeats it."""
        if is_main_process():
            with contextlib.suppress(CheckpointSaveError):
                write_metrics(self._workdir, history)

    def wait_until_finished(self) -> None:
        """Waits for the write in progress.

        All processes must call this.

        Raises:
            CheckpointSaveError: The last save failed. Raised in all processes.
        """

        def error_message() -> str | None:
            self._wait_for_write()
            return str(self.last_error) if self.last_error else None

        if message := run_on_main_and_broadcast(error_message):
            raise CheckpointSaveError(message)

    def _wait_for_write(self) -> None:
        if self._write_in_progress is not None:
            self._write_in_progress.result()
        self._write_in_progress = None

    def _write(self, number: int, state: TrainState, progress: dict[str, Any]) -> None:
        """Writes a state in the background thread. Logs an error instead of raising it."""
        try:
            self._write_pending_best()
            self._stores["last"].save(number, state, progress)
            write_metrics(self._workdir, progress["history"])
            self.last_error = None
        except CheckpointSaveError as error:
            self.last_error = error
            logger.warning(f"{error}; earlier checkpoints are kept")

    def _write_pending_best(self) -> None:
        if self._pending_best is not None:
            self._stores["best"].save(*self._pending_best)
        self._pending_best = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:  # exit at once
            self._thread.shutdown(wait=False, cancel_futures=True)
            return
        try:
            self._wait_for_write()
            self._write_pending_best()
        except CheckpointSaveError as error:
            logger.warning(str(error))
        finally:
            self._thread.shutdown()
            for store in self._stores.values():
                store.close()


def write_metrics(workdir: Path, history: list[dict[str, Any]]) -> None:
    """Replaces metrics.jsonl.

    Args:
        workdir: Folder of the run.
        history: Records of the finished epochs, one line each.

    Raises:
        CheckpointSaveError: The file cannot be written.
    """
    path = workdir / "metrics.jsonl"
    try:
        atomic_write(path, "".join(json.dumps(record) + "\n" for record in history).encode())
    except Exception as error:
        # Each object store has its own errors.
        if not (isinstance(error, OSError) or is_remote(path)):
            raise
        raise CheckpointSaveError(f"cannot write to {path} ({single_line(error)})") from error


def abstract_state(state: TrainState) -> Any:
    """The shapes and dtypes of a saved state. Its key is saved as plain numbers.

    Args:
        state: A state, or its shapes.

    Returns:
        A state of `jax.ShapeDtypeStruct`.
    """
    return jax.eval_shape(lambda: dataclasses.replace(state, key=jax.random.key_data(state.key)))


def model_variables(state: TrainState) -> dict[str, Any]:
    """The variables to apply a state's net with.

    Args:
        state: A state.

    Returns:
        "params", and "batch_stats" with batch normalisation.
    """
    variables = {"params": state.params}
    return variables | {"batch_stats": state.batch_stats} if state.batch_stats else variables


def _to_host(array: jax.Array) -> np.ndarray | None:
    """Copies an array to the main process, because the next step reuses the array's memory."""
    numbers = jax.random.key_data(array) if _is_key(array) else array
    return to_host(numbers, keep=is_main_process())


def _to_devices(array: np.ndarray, like: jax.Array) -> jax.Array:
    """Inverts `_to_host`, with the sharding of `like`."""
    placed = put_global(array, like.sharding)
    if _is_key(like):
        return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(like))
    return placed


def _is_key(array: jax.Array) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)
