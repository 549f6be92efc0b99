"""Training: one long, flat story from a configuration to a folder with a trained network."""

import contextlib
import dataclasses
import json
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vgg_jax.checkpoint import (
    NotSavedError,
    Run,
    Saved,
    begin_run,
    begun_run,
    has_checkpoint,
    locked,
    refuse_another,
    restore_best,
    restore_state,
    variables_of,
    write_whole,
)
from vgg_jax.configs import IMAGENET, TrainConfig
from vgg_jax.data import Source, batches_per_epoch, cached, eval_batches, measure, open_splits, train_batches
from vgg_jax.errors import InputError
from vgg_jax.metrics import Sums, merge
from vgg_jax.model import FROM_A, VGG, init_from
from vgg_jax.optimizer import learning_rate, set_learning_rate, sgd
from vgg_jax.presets import with_learning_rate
from vgg_jax.report import advice, diverged, epoch_record, line, stuck
from vgg_jax.sharding import data_mesh, put_batch
from vgg_jax.train_step import TrainState, build_model, compile_steps, init_state
from vgg_jax.weights import load

SAVE_SECONDS = 600  # between two saves within an epoch


class DivergedError(Exception):
    """The loss is not a number; nothing of that is saved."""


class InFlight(NamedTuple):
    """A batch whose step is in progress: the host reads its sums when the next one is on its way."""

    sums: Sums
    number: int
    examples: np.ndarray  # their indices, int64 (N,)


class Outcome(NamedTuple):
    """How a run stands: a record for each epoch that is done, and whether it was stopped before its end."""

    history: list[dict[str, Any]]
    stopped: bool


def fit(config: TrainConfig, workdir: str | Path, data_dir: str | Path | None = None, download: bool = False) -> Outcome:
    """Trains a network, or goes on with the training that the workdir holds; prints a line an epoch.

    Each epoch is one pass over all training images; then the validation images drive the learning rate and which state is the best
    (§3.1). SIGINT or SIGTERM ends it after the step in hand, saved; a second one at once. Raises InputError for anything wrong in the
    input, DivergedError where the loss becomes infinite or NaN, NotSavedError where the end could not be saved: a full disk before that
    is warned of, and training goes on.
    """
    with locked(Path(workdir)):
        return _fit(config, Path(workdir), data_dir, download)


