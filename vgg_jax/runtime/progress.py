"""Progress of a long loop: a bar on a terminal, a line a minute in a log."""

import logging
import time
from typing import Any

logger = logging.getLogger(__name__)

SECONDS_PER_LINE = 60
BAR_DELAY = 2  # seconds; a shorter loop shows no bar


class ProgressBar:
    """The progress of a loop, on stderr if that is a terminal, else by log messages.

    Args:
        name: What the loop does, such as "epoch 3".
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
        """For example "epoch 3: 4,000 of 50,000 images (8%), 66.7 images/s, 12 min left"."""
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
