"""A run's folder: `run.json` (what is trained on what), `last/` (to go on), `best/` (to use), `metrics.jsonl`; all that knows orbax.

A step folder becomes visible by one rename when it is whole, and the one before it is removed afterwards: a process killed in
between leaves a readable run.
"""

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import jax

from vgg_jax.configs import Statistics, TrainConfig
from vgg_jax.errors import InputError
from vgg_jax.model import VGG
from vgg_jax.train_step import TrainState, build_model

try:
    import orbax.checkpoint as ocp
except ImportError as error:
    raise InputError("reading and writing runs needs orbax-checkpoint: pip install 'vgg-jax[train]'") from error


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run is besides its parameters: all that using the net later needs to know, and all that its course depends on."""

    config: TrainConfig
    classes: tuple[str, ...]
    colours: Statistics
    storage: str  # of the training images
    train_size: int
    validation_size: int


def begun_run(workdir: Path) -> Run | None:
    """The run that the workdir holds a checkpoint of, if any. Raises InputError for a run.json that cannot be read."""
    # A run that was stopped, or ran out of memory, before its first checkpoint left nothing but its name.
    saved = any(step.name.isdigit() for folder in ("last", "best") for step in (workdir / folder).glob("*"))
    run = read_run(workdir) if saved or (workdir / "run.json").exists() else None
    return run if saved else None


def begin_run(workdir: Path, run: Run) -> None:
    """Writes run.json. Raises InputError for a folder that cannot be written to."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_whole(workdir / "run.json", json.dumps(_plain(run), indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write to {workdir} ({error.strerror}): expected a folder of the run; pass another --workdir") from error


def refuse_another(workdir: Path, begun: Run, run: Run) -> None:
    """Raises InputError, with the differences, where the run that was begun in the workdir is not this one."""
    old, new = _flat(_plain(begun)), _flat(_plain(run))
    differences = [f"{name} is {old[name]!r} there and {new[name]!r} here" for name in new if old[name] != new[name]]
    if differences:
        raise InputError(
            f"{workdir} holds another run: {'; '.join(differences)}; pass another --workdir, or the same flags to go on with that run"
        )


def read_run(workdir: Path) -> Run:
    """Raises InputError where there is no run, or none that can be read."""
    path = Path(workdir) / "run.json"
    try:
        content = json.loads(path.read_text())
        config = TrainConfig(**{name: _tuples(value) for name, value in content.pop("config").items()})
        colours = Statistics(**{name: _tuples(value) for name, value in content.pop("colours").items()})
        return Run(config, tuple(content.pop("classes")), colours, **content)
    except FileNotFoundError as error:
        raise InputError(f"no run in {workdir}: expected {path}, which `vgg-jax train` writes; pass the workdir of a run") from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, OSError, InputError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): expected what `vgg-jax train` wrote; train again into another --workdir"
        ) from error


def load(workdir: str | os.PathLike) -> tuple[VGG, dict[str, Any], dict[str, Any]]:
    """The network of a run at its best validation accuracy: `(model, variables, metadata)`.

    `model.apply(variables, images)` gives logits, for images as `metadata["preprocessing"]` says. `metadata` has the `config`, `net`,
    `flip` (whether it was trained with mirror images), `classes`, `preprocessing`, `epoch` (from 1) and `validation` (loss, errors,
    count). Raises InputError where there is no such run.
    """
    run = read_run(Path(workdir))
    model = build_model(run.config, len(run.classes))
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), "float32")
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), dict(shapes))
    folder = Path(workdir) / "best"
    restored = None
    if folder.is_dir():
        with Saved(folder, read_only=True) as best:
            restored = best.restore(shapes)
    if restored is None:
        raise InputError(f"no trained net in {folder}: expected one after the first epoch; run the same `vgg-jax train` again to go on")
    variables, progress = restored
    preprocessing = {
        "mean_rgb": run.colours.mean_rgb,
        "range": (0, 255),
        "channels": "RGB",
        "image_size": run.config.image_size,
        "scale": run.config.test_scale,  # Q, the shorter side; the centre crop is read
        "interpolation": "bilinear, antialiased",
        "exif": run.config.exif,
    }
    known = {
        "config": run.config,
        "net": run.config.net,
        "flip": run.config.flip,
        "top": True,
        "classes": run.classes,
        "preprocessing": preprocessing,
    }
    return model, variables, known | progress


class Saved:
    """A folder of checkpoints, each a tree of arrays with a JSON object; only the newest is kept."""

    def __init__(self, folder: Path, read_only: bool = False) -> None:
        absl = logging.getLogger("absl")
        level = absl.level
        if read_only:  # orbax warns that it then neither saves nor creates
            absl.setLevel(logging.ERROR)
        try:
            # Without the background thread: on a CPU it would read the very arrays that are donated to the next step.
            options = ocp.CheckpointManagerOptions(
                max_to_keep=1, enable_async_checkpointing=False, read_only=read_only, cleanup_tmp_directories=not read_only
            )
            self._manager = ocp.CheckpointManager(folder.absolute(), options=options)
        finally:
            absl.setLevel(level)
        self._folder = folder

    def save(self, step: int, arrays: Any, progress: dict[str, Any]) -> None:
        """Saves what a run holds at a step, unless it is there: the same run came to the same step."""
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(progress))
        self._manager.save(step, args=items, force=True)

    def restore(self, shapes: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint, its arrays with the shapes and shardings given, or None where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(shapes), progress=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except (ValueError, KeyError, TypeError, OSError) as error:  # what orbax makes of cut and missing files
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"the checkpoint {self._folder / str(step)} cannot be read ({reason}): expected it as it was written; restore that folder, "
                "or train again into another --workdir"
            ) from error
        return restored.arrays, restored.progress

    def __enter__(self) -> "Saved":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()


def restore_state(last: Saved, state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """The state to go on with, placed as the given one is, and the run's progress."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    return last.restore(shapes)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file in one step: a reader, or a killed writer, never leaves half of it."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _plain(run: Run) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(run)))


def _flat(run: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in run.items() if name != "config"} | run["config"]


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
