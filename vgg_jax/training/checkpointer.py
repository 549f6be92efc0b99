"""The saving of a run while it trains on, and what it goes on from.

Of several processes the first alone has the files: it collects what the others hold, and sends them what it reads. So a checkpoint is the
same whatever wrote it, and any number of processes reads it, on any mesh.
"""

import contextlib
import dataclasses
import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

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


class BestInfo(NamedTuple):
    """What is to be known of a state that is the best so far, besides its variables."""

    epoch: int
    validation: dict[str, Any]


class Checkpointer:
    """Saves a run while it trains on: what is to be saved is copied, and a thread writes the copies, one save after the other.

    A save that fails is warned of and is in `last_error` until another one succeeds; the best net is owed until then.
    Of several processes the first one writes, and the others help it to collect what it writes.
    """

    def __init__(self, workdir: Path) -> None:
        self._files: tuple[CheckpointStore, ...] = (
            (CheckpointStore(workdir / "last"), CheckpointStore(workdir / "best"))
            if is_main_process()
            else ()
        )
        self.last_error: CheckpointSaveError | None = None
        self._workdir = workdir
        self._owed: tuple[int, Any, dict[str, Any]] | None = None
        self._thread = ThreadPoolExecutor(1, "saving")
        self._writing: Future[None] | None = None

    def save(
        self, step: int, state: TrainState, progress: dict[str, Any], best: BestInfo | None = None
    ) -> None:
        """Of a state on the devices, a JSON object that begins with the `history`, and, if it is the best so far, what is known of it."""
        self.wait()  # one copy at a time
        copied = jax.tree.map(_to_host, state)
        if not is_main_process():  # which has given its share
            return
        if best is not None:
            self._owed = best.epoch, model_variables(copied), best._asdict()
        self._writing = self._thread.submit(self._write, step, copied, progress)

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The state to go on with, placed as the given one is, and the run's progress; None where there is nothing to go on from."""
        found: list[Any] = []

        def read() -> dict[str, Any] | None:
            found.extend(self._files[0].restore(abstract_state(state)) or (None, None))
            return found[1]

        progress = run_on_main_and_broadcast(read)
        if progress is None:
            return None
        arrays = (
            found[0]
            if found
            else jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_state(state))
        )
        return jax.tree.map(
            lambda array, like: _to_devices(broadcast_from_main(array), like), arrays, state
        ), progress

    def has_best(self, state: TrainState) -> bool:
        """Whether there is a best net that is whole."""
        return run_on_main_and_broadcast(
            lambda: self._files[1].restore(model_variables(state)) is not None
        )

    def delete_best_after(self, epoch: int) -> None:
        if is_main_process():
            self._files[1].delete_after(epoch)

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Where that fails the next save says so."""
        if is_main_process():
            with contextlib.suppress(CheckpointSaveError):
                write_metrics(self._workdir, history)

    def wait_until_finished(self) -> None:
        """Waits until all is written. Raises CheckpointSaveError in all processes where the end is not."""

        def reason() -> str | None:
            self.wait()
            return str(self.last_error) if self.last_error else None

        if failed := run_on_main_and_broadcast(reason):
            raise CheckpointSaveError(failed)

    def wait(self) -> None:
        """Until all is written that can be."""
        if self._writing is not None:
            self._writing.result()
        self._writing = None

    def _write(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
        try:
            self._pay()
            self._files[0].save(step, state, progress)
            write_metrics(self._workdir, progress["history"])
            self.last_error = None
        except CheckpointSaveError as error:
            self.last_error = error
            print(
                f"warning: {error}; what was saved before is still there",
                file=sys.stderr,
                flush=True,
            )

    def _pay(self) -> None:
        if self._owed is not None:
            self._files[1].save(*self._owed)
        self._owed = None

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:  # at once
            self._thread.shutdown(wait=False, cancel_futures=True)
            return
        try:
            self.wait()
            self._pay()
        except CheckpointSaveError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
        finally:
            self._thread.shutdown()
            for saved in self._files:
                saved.close()


def write_metrics(workdir: Path, history: list[dict[str, Any]]) -> None:
    """metrics.jsonl, a line an epoch, all anew. Raises CheckpointSaveError."""
    path = workdir / "metrics.jsonl"
    try:
        atomic_write(path, "".join(json.dumps(record) + "\n" for record in history).encode())
    except Exception as error:
        if not (isinstance(error, OSError) or is_remote(path)):
            raise
        raise CheckpointSaveError(f"cannot write to {path} ({single_line(error)})") from error


def abstract_state(state: TrainState) -> Any:
    """What is saved of a state: its key as plain numbers."""
    return jax.eval_shape(lambda: dataclasses.replace(state, key=jax.random.key_data(state.key)))


def _to_host(array: jax.Array) -> np.ndarray | None:
    """In memory of its own, for the first process: the next step reuses the array's."""
    return to_host(
        jax.random.key_data(array) if _is_key(array) else array, keep=is_main_process()
    )


def _to_devices(array: np.ndarray, like: jax.Array) -> jax.Array:
    """The opposite, placed as `like` is."""
    if _is_key(like):
        return jax.random.wrap_key_data(
            put_global(array, like.sharding), impl=jax.random.key_impl(like)
        )
    return put_global(array, like.sharding)


def _is_key(array: jax.Array) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def model_variables(state: TrainState) -> dict[str, Any]:
    """What the net of a state is applied with: `params`, and with batch normalisation `batch_stats`."""
    return {"params": state.params} | (
        {"batch_stats": state.batch_stats} if state.batch_stats else {}
    )
