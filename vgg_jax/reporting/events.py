"""TensorBoard's events of a run: losses, layers and crops, in a file that grows with the run."""

import contextlib
import io
import logging
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vgg_jax.errors import InputError, install_hint, single_line
from vgg_jax.metrics import MetricSums, finalize, merge
from vgg_jax.reporting.grid import add_colour_shift, make_grid

logger = logging.getLogger(__name__)

METRICS = ("loss", "top1_error", "top5_error")
POINT_SECONDS = 0.1  # between two points of a curve, so that short steps do not pay for each
FLUSH_SECONDS = 5
MAX_CROPS = 16
MAX_PNG_BYTES = 2**18  # of the pixels of all crops; larger ones become a JPEG


class TrainingEvents:
    """Writes the events of a run to a new file in a folder.

    A step is the number of finished steps of the run, from 1. An OSError, as on a full disk, is
    logged as a warning, and nothing is written any more.

    Args:
        folder: The folder, on this machine. It is created if it is missing.
        first_step: The first step that this process computes. TensorBoard drops what earlier files
            have from it on: the steps of a killed process that are computed again.

    Raises:
        InputError: The folder cannot be written to, or tensorboardX is missing.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        require_tensorboardx()
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import RecordWriter

        self._folder = folder
        self._sums, self._step, self._lr = MetricSums(), 0, 0.0
        self._point_at = self._flushed_at = time.monotonic()
        # Not tensorboardX's SummaryWriter: on a full disk its thread dies, and the next steps wait
        # for it forever. Its EventsWriter does not close a file that it cannot flush.
        self._writer: Any = None
        # TensorBoard reads the files in the order of their names. Two runs may start in a second.
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{time.time_ns()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(str(folder / name))
            self._write(0, file_version="brain.Event:2")
            self._write(first_step, session_log=SessionLog(status=SessionLog.START))
            self._writer.flush()
        except OSError as error:
            self._close_file()
            raise InputError(
                f"cannot write to {folder} ({single_line(error)}): expected a folder for "
                "TensorBoard's events; make it writable, or leave out --tensorboard"
            ) from error

    def start_epoch(self) -> None:
        """Starts to measure the speed of an epoch's training."""
        self._point_at = time.monotonic()

    def add_step(
        self,
        step: int,
        sums: MetricSums,
        learning_rate: float,
        statistics: Mapping[str, float],
    ) -> None:
        """Adds a training step. The means of several short steps are one point.

        Args:
            step: Number of the step.
            sums: Sums over its images, as Python numbers.
            learning_rate: The learning rate of the step.
            statistics: Further numbers of this step, by the names of their curves.
        """
        self._sums, self._step, self._lr = merge(self._sums, sums), step, learning_rate
        now = time.monotonic()
        if now - self._point_at >= POINT_SECONDS:
            self._write_point(now)
        if statistics:
            self._write_scalars(step, statistics)
        if now - self._flushed_at >= FLUSH_SECONDS:
            self._flush()

    def add_crops(self, step: int, images: np.ndarray, colour_shift: np.ndarray) -> None:
        """Adds training crops as one image.

        Args:
            step: Number of the step that the crops are from.
            images: uint8 (N, H, W, 3).
            colour_shift: float (N, 3), on the 0-255 scale.
        """
        from PIL import Image
        from tensorboardX.proto.summary_pb2 import Summary

        pixels = add_colour_shift(images[:MAX_CROPS], colour_shift[:MAX_CROPS])
        grid, buffer = make_grid(pixels), io.BytesIO()
        # A large PNG is slow to encode, and to compute tensorboardX's checksum of
        # (docs/performance.md#tensorboard).
        format = "PNG" if grid.size <= MAX_PNG_BYTES else "JPEG"
        Image.fromarray(grid).save(buffer, format, quality=95, subsampling=0)
        image = Summary.Image(
            height=grid.shape[0],
            width=grid.shape[1],
            colorspace=3,
            encoded_image_string=buffer.getvalue(),
        )
        self._try_to_write(step, summary=Summary(value=[Summary.Value(tag="crops", image=image)]))

    def finish_training(self) -> None:
        """Writes the steps that are no point yet, at the end of an epoch or before a stop."""
        self._write_point(time.monotonic())
        self._flush()

    def add_epoch(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds the averages of a finished epoch.

        Args:
            step: Number of its last step.
            record: Its record, as in metrics.jsonl.
        """
        parts = {"train_epoch": record["train"], "validation": record["validation"]}
        scalars = {
            f"{part}/{name}": values[name] for part, values in parts.items() for name in METRICS
        }
        self._write_scalars(step, scalars)
        self._flush()

    def close(self) -> None:
        """Closes the file."""
        self._flush()
        self._close_file()

    def _write_point(self, now: float) -> None:
        """Writes the means over the images since the last point."""
        if self._sums.count:
            means = finalize(self._sums)
            scalars = {f"train/{name}": means[name] for name in METRICS}
            scalars["learning_rate"] = self._lr
            scalars["images_per_second"] = self._sums.count / max(now - self._point_at, 1e-9)
            self._write_scalars(self._step, scalars)
        self._sums, self._point_at = MetricSums(), now

    def _write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._try_to_write(step, summary=Summary(value=values))

    def _flush(self) -> None:
        self._flushed_at = time.monotonic()
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError as error:
                self._warn(error)

    def _try_to_write(self, step: int, **content: Any) -> None:
        if self._writer is not None:
            try:
                self._write(step, **content)
            except OSError as error:
                self._warn(error)

    def _write(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        event = Event(wall_time=time.time(), step=step, **content)
        self._writer.write(event.SerializeToString())

    def _warn(self, error: OSError) -> None:
        self._close_file()
        logger.warning(
            f"cannot write to {self._folder} ({single_line(error)}): training goes on without "
            "events for TensorBoard"
        )

    def _close_file(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):  # it tries once more to write the rest
                writer.close()


def require_tensorboardx() -> None:
    """Checks that tensorboardX is installed.

    Raises:
        InputError: It is not.
    """
    try:
        import tensorboardX  # noqa: F401
    except ImportError as error:
        raise InputError(f"--tensorboard needs tensorboardX: {install_hint('report')}") from error
