"""What a run is: its `run.json`, and its folder, which one process at a time has."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from vgg_jax.configs.colours import ColourStatistics
from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError
from vgg_jax.paths import is_remote, to_path
from vgg_jax.runs.files import atomic_write, translate_write_errors


@dataclasses.dataclass(frozen=True)
class RunMetadata:
    """What a run is besides its parameters: all that using the net later needs to know, and all that its course depends on."""

    config: TrainConfig
    classes: tuple[str, ...]
    colours: ColourStatistics
    storage: str  # of the training images
    train_size: int
    validation_size: int


def load_existing_run(workdir: Path) -> RunMetadata | None:
    """The run that the workdir holds a checkpoint of, if any.

    Raises InputError for a run.json that cannot be read, and where epochs were done and there is nothing to go on from.
    """
    last = has_checkpoint(workdir / "last")
    metrics = workdir / "metrics.jsonl"
    if not last and metrics.exists() and metrics.read_text():
        raise InputError(
            f"{workdir / 'last'} holds no checkpoint, and {metrics} tells of epochs that were done: expected one; restore that folder, "
            "pass another --workdir, or remove this one to begin again"
        )
    # A run that was stopped, or ran out of memory, before its first checkpoint left nothing but its name.
    saved = last or has_checkpoint(workdir / "best")
    run = load_run(workdir) if saved or (workdir / "run.json").exists() else None
    return run if saved else None


def has_checkpoint(folder: Path) -> bool:
    """Whether `last/` or `best/` holds a step, damaged or not, that was not set aside.

    On a disk a step appears when it is whole; in an object store orbax marks it when it is.
    """
    steps = [step for step in folder.glob("*") if step.name.isdigit()]
    return (
        any((step / "commit_success.txt").exists() for step in steps)
        if is_remote(folder)
        else bool(steps)
    )


def create_run(workdir: Path, run: RunMetadata) -> None:
    """Writes run.json. Raises InputError for a folder that cannot be written to."""
    with translate_write_errors(workdir):
        atomic_write(workdir / "run.json", (json.dumps(as_json(run), indent=1) + "\n").encode())


def check_same_run(workdir: Path, begun: RunMetadata, run: RunMetadata) -> None:
    """Raises InputError, with the differences, where the run that was begun in the workdir is not this one."""
    old, new = _flat(as_json(begun)), _flat(as_json(run))
    differences = [
        f"{name} is {_shown(old[name])} there and {_shown(new[name])} here"
        for name in new
        if old[name] != new[name]
    ]
    if differences:
        raise InputError(
            f"{workdir} holds another run: {'; '.join(differences)}; pass another --workdir, or the same flags to go on with that run"
        )


def load_run(workdir: Path) -> RunMetadata:
    """Raises InputError where there is no run, or none that can be read."""
    path = to_path(workdir) / "run.json"
    try:
        return from_json(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise InputError(
            f"no run in {workdir}: expected {path}, which `vgg-jax train` writes; pass the workdir of a run"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read ({' '.join(str(error).split())[:200]}): expected what `vgg-jax train` wrote; "
            "train again into another --workdir"
        ) from error


def from_json(content: dict[str, Any]) -> RunMetadata:
    """The run that `as_json` made this JSON object of. Raises one of many errors for another."""
    rest = dict(content)
    config = TrainConfig(**{name: _tuples(value) for name, value in rest.pop("config").items()})
    colours = ColourStatistics(
        **{name: _tuples(value) for name, value in rest.pop("colours").items()}
    )
    run = RunMetadata(config, tuple(rest.pop("classes")), colours, **rest)
    _check_types(run)
    return run


def as_json(run: RunMetadata) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(run)))


def _check_types(run: RunMetadata) -> None:
    """Raises TypeError: what a stranger wrote may be anything."""
    colours = (run.colours.mean_rgb, run.colours.eigenvalues, *run.colours.eigenvectors)
    triples = len(colours) == 5 and all(isinstance(row, tuple) and len(row) == 3 for row in colours)
    if not triples or not all(isinstance(value, int | float) for row in colours for value in row):
        raise TypeError("its colours are no numbers, three by three")
    if not run.classes or not all(isinstance(name, str) for name in (*run.classes, run.storage)):
        raise TypeError("its classes and its storage are no names")
    if not all(isinstance(size, int) for size in (run.train_size, run.validation_size)):
        raise TypeError("its sizes are no numbers")


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "config"} | run["config"]


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}…"


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
