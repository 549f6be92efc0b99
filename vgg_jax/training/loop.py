"""Training: one long, flat story from a configuration to a folder with a trained network."""

import contextlib
import dataclasses
import math
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vgg_jax.configs.colours import IMAGENET
from vgg_jax.configs.presets import resolve_learning_rate
from vgg_jax.configs.train import MAX_LR_HALVINGS, ON_NAN, SAVE_SECONDS, TrainConfig
from vgg_jax.data import (
    DataSource,
    cache_in_memory,
    eval_batches,
    measure_colours,
    open_train_val,
    split_names,
    steps_per_epoch,
    train_batches,
)
from vgg_jax.distributed.multihost import (
    StepSynchronizer,
    Watchdog,
    any_process,
    assert_same_on_all,
    is_main_process,
    run_on_main_and_broadcast,
    translate_lost_peer,
)
from vgg_jax.distributed.sharding import (
    DATA,
    DATA_PARALLEL,
    MeshConfig,
    local_rows,
    make_mesh,
    shard_batch,
)
from vgg_jax.errors import InputError
from vgg_jax.metrics import MetricSums, merge
from vgg_jax.model import build_model
from vgg_jax.paths import to_path
from vgg_jax.runs.checkpoint import CheckpointSaveError
from vgg_jax.runs.files import workdir_lock
from vgg_jax.runs.metadata import (
    RunMetadata,
    as_json,
    check_same_run,
    create_run,
    from_json,
    has_checkpoint,
    load_existing_run,
)
from vgg_jax.runtime.signals import graceful_stop
from vgg_jax.training.checkpointer import BestInfo, Checkpointer
from vgg_jax.training.init_from import init_from_pretrained
from vgg_jax.training.nan_check import first_nonfinite
from vgg_jax.training.optimizer import next_epoch_lr, set_learning_rate, sgd
from vgg_jax.training.report import at_chance_hint, epoch_record, format_epoch, is_at_chance
from vgg_jax.training.step import TrainState, init_state, jit_steps
from vgg_jax.weights import load


class DivergedError(Exception):
    """A loss or a parameter is not a number; nothing of that is saved."""

    def __init__(self, text: str, rate: float, halvings: int, stop: threading.Event) -> None:
        super().__init__(text)
        self.rate, self.halvings = (
            rate,
            halvings,
        )  # the learning rate, and how often it had been halved
        self.stop = stop  # what a signal sets, also while what was to be saved is written


class PendingStep(NamedTuple):
    """A batch whose step is in progress: the host reads its sums when the next one is on its way."""

    sums: MetricSums
    number: int
    examples: np.ndarray  # their indices, int64 (N,)


class FitResult(NamedTuple):
    """How a run stands: a record for each epoch that is done, and whether it was stopped before its end."""

    history: list[dict[str, Any]]
    stopped: bool


@dataclasses.dataclass
class LoopState:
    """How far a run has come: what a checkpoint says besides its arrays."""

    history: list[dict[str, Any]]
    batch: int = 0  # how many of this epoch are done, in how many seconds, and how many of them the input was waited for
    seconds: float = 0.0
    waited: float = 0.0
    sums: MetricSums = dataclasses.field(default_factory=MetricSums)
    halvings: int = 0  # of the learning rate, after a divergence


def fit(
    config: TrainConfig,
    workdir: str | Path,
    data_dir: str | Path | None = None,
    download: bool = False,
    *,
    save_seconds: float = SAVE_SECONDS,
    on_nan: str = "stop",
    debug_nans: bool = False,
    layout: MeshConfig = DATA_PARALLEL,
) -> FitResult:
    """Trains a network, or goes on with the training that the workdir holds; prints a line an epoch.

    Each epoch is one pass over all training images; then the validation images drive the learning rate and which state is the best
    (§3.1). It saves behind each epoch, and within one every `save_seconds`, while training goes on. SIGINT or SIGTERM ends it after the
    step in hand, saved; a second one at once. The `layout` says how it is spread over the devices of all processes.

    Where the loss or a parameter becomes infinite or NaN, DivergedError says so, with the layer if `debug_nans`; with `on_nan` "halve" the
    run goes back to what was saved last, with half the rate, at most `MAX_LR_HALVINGS` times. Raises InputError for anything wrong in the
    input, DataError for an image that cannot be read, CheckpointSaveError where the end could not be saved: a full disk before that is warned
    of, and training goes on. Raises ProcessLostError where another process ends.
    """
    if on_nan not in ON_NAN:
        raise InputError(f"on_nan is {on_nan!r}: expected one of {', '.join(ON_NAN)}")
    if not save_seconds >= 0:
        raise InputError(f"save_seconds is {save_seconds}: expected 0 or more")
    folder, halvings = to_path(workdir), 0
    with translate_lost_peer(folder), contextlib.ExitStack() as stack:
        assert_same_on_all({"on_nan": on_nan, "debug_nans": debug_nans})
        run_on_main_and_broadcast(lambda: stack.enter_context(workdir_lock(folder)))
        while True:
            try:
                return _fit(
                    config, folder, data_dir, download, save_seconds, debug_nans, layout, halvings
                )
            except DivergedError as error:
                if (
                    on_nan == "stop"
                    or error.halvings == MAX_LR_HALVINGS
                    or any_process(error.stop.is_set())
                ):
                    raise
                halvings = error.halvings + 1
                print(
                    f"warning: {error}: going back to what was saved last, with half the rate",
                    file=sys.stderr,
                    flush=True,
                )


