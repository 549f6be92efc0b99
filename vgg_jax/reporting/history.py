"""The finished epochs of a run, as `metrics.jsonl` lists them."""

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

from vgg_jax.errors import InputError, single_line
from vgg_jax.paths import is_remote, to_path
from vgg_jax.runs.metadata import RunMetadata, load_run

Record = dict[str, Any]


@dataclasses.dataclass
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
    def rate_changes(self) -> list[tuple[int, float]]:
        """The epochs after which the learning rate changed, and the new rates.

        There are none with the schedule "cosine", which changes it in each step.
        """
        if self.run.config.schedule == "cosine":
            return []
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
    records = read_records(folder / "metrics.jsonl")
    return RunHistory(folder, run_name(path), run, records, read_divergence(folder))


def run_name(path: str | os.PathLike) -> str:
    """The last part of a run's path."""
    text = os.fspath(path)
    return os.path.basename(text.rstrip("/") if is_remote(text) else os.path.abspath(text))


def read_divergence(folder: Path) -> str | None:
    """The error that ended a run that diverged, or None.

    Args:
        folder: Folder of the run.

    Raises:
        InputError: The file cannot be read.
    """
    path = folder / "diverged.txt"
    try:
        return path.read_text().strip() if path.exists() else None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read ({single_line(error)}): expected the text that `vgg-jax train` "
            "wrote; remove it"
        ) from error


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
    for name in ("epoch", "seconds", "images_per_second", "input_wait_seconds", "learning_rate"):
        float(record[name])
    float(record.get("validation_seconds", 0))
    for split in ("train", "validation"):
        for name in ("loss", "top1_error", "top5_error", "accuracy", "count"):
            float(record[split][name])


def time_shares(records: list[Record]) -> dict[str, float]:
    """Divides the time of a run's finished epochs into its parts.

    Args:
        records: The records.

    Returns:
        Seconds by part: "training steps", "waiting for images" and "validation". The last one is
        missing if an earlier version wrote a record.
    """
    waited = sum(record["input_wait_seconds"] for record in records)
    steps = sum(record["seconds"] for record in records) - waited
    shares = {"training steps": steps, "waiting for images": waited}
    if all("validation_seconds" in record for record in records):
        shares["validation"] = sum(record["validation_seconds"] for record in records)
    return shares
