"""The finished epochs of a run, as `metrics.jsonl` lists them."""

import dataclasses
import datetime
import itertools
import json
import os
from pathlib import Path
from typing import Any

from vgg_jax.errors import InputError, single_line
from vgg_jax.paths import to_path
from vgg_jax.runs.metadata import RunMetadata, load_run

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """A run and its finished epochs.

    Attributes:
        path: Folder of the run.
        name: Name of the folder, for legends.
        run: The content of run.json.
        records: A record for each finished epoch, as `vgg_jax.fit` returns them.
        divergence: The error that ended the run, if it diverged.
    """

    path: Path
    name: str
    run: RunMetadata
    records: list[Record]
    divergence: str | None = None

    @property
    def best(self) -> Record:
        """The first record with the best validation accuracy. There is at least one record."""
        return max(self.records, key=lambda record: record["validation"]["accuracy"])

    @property
    def drops(self) -> list[tuple[int, float]]:
        """The epochs before which the learning rate changed, and the new rates."""
        rates = [record["learning_rate"] for record in self.records]
        changes = enumerate(itertools.pairwise(rates))
        return [
            (self.records[i]["epoch"], rate) for i, (earlier, rate) in changes if rate != earlier
        ]


def read_run(path: str | os.PathLike) -> RunHistory:
    """Reads a run's metadata and its finished epochs.

    Args:
        path: Folder of the run.

    Returns:
        The run. A run without a finished epoch has no records.

    Raises:
        InputError: There is no run in the folder, or a file of it cannot be read.
    """
    folder = to_path(path)
    run = load_run(folder)
    name = os.path.basename(os.path.normpath(os.fspath(path))) or str(path)
    divergence = folder / "diverged.txt"
    try:
        message = divergence.read_text().strip() if divergence.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{divergence} cannot be read ({single_line(error)})") from error
    return RunHistory(folder, name, run, read_records(folder / "metrics.jsonl"), message)


def read_records(path: Path) -> list[Record]:
    """Reads `metrics.jsonl`.

    Args:
        path: The file. It need not exist.

    Returns:
        The records.

    Raises:
        InputError: The file is not one that `vgg-jax train` wrote.
    """
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        records = [json.loads(line) for line in lines]
        for record in records:
            _check_record(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({single_line(error)}): expected the file that `vgg-jax train` "
            "wrote; resume the run, which writes it again from the checkpoint"
        ) from error
    return records


def _check_record(record: Any) -> None:
    for name in ("epoch", "seconds", "input_wait_seconds", "learning_rate"):
        float(record[name])
    for split in ("train", "validation"):
        for name in ("loss", "top1_error", "top5_error", "accuracy", "count"):
            float(record[split][name])
    datetime.datetime.fromisoformat(record["time"])


def time_shares(records: list[Record]) -> dict[str, float]:
    """Divides the time of a run into its parts.

    A run that was stopped and resumed has gaps. The time between two epochs that is longer than
    twice the median is left out.

    Args:
        records: The records.

    Returns:
        Seconds by part: "training steps", "waiting for images", and "validation and saving", which
        is known from the second epoch on.
    """
    waited = sum(record["input_wait_seconds"] for record in records)
    steps = sum(record["seconds"] for record in records) - waited
    ends = [datetime.datetime.fromisoformat(record["time"]).timestamp() for record in records]
    others = sorted(
        max(0.0, end - start - record["seconds"])
        for start, end, record in zip(ends, ends[1:], records[1:], strict=False)
    )
    median = others[len(others) // 2] if others else 0.0
    # The time stamps are whole seconds.
    validation = sum(other for other in others if other <= 2 * median + 2)
    return {
        "training steps": steps,
        "waiting for images": waited,
        "validation and saving": validation,
    }
