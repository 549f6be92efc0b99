"""The metadata of a run, `run.json`, and the decision between a new run and a resumed one."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from vgg_jax.configs.colours import ColourStatistics
from vgg_jax.configs.presets import resolve_learning_rate
from vgg_jax.configs.train import RESUMABLE_CHANGES, TrainConfig
from vgg_jax.division import BY_A_BUFFER, INPUT_VERSION
from vgg_jax.errors import InputError, single_line
from vgg_jax.paths import is_remote, to_path
from vgg_jax.runs.files import atomic_write, translate_write_errors


@dataclasses.dataclass(frozen=True)
class RunMetadata:
    """The facts about a run that resuming it, or using its network, depends on.

    The parameters of the network are in its checkpoints.
    """

    config: TrainConfig
    classes: tuple[str, ...]
    colours: ColourStatistics
    storage: str  # how the training images are stored, such as "folder, names <digest>"
    train_size: int  # images
    validation_size: int  # images
    # Root mean square of the pretrained activations that a new fc6 reads, if there is one.
    activation_rms: float | None = None
    input_version: int = 1  # see `vgg_jax.division.INPUT_VERSION`; 0.1.0 did not write it
    command: str | None = None  # that started it; None if `vgg_jax.fit` was called
    validation_storage: str | None = None  # as `storage`; None in runs of earlier versions
    # Versions and devices at its start; None in runs of earlier versions.
    environment: dict[str, str] | None = None


def load_existing_run(workdir: Path) -> RunMetadata | None:
    """Loads the run of a workdir if the workdir holds one of its checkpoints.

    Args:
        workdir: The folder of a run. It need not exist.

    Returns:
        The run, or None if no checkpoint was saved, so that a new run may use the workdir.

    Raises:
        InputError: `run.json` cannot be read, or epochs were finished and their checkpoint is gone.
    """
    has_last = has_checkpoint(workdir / "last")
    metrics = workdir / "metrics.jsonl"
    if not has_last and metrics.exists() and metrics.read_text():
        raise InputError(
            f"{workdir / 'last'} holds no checkpoint, and {metrics} lists finished epochs: "
            "expected the checkpoint of the last one; restore that folder, pass another --workdir, "
            "or remove this one to start again"
        )
    # A run that stopped, or ran out of memory, before its first checkpoint left only run.json.
    has_any = has_last or has_checkpoint(workdir / "best")
    # A run.json without a checkpoint is read too, so that a damaged one is reported.
    run = load_run(workdir) if has_any or (workdir / "run.json").exists() else None
    return run if has_any else None


def has_checkpoint(folder: Path) -> bool:
    """Tells if `last/` or `best/` holds a complete step, which may be damaged.

    Args:
        folder: The folder of the steps. A step that was set aside does not count.

    Returns:
        True if there is a step. On a disk, a step's folder appears once it is complete. In an
        object store, orbax marks a complete step by a file.
    """
    steps = [path for path in folder.glob("*") if path.name.isdigit()]
    if is_remote(folder):
        return any((step / "commit_success.txt").exists() for step in steps)
    return bool(steps)


def create_run(workdir: Path, run: RunMetadata) -> None:
    """Writes `run.json`.

    Args:
        workdir: The folder of the run. It exists, except in an object store.
        run: The metadata.

    Raises:
        InputError: The workdir cannot be written to.
    """
    with translate_write_errors(workdir):
        atomic_write(workdir / "run.json", (json.dumps(as_json(run), indent=1) + "\n").encode())


def check_same_run(workdir: Path, existing: RunMetadata, run: RunMetadata) -> list[str]:
    """Checks that a run is the one that its workdir holds already.

    The net, the recipe, the seed, and the names of the images and classes may not change. The path
    of the data, a larger number of epochs, the cache and the micro-batches may. With the schedule
    "cosine", the rate of each step depends on the number of epochs, so that may not change.

    Args:
        workdir: The folder of the run, for the message.
        existing: The run in the workdir.
        run: The run that is about to resume it.

    Returns:
        The changes of how it is carried out, such as "epochs was 4 and is 6".

    Raises:
        InputError: The two are different runs. The message lists every difference.
    """
    old, new = _flatten(as_json(existing)), _flatten(as_json(run))
    names = [name for name in new if not _is_equal(name, old[name], new[name])]
    changes = [name for name in names if _may_change(name, old, new)]
    differences = [
        f"{name} is {_shorten(repr(old[name]))} in run.json and {_shorten(repr(new[name]))} now"
        + (_epochs_rule(new) if name == "epochs" else "")
        for name in names
        if name not in changes
    ]
    if differences:
        raise InputError(
            f"{workdir} holds another run: {'; '.join(differences)}; "
            "pass the same flags to resume that run, or another --workdir to start a new one, "
            f"from this net by --init-from {workdir}"
        )
    return [
        f"{name} was {_shorten(repr(old[name]))} and is {_shorten(repr(new[name]))}"
        for name in changes
    ]


def _is_equal(name: str, old: Any, new: Any) -> bool:
    """Compares a field of two runs. One path may be spelt in several ways."""
    is_path = name == "init_from" and isinstance(old, str) and isinstance(new, str)
    if is_path and not is_remote(old) and not is_remote(new):
        return os.path.realpath(old) == os.path.realpath(new)
    is_information = name in ("command", "environment")
    return old == new or is_information or (name == "validation_storage" and old is None)


def _may_change(name: str, old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Tells if a field of a run may have another value when it resumes."""
    if name == "data":  # the same data, moved or spelt otherwise
        described = ("storage", "validation_storage", "classes", "train_size", "validation_size")
        return all(_is_equal(field, old[field], new[field]) for field in described)
    if name == "epochs":
        return old[name] < new[name] and new["schedule"] != "cosine"
    if name == "cache":
        is_in_parts = old["input_version"] == 1 or BY_A_BUFFER in old["storage"]
        return not ("tfrecord" in old["storage"] and is_in_parts)
    return name in RESUMABLE_CHANGES