def _fit(
    config: TrainConfig,
    workdir: Path,
    data_dir: str | Path | None,
    download: bool,
    save_seconds: float,
    debug_nans: bool,
    layout: MeshConfig,
    halvings: int,
) -> FitResult:
    mesh = make_mesh(config.microbatch or config.batch_size, layout=layout)
    alone = jax.process_count() == 1
    begun, resumes = find_existing_run(workdir)
    if begun is not None:  # what can be said now is not said after the data are read
        check_same_run(
            workdir,
            begun,
            dataclasses.replace(begun, config=resolve_learning_rate(config, len(begun.classes))),
        )
    source = load(config.init_from) if config.init_from is not None and not resumes else None
    data_dir = None if data_dir is None else str(data_dir)
    # One process at a time: they may share a disk.
    run_on_main_and_broadcast(
        lambda: (
            len(split_names(config.data, data_dir=data_dir, download=True)) if download else None
        )
    )
    train, validation = open_train_val(
        config.data,
        data_dir=data_dir,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        skip_bad=config.skip_bad,
        exclude=config.exclude,
        download=download,
    )
    print(
        f"{config.data}: {train.size} training and {validation.size} validation images of {len(train.classes)} classes",
        flush=True,
    )
    if train.skipped or validation.skipped:
        print(
            f"skipped {len(train.skipped)} training and {len(validation.skipped)} validation files that are no images",
            flush=True,
        )
    config = resolve_learning_rate(config, len(train.classes))
    run = RunMetadata(
        config,
        train.classes,
        begun.colours if begun else IMAGENET,
        train.storage,
        train.size,
        validation.size,
    )
    assert_same_on_all(
        as_json(run)["config"]
        | {"data": [run.storage, run.train_size, run.validation_size], "layout": layout}
    )
    if begun is not None:
        check_same_run(workdir, begun, run)
    if config.cache:
        train, validation = cache_in_memory(train, config), cache_in_memory(validation, config)
    if begun is None:
        if config.statistics == "measure":
            measured = partial(measure_colours, train, skip_bad=config.skip_bad)
            run = from_json(
                run_on_main_and_broadcast(
                    lambda: as_json(dataclasses.replace(run, colours=measured().statistics))
                )
            )
        run_on_main_and_broadcast(lambda: create_run(workdir, run))
    colours = run.colours

    # From here on: a KeyboardInterrupt that is raised while JAX traces or compiles may be lost, or end in a crash.
    with graceful_stop() as stop, Checkpointer(workdir) as saving, Watchdog() as alarm:
        model = build_model(config, len(train.classes))
        train_step, eval_step = jit_steps(
            config, model, colours.mean_rgb, mesh, layout, donate=not debug_nans
        )
        state = init_state(model, sgd(config), config.seed, mesh, layout)
        agreement = StepSynchronizer(mesh)

        def to_stop(wished: bool = False) -> tuple[bool, bool]:
            """Whether all processes are to stop, and whether to save, which the first one wishes."""
            alarm.heartbeat()
            return agreement.any(stop.is_set(), wished)

        per_epoch = steps_per_epoch(train, config.batch_size)
        groups = mesh.shape[DATA]
        at_once = min(
            config.microbatch or config.batch_size, -(-validation.size // groups) * groups
        )
        validation_batches = eval_batches(validation, config, at_once, local_rows(mesh, at_once))
        now = LoopState([])

        restored = saving.restore(state) if begun else None
        net = begun is not None and saving.has_best(
            state
        )  # of a damaged one is said now, and it is set aside
        if restored is not None and restored[1]["history"] and not net:
            raise InputError(
                f"{workdir / 'best'} holds no checkpoint, and epochs were done: expected the best one's; restore that folder, or train "
                "again into another --workdir"
            )
        if restored is not None:
            state, progress = restored
            now = LoopState(**progress | {"sums": MetricSums(**progress["sums"])})
            at = (
                f"batch {now.batch + 1} of {per_epoch}"
                if now.batch < per_epoch
                else "its validation"
            )
            print(f"{workdir}: going on at epoch {len(now.history) + 1}, {at}", flush=True)
        elif source is not None:
            state = init_from_pretrained(source, config, state, colours.mean_rgb)
            source = None  # half a gigabyte
        if begun is not None and restored is None:
            print(f"{workdir}: there is nothing to go on from, so it starts again", flush=True)
        if halvings > now.halvings:
            now.halvings = halvings
            saving.delete_best_after(len(now.history))  # of the epochs that are not gone on from
        saving.write_metrics(now.history)

        epoch, rate = len(now.history) + 1, 0.0
        in_flight: PendingStep | None = None
        done: PendingStep | None = None  # the batch before

        def diverged(
            what: str, during: PendingStep | None = None, behind: PendingStep | None = None
        ) -> DivergedError:
            """During the step of one batch, or by the update behind that of another."""
            places = [
                f"{word} batch {each.number} (of {file_names_of(train, each)})"
                for word, each in (("in", during), ("by the update of", behind))
                if each
            ]
            place = f", {' or '.join(places)}" if places else ""
            text = f"{what} is not finite in epoch {epoch}{place}, at learning rate {rate:g}"
            return DivergedError(text, rate, now.halvings, stop)

        def save(best: BestInfo | None = None) -> None:
            # The loss that a step reports is the one before its update.
            if not all_finite((state.params, state.batch_stats)):
                raise diverged("a parameter", behind=done)
            saving.save(
                len(now.history) * (per_epoch + 1) + now.batch, state, dataclasses.asdict(now), best
            )

        def settle() -> None:
            """Waits for the step in progress and adds its sums."""
            nonlocal done, in_flight
            if in_flight is None:
                return
            now.sums = accumulate(now.sums, in_flight.sums, bar)
            if not math.isfinite(now.sums.loss):
                raise diverged("the loss", in_flight, done)
            done, in_flight = in_flight, None

        rows = local_rows(mesh, config.batch_size)
        batches = iter(
            train_batches(
                train,
                config,
                colours,
                first_epoch=len(now.history),
                first_batch=now.batch,
                rows=rows,
            )
        )
        saved_at = time.monotonic()
        while (
            planned := next_epoch_lr(
                config, [record["validation"]["accuracy"] for record in now.history]
            )
        ) is not None:
            epoch, rate = len(now.history) + 1, planned / 2**now.halvings
            state = dataclasses.replace(state, opt_state=set_learning_rate(state.opt_state, rate))
            started, seconds_before = time.monotonic(), now.seconds
            unreadable: InputError | None = None  # raised behind the saving
            stopping, _ = to_stop()
            with progress_bar(f"epoch {epoch}", train.size, now.batch * config.batch_size) as bar:
                while now.batch < per_epoch and not stopping:
                    asked = time.monotonic()
                    try:
                        batch = next(batches)
                    except InputError as error:
                        unreadable = error
                        break
                    now.waited += time.monotonic() - asked
                    placed, before = batch_to_devices(batch, mesh), state
                    if done is in_flight is None and not compile_unless_stopped(
                        train_step, before, placed, stop
                    ):
                        stopping = True
                        break
                    state, step_sums = train_step(before, placed)
                    now.batch += 1
                    if debug_nans and not all_finite((step_sums, state.params, state.batch_stats)):
                        layer = first_nonfinite(
                            before, placed, model=model, mean_rgb=colours.mean_rgb
                        )
                        raise diverged(layer, PendingStep(step_sums, now.batch, batch["index"]))
                    settle()
                    in_flight = PendingStep(step_sums, now.batch, batch["index"])
                    wished = is_main_process() and time.monotonic() - saved_at > save_seconds
                    saved_at = (
                        time.monotonic() if wished else saved_at
                    )  # it is asked once; the answer may come with the next step
                    stopping, due = to_stop(wished)
                    if due:
                        settle()
                        now.seconds = seconds_before + time.monotonic() - started
                        save()
                        saved_at = time.monotonic()
                settle()
            now.seconds = seconds_before + time.monotonic() - started

            validated = None
            if not stopping and unreadable is None:
                try:
                    validated = validate(
                        eval_step, state, validation_batches, validation, mesh, to_stop
                    )
                except InputError as error:
                    unreadable = error
            if (
                unreadable is not None and not alone
            ):  # the others wait for a step, and there is none
                raise unreadable
            if validated is None:
                if unreadable is None or now.history or now.batch:
                    save()
                    try:
                        saving.wait_until_finished()
                    except CheckpointSaveError as failed:
                        raise CheckpointSaveError(
                            f"{unreadable}; {failed}" if unreadable else str(failed)
                        ) from failed
                    print(
                        f"stopped in epoch {epoch} and saved in {workdir}: the same command goes on from there",
                        flush=True,
                    )
                if unreadable is not None:
                    raise unreadable
                return FitResult(now.history, stopped=True)
            if not math.isfinite(validated.loss):
                raise diverged("the validation's loss", behind=done)

            counts = (now.sums.count, validated.count)
            assert config.skip_bad or counts == (train.size, validation.size), (
                f"images seen were {counts}"
            )
            record = epoch_record(
                epoch, now.seconds, now.waited, rate, now.sums, validated, train.size
            )
            improved = all(
                record["validation"]["accuracy"] > old["validation"]["accuracy"]
                for old in now.history
            )
            now = LoopState([*now.history, record], halvings=now.halvings)
            save(BestInfo(epoch, record["validation"]) if improved else None)
            saved_at = time.monotonic()
            print(format_epoch(record), flush=True)
            if is_at_chance(now.history, len(train.classes)):
                print(at_chance_hint(len(train.classes)), flush=True)

        saving.wait_until_finished()

    top = max(now.history, key=lambda record: record["validation"]["accuracy"])
    print(
        f"done: best validation accuracy {top['validation']['accuracy']:.2%} in epoch {top['epoch']}, {workdir / 'best'}",
        flush=True,
    )
    return FitResult(now.history, stopped=False)


def find_existing_run(workdir: Path) -> tuple[RunMetadata | None, bool]:
    """The run that was begun, and whether there is a checkpoint of it to go on from, as the first process finds them."""

    def find() -> dict[str, Any]:
        run = load_existing_run(workdir)
        # Killed, or out of room, behind the first best and before what it would go on from: it starts as it did.
        return {
            "run": run and as_json(run),
            "resumes": run is not None and has_checkpoint(workdir / "last"),
        }

    begun = run_on_main_and_broadcast(find)
    return begun["run"] and from_json(begun["run"]), begun["resumes"]


def compile_unless_stopped(
    step: Any, state: TrainState, batch: dict[str, jax.Array], stop: threading.Event
) -> bool:
    """Whether the step was compiled before a signal came: in a thread, since the main one would hear of none until then.

    Of several processes each finishes: the others wait for its step.
    """

    def compile_step() -> None:
        with contextlib.suppress(Exception):  # it is raised again where the step is called
            step.lower(state, batch).compile()

    def heard() -> bool:
        return stop.is_set() and jax.process_count() == 1

    thread = threading.Thread(
        target=compile_step
    )  # no daemon: Python ends those in the middle of XLA, which aborts the process
    thread.start()
    while thread.is_alive() and not heard():
        thread.join(0.05)
    return not heard()


def file_names_of(source: DataSource, batch: PendingStep) -> str:
    """The names of a batch's images, the first eight of them."""
    names = [source.file_name(int(index)) for index in batch.examples if index >= 0]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def validate(
    eval_step: Any,
    state: TrainState,
    batches: Any,
    source: DataSource,
    mesh: Any,
    to_stop: Callable[[], tuple[bool, bool]],
) -> MetricSums | None:
    """The sums over a whole source, or None where the run is to stop."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    sums, pending = MetricSums(), None
    with progress_bar("validation", source.size) as bar:
        for batch in batches:
            if to_stop()[0]:
                return None
            step_sums = eval_step(variables, batch_to_devices(batch, mesh))
            sums, pending = accumulate(sums, pending, bar), step_sums
        sums = accumulate(sums, pending, bar)
    return None if to_stop()[0] else sums


def batch_to_devices(batch: dict[str, Any], mesh: Any) -> dict[str, jax.Array]:
    return shard_batch(
        {name: batch[name] for name in ("image", "colour_shift", "label", "mask")}, mesh
    )


def accumulate(sums: MetricSums, pending: MetricSums | None, bar: tqdm) -> MetricSums:
    """Waits for a step's sums and adds them, in double precision."""
    if pending is None:
        return sums
    new = jax.tree.map(float, jax.device_get(pending))
    bar.update(int(new.count))
    bar.set_postfix_str(f"loss {new.loss / max(new.count, 1):.3f}", refresh=False)
    return merge(sums, new)


def progress_bar(name: str, total: int, initial: int = 0) -> tqdm:
    hidden = None if is_main_process() else True  # None: where there is no terminal
    return tqdm(
        desc=name, total=total, initial=initial, unit=" images", leave=False, disable=hidden
    )


@jax.jit
def all_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(params)]))
