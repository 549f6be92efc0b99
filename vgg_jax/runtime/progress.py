"""Progress of a long loop: a bar on a terminal, a line a minute in a log; and of a whole run."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)

SECONDS_PER_LINE = 60
BAR_DELAY = 2  # seconds; a shorter loop shows no bar
ERASE_LINE = "\r\x1b[K"


@contextlib.contextmanager
def waiting_line(text: str, quiet: bool = False) -> Iterator[None]:
    """Shows a text on stderr until the block ends, if stderr is a terminal.

    Args:
        text: What is happening: "compiling the training step".
        quiet: Show nothing, as in all processes of a run but one.
    """
    stream = sys.stderr
    if quiet or not stream.isatty():
        yield
        return
    print(f"{text} …", end="", file=stream, flush=True)
    try:
        yield
    finally:
        print(ERASE_LINE, end="", file=stream, flush=True)


class ProgressBar:
    """The progress of a loop, on stderr if that is a terminal, else by log messages.

    Args:
        name: What the loop does, such as "epoch 3 of 74".
        total: Number of items.
        unit: An item, in the singular.
        initial: Number of items that are done already.
        quiet: Show nothing, as in all processes of a run but one.
    """

    def __init__(
        self, name: str, total: int, unit: str = "image", initial: int = 0, quiet: bool = False
    ) -> None:
        from tqdm import tqdm  # comes with the extra `train`

        self._name, self._total, self._unit = name, total, unit
        self._done = self._initial = initial
        # With None, tqdm disables the bar if stderr is no terminal.
        self._bar: Any = tqdm(
            desc=name,
            total=total,
            initial=initial,
            unit=f" {unit}s",
            leave=False,
            delay=BAR_DELAY,
            disable=True if quiet else None,
        )
        self._logs = self._bar.disable and not quiet
        self._start = self._logged = time.monotonic()

    def update(self, count: int = 1, note: str = "") -> None:
        """Counts items that are done.

        Args:
            count: Their number.
            note: What else to show, such as the loss.
        """
        self._done += count
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(count)
        now = time.monotonic()
        if self._logs and now - self._logged >= SECONDS_PER_LINE:
            self._logged = now
            logger.info(self._line(now - self._start, note))

    def _line(self, seconds: float, note: str) -> str:
        """For example "epoch 3 of 74: 4,000 of 50,000 images (8%), 66.7 images/s, 12 min left"."""
        rate = (self._done - self._initial) / seconds
        minutes = (self._total - self._done) / max(rate, 1e-9) / 60
        return (
            f"{self._name}: {self._done:,} of {self._total:,} {self._unit}s "
            f"({self._done / max(self._total, 1):.0%}), {f'{note}, ' if note else ''}"
            f"{rate:.1f} {self._unit}s/s, {minutes:.0f} min left"
        )

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class RunTimer:
    """Measures the epochs of a run, and estimates the time until its end.

    Args:
        max_epochs: Number of epochs of the run.
        may_end_early: The run may have fewer epochs.
    """

    def __init__(self, max_epochs: int, may_end_early: bool) -> None:
        self._max_epochs = max_epochs
        self._prefix = "at most " if may_end_early else ""
        self._epoch_seconds: float | None = None  # the last whole epoch of this process
        self.start_epoch(1, 0.0)

    def start_epoch(self, epoch: int, done: float) -> None:
        """Starts to measure an epoch.

        Args:
            epoch: Its number, from 1.
            done: Share of its training that is done already.
        """
        self._epoch, self._done, self._is_whole = epoch, done, done == 0
        self._start = time.monotonic()
        self._first: tuple[float, float] | None = None  # the first update: its time and share

    def update(self, done: float) -> None:
        """Counts training.

        Args:
            done: Share of this epoch's training that is done.
        """
        if self._first is None:  # the rate is measured from here on, without the compilation
            self._first = time.monotonic(), done
        self._done = done

    def finish_epoch(self) -> None:
        """Ends an epoch, after its validation and its save."""
        if self._is_whole:
            self._epoch_seconds = time.monotonic() - self._start

    def note(self) -> str:
        """For example "run: 2 h 5 min left". Empty if the time is not known yet."""
        now, training_seconds = time.monotonic(), None
        if self._first is not None and self._done > self._first[1]:
            training_seconds = (now - self._first[0]) / (self._done - self._first[1])
        seconds = run_seconds_left(
            epochs_left=self._max_epochs - self._epoch + 1,
            done=self._done,
            elapsed=now - self._start,
            epoch_seconds=self._epoch_seconds,
            training_seconds=training_seconds,
        )
        return "" if seconds is None else f"run: {self._prefix}{format_duration(seconds)} left"


def run_seconds_left(
    *,
    epochs_left: int,
    done: float,
    elapsed: float,
    epoch_seconds: float | None,
    training_seconds: float | None,
) -> float | None:
    """Estimates the time until the end of a run.

    Args:
        epochs_left: Number of epochs that are not finished, with the current one.
        done: Share of the current epoch's training that is done.
        elapsed: Seconds since the current epoch began.
        epoch_seconds: Duration of a whole epoch, if one was measured.
        training_seconds: Duration of an epoch's training at the current speed, if known. It counts
            if no whole epoch was measured.

    Returns:
        Seconds, or None if neither duration is known.
    """
    if epoch_seconds is not None:
        return (epochs_left - 1) * epoch_seconds + max(epoch_seconds - elapsed, 0)
    if training_seconds is not None:
        return (epochs_left - done) * training_seconds
    return None


def format_duration(seconds: float) -> str:
    """Formats a duration with its two largest units: "45 s", "5 min", "2 h 5 min", "3 d 4 h"."""
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"