def _epochs_rule(new: dict[str, Any]) -> str:
    is_cosine = new["schedule"] == "cosine"
    return ", and may not change with schedule 'cosine'" if is_cosine else ", and may only grow"


def load_run(workdir: Path) -> RunMetadata:
    """Reads `run.json`.

    Args:
        workdir: The folder of a run.

    Returns:
        The metadata of the run.

    Raises:
        InputError: There is no run in the workdir, or its `run.json` cannot be read.
    """
    path = to_path(workdir) / "run.json"
    if not is_remote(workdir) and path.parent.is_file():
        raise InputError(f"{workdir} is a file: expected the folder of a run")
    try:
        return from_json(json.loads(path.read_text()))
    except FileNotFoundError as error:
        # A user may have passed best/, or a step in it.
        runs = [parent for parent in path.parent.parents[:2] if (parent / "run.json").exists()]
        remedy = f"pass {runs[0]}" if runs else "pass the workdir of a run"
        raise InputError(
            f"no run in {workdir}: expected {path}, which `vgg-jax train` writes; {remedy}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be read ({single_line(error)}): expected the file that "
            "`vgg-jax train` wrote; train again into another --workdir"
        ) from error


def describe_run(run: RunMetadata) -> str:
    """Lists what started a run, its data and its configuration, for people.

    Args:
        run: The run.

    Returns:
        A line for each fact. A field of the configuration that is not the paper's has a star.
    """
    unknown = "unknown: vgg_jax.fit, or an earlier version of vgg-jax"
    sizes = f"{run.train_size:,} training and {run.validation_size:,} validation images"
    lines = [
        ("command", run.command or unknown),
        *((run.environment or {}).items()),
        ("images", f"{sizes} ({run.storage})"),
        ("classes", f"{len(run.classes)}: {_shorten(', '.join(run.classes))}"),
        ("mean RGB", _format_value(tuple(round(value, 3) for value in run.colours.mean_rgb))),
    ]
    lines += [(name, text + " *" * differs) for name, text, differs in settings(run.config)]
    width = max(len(name) for name, _ in lines) + 2
    text = "\n".join(f"{name:<{width}}{value}" for name, value in lines)
    return f"{text}\n* not the default of the paper"


