"""Trains and validates the epochs of a run, saves them and resumes (§3.1)."""

import contextlib
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vgg_jax.distributed.multihost import (
    StepSynchronizer,
    Watchdog,
    is_main_process,
    run_on_main_and_broadcast,
)
from vgg_jax.distributed.sharding import DATA, local_rows, shard_batch
from vgg_jax.errors import InputError
from vgg_jax.input_data import crop_function, eval_batches, train_batches
from vgg_jax.metrics import MetricSums, merge
from vgg_jax.model import build_model
from vgg_jax.reporting.events import MAX_CROPS, TrainingEvents
from vgg_jax.runs.checkpoint import CheckpointSaveError
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.runtime.profile import StepProfile
from vgg_jax.runtime.progress import ProgressBar, RunTimer, waiting_line
from vgg_jax.training.checkpointer import BestInfo, Checkpointer
from vgg_jax.training.init_from import Pretrained, init_from_pretrained
from vgg_jax.training.layer_statistics import name_statistics
from vgg_jax.training.memory_estimate import describe_remedy, free_device_memory, peak_bytes
from vgg_jax.training.nan_check import first_nonfinite
from vgg_jax.training.optimizer import (
    make_optimizer,
    next_epoch_lr,
    set_learning_rate,
    step_learning_rates,
)
from vgg_jax.training.report import at_chance_hint, epoch_record, format_epoch, is_at_chance
from vgg_jax.training.setup import Setup, Start
from vgg_jax.training.step import Batch, TrainState, feature_step, init_state, jit_steps

if TYPE_CHECKING:
    from vgg_jax.data import CachedFeatures
    from vgg_jax.input_data import Source

logger = logging.getLogger(__name__)

MAX_FILE_NAMES = 8  # of a batch, in an error message
MEASURE_EVERY = 50  # steps between two measurements of the layers, for TensorBoard


class DivergedError(Exception):
    """A loss or a parameter is infinite or NaN. The diverged state is never saved.

    Attributes:
        rate: The learning rate, or the highest one of the schedule "cosine".
        halvings: How often the learning rate had been halved.
        stop: The event that a signal sets. The block of `graceful_stop` has ended when `fit`
            reads it. `fit` does not resume if it is set.
    """

    def __init__(self, text: str, rate: float, halvings: int, stop: threading.Event) -> None:
        super().__init__(text)
        self.rate = rate
        self.halvings = halvings
        self.stop = stop


class StopRequestedError(Exception):
    """A signal came while features were computed. They are computed again when the run resumes."""


class PendingStep(NamedTuple):
    """A dispatched training step. The host reads its sums after dispatching the next one."""

    sums: MetricSums
    batch_number: int  # in its epoch, from 1
    indices: np.ndarray  # int64 (N,), example indices; -1 for padding
    statistics: dict[str, jax.Array] | None = None  # of its layers, if it measured them


class FitResult(NamedTuple):
    """The state of a run when `fit` returns.

    Attributes:
        history: One record for each finished epoch, as in metrics.jsonl.
        stopped: True if a signal stopped the run before its end.
    """

    history: list[dict[str, Any]]
    stopped: bool


@dataclasses.dataclass
class Progress:
    """The progress of a run.

    It is the JSON part of a checkpoint, so the fields must keep their names.
    """

    history: list[dict[str, Any]]
    batch: int = 0  # finished batches of this epoch
    seconds: float = 0.0  # time spent on these batches
    waited: float = 0.0  # part of that time spent waiting for input
    sums: MetricSums = dataclasses.field(default_factory=MetricSums)
    halvings: int = 0  # of the learning rate, after divergences