def _fit(config: TrainConfig, workdir: Path, data_dir: str | Path | None, download: bool) -> Outcome:
    mesh = data_mesh(config.microbatch or config.batch_size)
    begun = begun_run(workdir)
    if begun is not None:  # what can be said now is not said after the data are read
        refuse_another(workdir, begun, dataclasses.replace(begun, config=with_learning_rate(config, len(begun.classes))))
    # Killed, or out of room, behind the first best and before what it would go on from: it starts as it did.
    resumes = begun is not None and has_checkpoint(workdir / "last")
    source = load(config.init_from) if config.init_from is not None and not resumes else None
    train, validation = open_splits(
        config.data,
        data_dir=None if data_dir is None else str(data_dir),
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        skip_bad=config.skip_bad,
        download=download,
    )
    print(f"{config.data}: {train.size} training and {validation.size} validation images of {len(train.classes)} classes", flush=True)
    if train.skipped or validation.skipped:
        print(f"skipped {train.skipped} training and {validation.skipped} validation files that are no images", flush=True)
    config = with_learning_rate(config, len(train.classes))
    run = Run(config, train.classes, begun.colours if begun else IMAGENET, train.storage, train.size, validation.size)
    if begun is not None:
        refuse_another(workdir, begun, run)
    if config.cache:
        train, validation = cached(train, config), cached(validation, config)
    if begun is None:
        if config.statistics == "measure":
            run = dataclasses.replace(run, colours=measure(train).statistics)
        begin_run(workdir, run)
    colours = run.colours

    # From here on: a KeyboardInterrupt that is raised while JAX traces or compiles may be lost, or end in a crash.
    with stop_signals() as stop, Saved(workdir / "last") as last, Saved(workdir / "best") as best:
        model = build_model(config, len(train.classes))
        train_step, eval_step = compile_steps(config, model, colours.mean_rgb, mesh)
        state = init_state(model, sgd(config), config.seed, mesh)
        per_epoch = batches_per_epoch(train, config.batch_size)
        at_once = min(config.microbatch or config.batch_size, -(-validation.size // mesh.size) * mesh.size)
        validation_batches = eval_batches(validation, config, at_once)
        history: list[dict[str, Any]] = []
        batch_number, seconds, waited, sums = 0, 0.0, 0.0, Sums()

        owed: tuple[int, Any, dict[str, Any]] | None = None  # the best net, as long as it is not saved
        unsaved: NotSavedError | None = None  # why the last save failed, if it did

        restored = restore_state(last, state) if begun else None
        if begun is not None:
            restore_best(best, state)  # of a damaged one is said now, and it is set aside
        if restored is not None:
            state, progress = restored
            history, batch_number = progress["history"], progress["batch"]
            seconds, waited = progress["seconds"], progress["waited"]
            sums = Sums(**progress["sums"])
            at = f"batch {batch_number + 1} of {per_epoch}" if batch_number < per_epoch else "its validation"
            print(f"{workdir}: going on at epoch {len(history) + 1}, {at}", flush=True)
        elif source is not None:
            state = start_from(source, config, state, colours.mean_rgb)
            source = None  # half a gigabyte
        if begun is not None and restored is None:
            print(f"{workdir}: there is nothing to go on from, so it starts again", flush=True)
        with contextlib.suppress(NotSavedError):  # the next save says so
            write_metrics(workdir, history)

        def save() -> None:
            nonlocal owed, unsaved
            # The loss that a step reports is the one before its update.
            assert rate is not None
            if not finite(state.params):
                raise DivergedError(diverged("a parameter", len(history) + 1, batch_number, rate))
            progress = {
                "history": history,
                "batch": batch_number,
                "seconds": seconds,
                "waited": waited,
                "sums": dataclasses.asdict(sums),
            }
            try:
                if owed is not None:
                    best.save(*owed)
                owed = None
                last.save(len(history) * (per_epoch + 1) + batch_number, state, progress)
                write_metrics(workdir, history)
                unsaved = None
            except NotSavedError as error:
                owed = owed and (owed[0], jax.tree.map(np.array, owed[1]), owed[2])  # its memory on the device is the next step's
                unsaved = error
                print(f"warning: {error}; what was saved before is still there", file=sys.stderr, flush=True)

        batches = iter(train_batches(train, config, colours, first_epoch=len(history), first_batch=batch_number))
        saved_at = time.monotonic()
        while (rate := learning_rate(config, [record["validation"]["accuracy"] for record in history])) is not None:
            epoch = len(history) + 1
            state = dataclasses.replace(state, opt_state=set_learning_rate(state.opt_state, rate))
            started, seconds_before = time.monotonic(), seconds
            unreadable: InputError | None = None  # raised behind the saving
            in_flight: InFlight | None = None
            with progress_bar(f"epoch {epoch}", train.size, batch_number * config.batch_size) as bar:
                while batch_number < per_epoch and not stop.is_set():
                    asked = time.monotonic()
                    try:
                        batch = next(batches)
                    except InputError as error:
                        unreadable = error
                        break
                    waited += time.monotonic() - asked
                    state, step_sums = train_step(state, on_devices(batch, mesh))
                    batch_number += 1
                    sums, in_flight = checked(sums, in_flight, bar, epoch, rate, train), InFlight(step_sums, batch_number, batch["index"])
                    if time.monotonic() - saved_at > SAVE_SECONDS:
                        sums, in_flight = checked(sums, in_flight, bar, epoch, rate, train), None
                        seconds = seconds_before + time.monotonic() - started
                        save()
                        saved_at = time.monotonic()
                sums = checked(sums, in_flight, bar, epoch, rate, train)
            seconds = seconds_before + time.monotonic() - started

            validated = None
            if not stop.is_set() and unreadable is None:
                try:
                    validated = evaluate_all(eval_step, state, validation_batches, validation, mesh, stop)
                except InputError as error:
                    unreadable = error
            if validated is None:
                if unreadable is None or history or batch_number:
                    save()
                    if unsaved is not None:
                        raise NotSavedError(f"{unreadable}; {unsaved}" if unreadable else str(unsaved)) from unsaved
                    print(f"stopped in epoch {epoch} and saved in {workdir}: the same command goes on from there", flush=True)
                if unreadable is not None:
                    raise unreadable
                return Outcome(history, stopped=True)
            if not math.isfinite(validated.loss):
                raise DivergedError(diverged("the validation's loss", epoch, batch_number, rate))

            record = epoch_record(epoch, seconds, waited, rate, sums, validated, train.size)
            improved = all(record["validation"]["accuracy"] > old["validation"]["accuracy"] for old in history)
            history.append(record)
            batch_number, seconds, waited, sums = 0, 0.0, 0.0, Sums()
            if improved:
                owed = epoch, variables_of(state), {"epoch": epoch, "validation": record["validation"]}
            save()
            saved_at = time.monotonic()
            print(line(record), flush=True)
            if stuck(history, len(train.classes)):
                print(advice(len(train.classes)), flush=True)

        if unsaved is not None:
            raise unsaved

    top = max(history, key=lambda record: record["validation"]["accuracy"])
    print(f"done: best validation accuracy {top['validation']['accuracy']:.2%} in epoch {top['epoch']}, {workdir / 'best'}", flush=True)
    return Outcome(history, stopped=False)


def write_metrics(workdir: Path, history: list[dict[str, Any]]) -> None:
    """A line an epoch, all anew. Raises NotSavedError."""
    try:
        write_whole(workdir / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in history))
    except OSError as error:
        raise NotSavedError(f"cannot write to {workdir / 'metrics.jsonl'} ({error.strerror})") from error


def start_from(
    source: tuple[VGG, dict[str, Any], dict[str, Any]], config: TrainConfig, state: TrainState, mean_rgb: tuple[float, float, float]
) -> TrainState:
    """The state with the layers of what `load` gave: all that fit where the nets are equal, else the paper's seven (§3.1).

    Prints what came, what is new and why, and what was left. Raises InputError where nothing came.
    """
    model, variables, metadata = source
    same = model.config.stages == config.vgg.stages
    layers = tuple(state.params) if same else FROM_A
    params, copied = init_from(variables["params"], state.params, layers)
    batch_stats, _ = init_from(variables.get("batch_stats", {}), state.batch_stats, copied)
    if not copied:
        raise InputError(
            f"no layer of {config.init_from} fits {config.net}: expected layers of equal names and shapes; pass another --init-from"
        )
    print(said_of_start(config.init_from, variables["params"], state.params, copied), flush=True)
    mean = metadata["preprocessing"]["mean_rgb"]
    if any(abs(theirs - ours) > 1 for theirs, ours in zip(mean, mean_rgb, strict=True)):
        means = [", ".join(f"{value:.2f}" for value in each) for each in (mean, mean_rgb)]
        print(f"its images were less the mean ({means[0]}), those of this run are less ({means[1]})", flush=True)
    placed = jax.device_put((params, batch_stats), jax.tree.map(lambda x: x.sharding, (state.params, state.batch_stats)))
    return dataclasses.replace(state, params=placed[0], batch_stats=placed[1])


def said_of_start(source: str | None, there: Any, here: Any, copied: tuple[str, ...]) -> str:
    """What came, what is new, with the shapes of a kernel that did not fit, and what was left."""
    new = []
    for name in (name for name in here if name not in copied):
        shapes = [layers[name]["kernel"].shape for layers in (there, here) if "kernel" in layers.get(name, {})]
        new.append(f"{name} (its kernel is {shapes[0]} there and {shapes[1]} here)" if len(set(shapes)) == 2 else name)
    left = [name for name in there if name not in copied and name not in here]
    parts = ("", copied), ("new: ", new), ("left: ", left)
    return f"from {source}: " + "; ".join(words + (", ".join(names) or "nothing") for words, names in parts)


def evaluate_all(eval_step: Any, state: TrainState, batches: Any, source: Source, mesh: Any, stop: threading.Event) -> Sums | None:
    """The sums over a whole source, or None where the run is to stop."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    sums, pending = Sums(), None
    with progress_bar("validation", source.size) as bar:
        for batch in batches:
            if stop.is_set():
                return None
            step_sums = eval_step(variables, on_devices(batch, mesh))
            sums, pending = add(sums, pending, bar), step_sums
        sums = add(sums, pending, bar)
    assert stop.is_set() or sums.count == source.size, f"{sums.count} of {source.size} images were evaluated"
    return None if stop.is_set() else sums


def on_devices(batch: dict[str, Any], mesh: Any) -> dict[str, jax.Array]:
    return put_batch({name: batch[name] for name in ("image", "colour_shift", "label", "mask")}, mesh)


def add(sums: Sums, pending: Sums | None, bar: tqdm) -> Sums:
    """Waits for a step's sums and adds them, in double precision."""
    if pending is None:
        return sums
    new = jax.tree.map(float, jax.device_get(pending))
    bar.update(int(new.count))
    bar.set_postfix_str(f"loss {new.loss / max(new.count, 1):.3f}", refresh=False)
    return merge(sums, new)


def progress_bar(name: str, total: int, initial: int = 0) -> tqdm:
    return tqdm(desc=name, total=total, initial=initial, unit=" images", leave=False, disable=None)  # None: where there is no terminal


def checked(sums: Sums, in_flight: InFlight | None, bar: tqdm, epoch: int, rate: float, source: Source) -> Sums:
    """Waits for the batch and adds its sums. Raises DivergedError, with the batch's files, if its loss is not finite."""
    if in_flight is None:
        return sums
    sums = add(sums, in_flight.sums, bar)
    if not math.isfinite(sums.loss):
        files = [source.file_name(int(index)) for index in in_flight.examples if index >= 0]
        raise DivergedError(diverged("the loss", epoch, in_flight.number, rate, files))
    return sums


@jax.jit
def finite(params: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]))


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one acts as it always does."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        stop.set()
        restore()
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()
