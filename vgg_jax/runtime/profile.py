"""A trace of some training steps, by JAX's profiler."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import jax

from vgg_jax.errors import InputError, single_line

logger = logging.getLogger(__name__)


class StepProfile:
    """Traces a range of steps to a folder.

    A trace that cannot be written is logged as a warning.

    Args:
        steps: The first and the last step, counted from 1 in this process.
        folder: The log folder of TensorBoard, on this machine.

    Raises:
        InputError: The steps are no range.
    """

    def __init__(self, steps: tuple[int, int], folder: Path) -> None:
        is_pair = isinstance(steps, tuple) and [type(step) for step in steps] == [int, int]
        if not is_pair or not 1 <= steps[0] <= steps[1]:
            raise InputError(
                f"profile is {steps}: expected the first and the last step, counted from 1, "
                "such as (10, 20)"
            )
        self._first, self._last = steps
        self._folder = folder
        self._num_steps = 0
        self._is_tracing = self._is_done = False

    def annotate_step(self) -> contextlib.AbstractContextManager[Any]:
        """Names the step of a block in the trace. Starts the trace at its first step."""
        if self._num_steps + 1 == self._first and not self._is_done:
            self._start()
        if not self._is_tracing:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=self._num_steps + 1)

    def count_step(self, outputs: Any) -> None:
        """Counts a step, after its block. Writes the trace after its last step.

        Args:
            outputs: The arrays that the step computes. The trace ends when they are ready.
        """
        self._num_steps += 1
        if self._is_tracing and self._num_steps == self._last:
            jax.block_until_ready(outputs)
            self._stop()

    def close(self) -> None:
        """Writes the trace if it is not written yet. Tells how many steps it has."""
        if self._is_tracing:
            self._stop()
        elif not self._is_done and self._num_steps:
            logger.info(
                f"no trace was written: training ended after {self._num_steps} steps, and the "
                f"trace would have begun at step {self._first}"
            )
        self._is_done = True

    def _start(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._is_tracing = True
        except (OSError, RuntimeError) as error:
            self._warn(error)

    def _stop(self) -> None:
        self._is_tracing, self._is_done = False, True
        try:
            jax.profiler.stop_trace()
            [path] = _newest_session(self._folder).glob("perfetto_trace.json.gz")
        except (OSError, RuntimeError, ValueError) as error:
            self._warn(error)
            return
        number = self._num_steps - self._first + 1
        logger.info(
            f"the trace of {number} step{'' if number == 1 else 's'}, {self._first} to "
            f"{self._num_steps}, is {path}: open it at https://ui.perfetto.dev"
        )

    def _warn(self, error: Exception) -> None:
        self._is_done = True
        logger.warning(
            f"cannot write a trace to {self._folder} ({single_line(error)}): training goes on "
            "without one"
        )


def _newest_session(folder: Path) -> Path:
    """The folder of the last trace below a log folder."""
    return max((folder / "plugins" / "profile").iterdir(), key=lambda path: path.stat().st_mtime)