class Trainer:
    """The state of a training run. `loop.fit` calls its methods in order.

    Args:
        setup: The fixed part of the run.
        checkpointer: Saves and restores the run.
        watchdog: Gets a heartbeat at each step.
        stop: The event that a signal sets.
        save_seconds: Seconds between two saves in an epoch.
        debug_nans: Checks each step for infinite values and NaN.
        events_folder: Folder for TensorBoard's events. None writes none.
        profile: Traces some steps of the main process.
    """

    def __init__(
        self,
        setup: Setup,
        checkpointer: Checkpointer,
        watchdog: Watchdog,
        stop: threading.Event,
        *,
        save_seconds: float,
        debug_nans: bool,
        events_folder: Path | None = None,
        profile: StepProfile | None = None,
    ) -> None:
        self.setup = setup
        self.stop = stop
        self._checkpointer = checkpointer
        self._watchdog = watchdog
        self._save_seconds = save_seconds
        self._debug_nans = debug_nans
        self._events_folder = events_folder
        self._profile = profile if is_main_process() else None
        self._events: TrainingEvents | None = None

        config, mesh, mesh_config = setup.config, setup.mesh, setup.mesh_config
        self._steps_per_epoch = -(-setup.train.size // config.batch_size)  # the last is padded
        self._free_memory = free_device_memory(mesh.local_devices[0])
        self._model = build_model(config, len(setup.train.classes))
        self._mean_rgb = setup.run.colours.mean_rgb
        # A check of a step needs the state before it, so the state is not donated.
        self._jit_train_step, self._jit_eval_step = jit_steps(
            config,
            self._model,
            self._mean_rgb,
            mesh,
            mesh_config,
            donate=not debug_nans,
            class_weights=setup.class_weights,
            measure_every=None if events_folder is None else MEASURE_EVERY,
            steps_per_epoch=self._steps_per_epoch,
        )
        self._is_compiled = False
        self._crop = crop_function(
            config, setup.run.colours, NamedSharding(mesh, PartitionSpec(DATA))
        )
        optimizer = make_optimizer(config, self._steps_per_epoch)
        self.state = init_state(self._model, optimizer, config.seed, mesh, mesh_config)
        self._synchronizer = StepSynchronizer(mesh)

        data_axis_size = mesh.shape[DATA]
        self._eval_batch_size = min(
            config.microbatch or config.batch_size,
            -(-setup.validation.size // data_axis_size) * data_axis_size,
        )
        self.progress = Progress([])
        self._timer = RunTimer(config.epochs, may_end_early=config.schedule == "plateau")
        self._epoch, self._lr = 1, 0.0
        self._step_lrs: list[float] = []  # of the steps of this epoch
        self._pending: PendingStep | None = None  # dispatched; its sums are not read yet
        self._previous: PendingStep | None = None  # the last one whose sums were read
        self._validation, self._validation_seconds = MetricSums(), 0.0
        self._unreadable: InputError | None = None  # raised once the run has been saved
        self._saved_at = self._epoch_start = time.monotonic()

    def restore_or_init(self, pretrained: Pretrained | None, halvings: int) -> None:
        """Restores the last checkpoint, or starts the run.

        Args:
            pretrained: The net to copy layers from, if the run does not resume.
            halvings: Halvings of the learning rate that this attempt needs.

        Raises:
            InputError: A checkpoint is missing or damaged, no layer matches, or the events cannot
                be written.
        """
        setup = self.setup
        resumed = setup.start is not Start.NEW and self._restore()
        if not resumed and pretrained is not None:
            self.state = init_from_pretrained(
                pretrained, setup.config, self.state, self._mean_rgb, setup.run.activation_rms
            )
        if not resumed and setup.start is not Start.NEW:
            logger.info(f"{setup.workdir}: nothing to resume from, so the run starts again")
        if halvings > self.progress.halvings:
            self.progress.halvings = halvings
            # The diverged attempt may have saved a best checkpoint for an epoch that is rerun now.
            self._checkpointer.delete_best_after(len(self.progress.history))
        self._checkpointer.write_metrics(self.progress.history)

        self._epoch = len(self.progress.history) + 1
        if self._events_folder is not None and self.next_learning_rate() is not None:
            run_on_main_and_broadcast(partial(self._open_events, self._events_folder))

    def _open_events(self, folder: Path) -> None:
        # A validation that comes again has the number of the last step.
        is_trained = self.progress.batch == self._steps_per_epoch
        self._events = TrainingEvents(folder, self._global_step() + (0 if is_trained else 1))

    def _global_step(self) -> int:
        """The number of finished steps of the run."""
        return len(self.progress.history) * self._steps_per_epoch + self.progress.batch

    def make_batches(self) -> bool:
        """Makes the batches from the restored position on, and those of a validation.

        Returns:
            False if a signal came while features were computed.
        """
        setup, config = self.setup, self.setup.config
        self._saved_at = time.monotonic()
        if self.next_learning_rate() is None:
            return True
        position = {"first_epoch": self._epoch - 1, "first_batch": self.progress.batch}
        batch_size = self._eval_batch_size
        if config.cache_features:
            from vgg_jax.data import eval_feature_batches, train_feature_batches

            try:
                train, validation = map(self._cache_features, (setup.train, setup.validation))
            except StopRequestedError:
                return False
            self.batches = train_feature_batches(train, config, **position)
            self._validation_batches: Callable[[], Iterator[dict[str, Any]]] = partial(
                eval_feature_batches, validation, batch_size
            )
            return True
        rows = local_rows(setup.mesh, config.batch_size)
        colours = setup.run.colours
        self.batches = train_batches(setup.train, config, colours, rows=rows, **position)
        rows = local_rows(setup.mesh, batch_size)
        self._validation_batches = eval_batches(setup.validation, config, batch_size, rows)
        return True

    def _cache_features(self, source: Any) -> "CachedFeatures":
        """Computes the output of the frozen layers for all images of a source."""
        from vgg_jax.data import cache_features

        setup, start = self.setup, time.monotonic()
        layer = setup.config.feature_layer
        assert layer is not None  # TrainConfig has checked it
        step = jax.jit(
            partial(
                feature_step,
                model=self._model,
                layer=layer,
                mean_rgb=self._mean_rgb,
                mesh=setup.mesh,
                mesh_config=setup.mesh_config,
            ),
            compiler_options=compiler_options(dtype=self._model.dtype),
        )
        variables = {"params": self.state.params, "batch_stats": self.state.batch_stats}

        def compute(batch: dict[str, Any]) -> np.ndarray:
            self._watchdog.heartbeat()
            features = run_unless_stopped(
                lambda: np.asarray(step(variables, self.put_batch(batch))), self.stop
            )
            if features is None:
                raise StopRequestedError
            return features.result()

        cached = cache_features(source, setup.config, self._eval_batch_size, compute)
        logger.info(
            f"computed {layer} of {source.size} images of {source.name} in "
            f"{time.monotonic() - start:.1f} s; {cached.features.nbytes / 1e6:.0f} MB"
        )
        return cached

    def _restore(self) -> bool:
        """Restores the last checkpoint if there is one."""
        workdir = self.setup.workdir
        restored = self._checkpointer.restore(self.state)
        # Always read, so that a damaged checkpoint is reported and set aside now.
        has_best = self._checkpointer.has_best(self.state)
        if restored is None:
            return False
        state, progress = restored
        if progress["history"] and not has_best:
            raise InputError(
                f"{workdir / 'best'} holds no checkpoint, but epochs are finished: expected the "
                "checkpoint of the best epoch; restore that folder, or train again into another "
                "--workdir"
            )
        self.state = state
        self.progress = Progress(**progress | {"sums": MetricSums(**progress["sums"])})
        epoch, batch = len(self.progress.history) + 1, self.progress.batch
        if self.next_learning_rate() is None:
            hint = "; more --epochs would go on" if epoch > self.setup.config.epochs else ""
            logger.info(
                f"{workdir}: finished in epoch {epoch - 1}, so there is nothing to train{hint}"
            )
            return True
        position = (
            f"batch {batch + 1} of {self._steps_per_epoch}"
            if batch < self._steps_per_epoch
            else "its validation"
        )
        logger.info(f"{workdir}: resuming at epoch {epoch}, {position}")
        return True

    def next_learning_rate(self) -> float | None:
        """The learning rate of the next epoch, or None at the end of the run.

        With the schedule "cosine", it is the highest one of the run.
        """
        accuracies = [record["validation"]["accuracy"] for record in self.progress.history]
        lr = next_epoch_lr(self.setup.config, accuracies)
        return None if lr is None else lr / 2**self.progress.halvings

    def train_epoch(self, lr: float) -> bool:
        """Trains on the batches of the epoch that are left.

        Args:
            lr: The learning rate that `next_learning_rate` returns.

        Returns:
            False if the run must stop: a signal came, or an image cannot be read.

        Raises:
            DivergedError: The loss or a parameter is infinite or NaN.
        """
        setup, progress = self.setup, self.progress
        self._epoch, self._lr = len(progress.history) + 1, lr
        self._step_lrs = step_learning_rates(setup.config, lr, self._epoch, self._steps_per_epoch)
        opt_state = set_learning_rate(self.state.opt_state, lr)
        self.state = dataclasses.replace(self.state, opt_state=opt_state)
        self._epoch_start = time.monotonic() - progress.seconds
        stopping, _ = self._poll()
        num_images = progress.batch * setup.config.batch_size
        self._timer.start_epoch(self._epoch, progress.batch / self._steps_per_epoch)
        if self._events is not None:
            self._events.start_epoch()
        name, quiet = f"epoch {self._epoch} of {setup.config.epochs}", not is_main_process()
        with ProgressBar(name, setup.train.size, initial=num_images, quiet=quiet) as self._bar:
            while progress.batch < self._steps_per_epoch and not stopping:
                num_done = progress.batch
                with self._annotate_step():
                    stopping = self._train_next_batch()
                if self._profile is not None and progress.batch > num_done:
                    self._profile.count_step(self.state)
            self._read_pending_sums()
        self._update_seconds()
        if self._events is not None:
            self._events.finish_training()
        return not stopping

    def _annotate_step(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._profile is None else self._profile.annotate_step()

    def _train_next_batch(self) -> bool:
        """Trains on a batch. Returns True if the run must stop."""
        batch = self._next_batch()
        return batch is None or not self._train_batch(batch) or self._poll_and_save()

    def _next_batch(self) -> dict[str, Any] | None:
        """The next batch on the host, or None if an image cannot be read."""
        wait_start = time.monotonic()
        try:
            batch = next(self.batches)
        except InputError as error:
            self._unreadable = error
            return None
        self.progress.waited += time.monotonic() - wait_start
        return batch

    def _train_batch(self, batch: dict[str, Any]) -> bool:
        """Dispatches a step and reads the sums of the one before. False if a signal came first."""
        device_batch, state = self.put_batch(batch), self.state
        if not self._is_compiled:
            compile_step = partial(self.compile_train_step, state, device_batch)
            with waiting_line("compiling the training step", quiet=not is_main_process()):
                # Calling the step repeats an error of its compilation.
                if run_unless_stopped(compile_step, self.stop) is None:
                    return False
            self._is_compiled = True
        is_measured = self._events is not None and self._global_step() % MEASURE_EVERY == 0
        self.state, sums, *statistics = self.train_step(state, device_batch)
        self.progress.batch += 1
        step = PendingStep(
            sums, self.progress.batch, batch["index"], statistics[0] if is_measured else None
        )
        if self._debug_nans and not all_finite((sums, self.state.params, self.state.batch_stats)):
            config = self.setup.config
            part = first_nonfinite(
                state,
                device_batch,
                model=self._model,
                mean_rgb=self._mean_rgb,
                start_after=config.feature_layer if config.cache_features else None,
            )
            raise self.divergence_error(part, step)
        # The host reads the previous step's sums while the devices compute this step.
        self._read_pending_sums()
        self._pending = step
        if self._events is not None and self.progress.batch == 1 and "image" in device_batch:
            self._add_crops(batch if "image" in batch else device_batch)
        return True

    def _add_crops(self, batch: Batch | dict[str, Any]) -> None:
        """Shows this process's first crops of a batch."""
        names = ("image", "colour_shift", "mask")
        images, colour_shift, mask = map(first_rows, map(batch.__getitem__, names))
        if self._events is not None and mask.any():
            self._events.add_crops(self._global_step(), images[mask], colour_shift[mask])

    def _read_pending_sums(self) -> None:
        """Waits for the pending step and adds its sums."""
        if self._pending is None:
            return
        step, step_sums = self._pending, to_numbers(self._pending.sums)
        self.progress.sums = merge(self.progress.sums, step_sums)
        self._timer.update(step.batch_number / self._steps_per_epoch)
        self._show(self._bar, step_sums)
        if not math.isfinite(self.progress.sums.loss):
            raise self.divergence_error("the loss", step, self._previous)
        if self._events is not None:
            statistics = {}
            if step.statistics is not None:
                statistics = name_statistics(self._model, step.statistics)
            number = self._global_step() - self.progress.batch + step.batch_number
            lr = self._step_lrs[step.batch_number - 1]
            self._events.add_step(number, step_sums, lr, statistics)
        self._previous, self._pending = step, None

    def _show(self, bar: ProgressBar, sums: MetricSums) -> None:
        """Counts the images of a step, and shows their loss and the time left."""
        loss, time_left = sums.loss / max(sums.count, 1), self._timer.note()
        bar.update(int(sums.count), ", ".join(filter(None, [f"loss {loss:.3f}", time_left])))

    def _poll(self, request_save: bool = False) -> tuple[bool, bool]:
        """Tells if all processes must stop now, and if they must save."""
        self._watchdog.heartbeat()
        return self._synchronizer.any(self.stop.is_set(), request_save)

    def _poll_and_save(self) -> bool:
        """Saves if it is time to. Returns True if the run must stop."""
        now = time.monotonic()
        request_save = is_main_process() and now - self._saved_at > self._save_seconds
        if request_save:
            # The answer may come with the next step. Until then, do not request it again.
            self._saved_at = now
        stopping, must_save = self._poll(request_save)
        if must_save:
            self._read_pending_sums()
            self._update_seconds()
            self.save()
        return stopping

    def _update_seconds(self) -> None:
        self.progress.seconds = time.monotonic() - self._epoch_start

    def validate(self) -> bool:
        """Evaluates the validation images.

        Returns:
            False if the run must stop: a signal came, or an image cannot be read.
        """
        start = time.monotonic()
        try:
            sums = self.evaluate()
        except InputError as error:
            self._unreadable = error
            return False
        if sums is None:
            return False
        self._validation, self._validation_seconds = sums, time.monotonic() - start
        return True

    def evaluate(self) -> MetricSums | None:
        """The sums over the validation images, or None if the run must stop."""
        variables = {"params": self.state.params, "batch_stats": self.state.batch_stats}
        sums, pending = MetricSums(), None
        size, quiet = self.setup.validation.size, not is_main_process()

        def add(pending: MetricSums | None) -> MetricSums:
            if pending is None:
                return sums
            step_sums = to_numbers(pending)
            self._show(bar, step_sums)
            return merge(sums, step_sums)

        with ProgressBar("validation", size, quiet=quiet) as bar:
            for batch in self._validation_batches():
                stopping, _ = self._poll()
                if stopping:
                    return None
                step_sums = self.eval_step(variables, self.put_batch(batch))
                sums, pending = add(pending), step_sums
            sums = add(pending)
        stopping, _ = self._poll()
        return None if stopping else sums

    def finish_epoch(self) -> None:
        """Records, saves and logs an epoch after its validation.

        Raises:
            DivergedError: The validation loss or a parameter is infinite or NaN.
            RuntimeError: Images are missing in the sums.
        """
        progress, validation = self.progress, self._validation
        if not math.isfinite(validation.loss):
            raise self.divergence_error("the validation's loss", update=self._previous)
        self._check_counts()
        num_classes = len(self.setup.train.classes)
        record = epoch_record(
            epoch=self._epoch,
            seconds=progress.seconds,
            input_wait=progress.waited,
            validation_seconds=self._validation_seconds,
            lr=self._step_lrs[-1],
            train=progress.sums,
            validation=validation,
            num_images=self.setup.train.size,
        )
        is_best = all(
            record["validation"]["accuracy"] > earlier["validation"]["accuracy"]
            for earlier in progress.history
        )
        if self._events is not None:
            # Before the save: what is saved is not computed again, so it would be missing.
            self._events.add_epoch(self._global_step(), record)
        self.progress = Progress([*progress.history, record], halvings=progress.halvings)
        self.save(BestInfo(self._epoch, record["validation"]) if is_best else None)
        self._timer.finish_epoch()
        logger.info(format_epoch(record))
        if is_at_chance(self.progress.history, num_classes):
            logger.info(at_chance_hint(num_classes))

    def _check_counts(self) -> None:
        counts = (self.progress.sums.count, self._validation.count)
        expected = (self.setup.train.size, self.setup.validation.size)
        if counts != expected and not self.setup.config.skip_bad:
            raise RuntimeError(
                f"{counts} training and validation images were seen: expected {expected}"
            )

    def save(self, best: BestInfo | None = None) -> None:
        """Starts to save the run.

        Args:
            best: Metadata, if the state is the best so far.

        Raises:
            DivergedError: A parameter is infinite or NaN.
        """
        # The loss is computed before the update, so it cannot show a bad update.
        if not all_finite((self.state.params, self.state.batch_stats)):
            raise self.divergence_error("a parameter", update=self._previous)
        # Each epoch has one number more than batches, for the save at its end.
        number = len(self.progress.history) * (self._steps_per_epoch + 1) + self.progress.batch
        self._checkpointer.save(number, self.state, dataclasses.asdict(self.progress), best)
        self._saved_at = time.monotonic()

    def save_and_stop(self) -> FitResult:
        """Saves a run that must stop.

        Returns:
            The result of `fit`.

        Raises:
            InputError: An image cannot be read. If there are several processes, this is raised
                at once: the others wait for a step that never comes, so a save would hang.
            CheckpointSaveError: The run could not be saved.
        """
        workdir, unreadable = self.setup.workdir, self._unreadable
        if unreadable is not None and jax.process_count() > 1:
            raise unreadable
        if unreadable is None or self.progress.history or self.progress.batch:
            self.save()
            try:
                self._checkpointer.wait_until_finished()
            except CheckpointSaveError as error:
                text = f"{unreadable}; {error}" if unreadable else str(error)
                raise CheckpointSaveError(text) from error
            logger.info(
                f"stopped in epoch {self._epoch} and saved in {workdir}: "
                "run the same command to resume"
            )
        if unreadable is not None:
            raise unreadable
        return FitResult(self.progress.history, stopped=True)

    def close(self) -> None:
        """Closes the file of events."""
        if self._events is not None:
            self._events.close()

    def result(self) -> FitResult:
        """Logs the best epoch of a finished run, and returns the result of `fit`."""
        history = self.progress.history
        best = max(history, key=lambda record: record["validation"]["accuracy"])
        logger.info(
            f"done: best validation accuracy {best['validation']['accuracy']:.2%} "
            f"in epoch {best['epoch']}, {self.setup.workdir / 'best'}"
        )
        return FitResult(history, stopped=False)

    def divergence_error(
        self, part: str, step: PendingStep | None = None, update: PendingStep | None = None
    ) -> DivergedError:
        """Describes a value that is infinite or NaN.

        Args:
            part: Name of the value.
            step: The step that computed it, if known.
            update: The last earlier step that updated the parameters, if any.

        Returns:
            The error to raise.
        """
        origins = []
        for words, origin in (("in", step), ("by the update of", update)):
            if origin is not None:
                names = file_names_of(self.setup.train, origin)
                origins.append(f"{words} batch {origin.batch_number} (images {names})")
        place = f", {' or '.join(origins)}" if origins else ""
        is_cosine = self.setup.config.schedule == "cosine"
        rate = "a learning rate of at most" if is_cosine else "learning rate"
        return DivergedError(
            f"{part} is not finite in epoch {self._epoch}{place}, at {rate} {self._lr:g}",
            self._lr,
            self.progress.halvings,
            self.stop,
        )

    def put_batch(self, batch: dict[str, Any]) -> Batch:
        """Copies this process's rows of a batch to its devices, which crop the images of arrays."""
        arrays = {name: array for name, array in batch.items() if name != "index"}
        sharded = shard_batch(arrays, self.setup.mesh)
        return self._crop(sharded) if "pixels" in sharded else sharded

    def train_step(self, state: TrainState, batch: Batch) -> tuple[Any, ...]:
        """Dispatches a training step, see `vgg_jax.training.step.jit_steps`."""
        return self._jit_train_step(state, batch)

    def eval_step(self, variables: dict[str, Any], batch: Batch) -> MetricSums:
        """Dispatches an evaluation step, see `vgg_jax.training.step.eval_step`."""
        return self._jit_eval_step(variables, batch)

    def compile_train_step(self, state: TrainState, batch: Batch) -> None:
        """Compiles the training step. The first `train_step` then finds it in jax's cache.

        Warns if the step does not fit into the memory that was free before the run took any.
        """
        needed = peak_bytes(self._jit_train_step.lower(state, batch).compile())
        if needed > self._free_memory and is_main_process():
            logger.warning(
                f"a training step takes about {needed / 1e9:.1f} GB on each device, and "
                f"{self._free_memory / 1e9:.1f} GB are free: {self.memory_remedy()}"
            )

    def memory_remedy(self) -> str:
        """Names what would fit into memory. Compiles a few steps."""
        setup = self.setup
        num_classes, num_devices = len(setup.train.classes), setup.mesh.shape[DATA]
        return describe_remedy(setup.config, num_classes, num_devices, self._free_memory)


def run_unless_stopped(function: Callable[[], Any], stop: threading.Event) -> Future | None:
    """Runs a function in a thread, because the main thread handles no signal inside XLA.

    With several processes, the function always runs to its end: the others wait for the step.

    Args:
        function: Compiles or runs a program.
        stop: The event that a signal sets.

    Returns:
        The result, or None if a signal came first.
    """
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    def is_stopped() -> bool:
        return stop.is_set() and jax.process_count() == 1

    # Not a daemon: Python would kill it in the middle of XLA's code and abort the process.
    threading.Thread(target=run).start()
    while not future.done() and not is_stopped():
        wait([future], timeout=0.05)
    return None if is_stopped() else future


def file_names_of(source: "Source", step: PendingStep) -> str:
    """Lists the first file names of a step's images, and counts the others.

    Args:
        source: The training images.
        step: The step.

    Returns:
        For example "a.jpg, b.jpg and 6 more".
    """
    names = [source.file_name(int(index)) for index in step.indices if index >= 0]
    text = ", ".join(names[:MAX_FILE_NAMES])
    num_others = len(names) - MAX_FILE_NAMES
    return f"{text} and {num_others} more" if num_others > 0 else text


def to_numbers(sums: MetricSums) -> MetricSums:
    """Waits for the sums of a step. Python's numbers are added in double precision."""
    return jax.tree.map(float, jax.device_get(sums))


def first_rows(array: Any) -> np.ndarray:
    """The first rows of a batch, of at least one device of this process.

    Args:
        array: An array of the host, or one on the devices, sharded over "data".

    Returns:
        At most `MAX_CROPS` rows.
    """
    if isinstance(array, jax.Array):
        array = array.addressable_data(0)
    return np.asarray(array)[:MAX_CROPS]


@jax.jit
def all_finite(arrays: Any) -> jax.Array:
    """Tells if all values are finite.

    Args:
        arrays: A tree of arrays.

    Returns:
        bool (), True if no value is infinite or NaN.
    """
    return jnp.all(jnp.array([jnp.isfinite(x).all() for x in jax.tree.leaves(arrays)]))