def settings(config: TrainConfig) -> list[tuple[str, str, bool]]:
    """Lists a configuration.

    Args:
        config: The configuration.

    Returns:
        The name of each field, its value as a text, and if it is another one than the paper's.
    """
    paper = resolve_learning_rate(TrainConfig(), 1000)  # it fills in `scale`, too
    rows = []
    for field in dataclasses.fields(TrainConfig):
        value = getattr(config, field.name)
        differs = value != getattr(paper, field.name) and field.name != "data"
        rows.append((field.name, _format_value(value), differs))
    return rows


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return _shorten(" ".join(map(str, value))) or "none"
    return "none" if value is None else str(value)


def from_json(content: dict[str, Any]) -> RunMetadata:
    """Converts the JSON object of `as_json` back to the metadata.

    Args:
        content: The JSON object.

    Returns:
        The metadata of the run.

    Raises:
        Exception: One of the types that `load_run` catches, if the object is something else.
    """
    fields = dict(content)
    config = TrainConfig(**_lists_to_tuples(fields.pop("config")))
    colours = ColourStatistics(**_lists_to_tuples(fields.pop("colours")))
    run = RunMetadata(config, tuple(fields.pop("classes")), colours, **fields)
    _check_types(run)
    return run


def as_json(run: RunMetadata) -> dict[str, Any]:
    """Converts the metadata of a run to a JSON object, the content of `run.json`."""
    return json.loads(json.dumps(dataclasses.asdict(run)))


def _check_types(run: RunMetadata) -> None:
    """Raises TypeError for values of the wrong type, since anyone may have written the file."""
    colours = (run.colours.mean_rgb, run.colours.eigenvalues, *run.colours.eigenvectors)
    triples = len(colours) == 5 and all(isinstance(row, tuple) and len(row) == 3 for row in colours)
    if not triples or not all(isinstance(value, int | float) for row in colours for value in row):
        raise TypeError("its colours are not five rows of three numbers")
    if not run.classes or not all(isinstance(name, str) for name in (*run.classes, run.storage)):
        raise TypeError("its classes and its storage are not names")
    if not all(isinstance(size, int) for size in (run.train_size, run.validation_size)):
        raise TypeError("its sizes are not integers")
    if run.input_version not in range(1, INPUT_VERSION + 1):
        raise TypeError(f"its input_version is not one of 1 to {INPUT_VERSION}")
    if not isinstance(run.activation_rms, float | None):
        raise TypeError("its activation_rms is not a number")
    for name in ("command", "validation_storage"):
        if not isinstance(getattr(run, name), str | None):
            raise TypeError(f"its {name} is not a text")
    environment = {} if run.environment is None else run.environment
    if not isinstance(environment, dict) or not all(
        isinstance(value, str) for value in environment.values()
    ):
        raise TypeError("its environment is not an object of texts")


def _flatten(run: dict[str, Any]) -> dict[str, Any]:
    """Moves the fields of the config to the top level."""
    return {name: value for name, value in run.items() if name != "config"} | run["config"]


def _shorten(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}…"


def _lists_to_tuples(value: Any) -> Any:
    """Converts the lists of a JSON value, at any depth, but leaves the keys of an object."""
    if isinstance(value, dict):
        return {name: _lists_to_tuples(item) for name, item in value.items()}
    if isinstance(value, list):
        return tuple(map(_lists_to_tuples, value))
    return value
