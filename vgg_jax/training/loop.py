"""The training loop: from a configuration to a folder with a trained net (§3.1)."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vgg_jax.configs.train import KEEP, MAX_LR_HALVINGS, ON_NAN, SAVE_SECONDS, TrainConfig
from vgg_jax.distributed.multihost import (
    Watchdog,
    any_process,
    assert_same_on_all,
    is_main_process,
    run_on_main_and_broadcast,
    translate_lost_peer,
)
from vgg_jax.distributed.sharding import DATA_PARALLEL, MeshConfig
from vgg_jax.errors import InputError, OutOfMemoryError, single_line
from vgg_jax.input_data import resolve_config
from vgg_jax.paths import is_remote, to_path
from vgg_jax.reporting.events import require_tensorboardx
from vgg_jax.runs.files import atomic_write, workdir_lock
from vgg_jax.runtime.memory import is_out_of_memory
from vgg_jax.runtime.profile import StepProfile
from vgg_jax.runtime.signals import graceful_stop, interrupt_on_sigterm
from vgg_jax.training.checkpointer import Checkpointer
from vgg_jax.training.init_from import Pretrained
from vgg_jax.training.setup import Setup, prepare_run
from vgg_jax.training.trainer import DivergedError, FitResult, Trainer

logger = logging.getLogger(__name__)


def fit(
    config: TrainConfig | str | os.PathLike | tuple[Any, Any],
    workdir: str | Path,
    data_dir: str | Path | None = None,
    download: bool = False,
    *,
    validation: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
    save_seconds: float = SAVE_SECONDS,
    keep: int = KEEP,
    on_nan: str = "stop",
    debug_nans: bool = False,
    tensorboard: bool = False,
    profile: tuple[int, int] | None = None,
    mesh_config: MeshConfig = DATA_PARALLEL,
    command: str | None = None,
    trainer_class: type[Trainer] | None = None,
    **settings: Any,
) -> FitResult:
    """Trains a net, or resumes the run in the workdir. Logs a line for each epoch.

    The lines have the level INFO, which `logging.basicConfig(level=logging.INFO)` shows.
    An epoch is one pass over all training images. Then the validation accuracy determines the
    learning rate and which state is the best (§3.1). The first SIGINT or SIGTERM stops the run
    after the current step and saves it; the second one ends it at once. A failed save, as on a
    full disk, is logged as a warning, and training continues.

    Args:
        config: Settings of the run. Or its data: arrays (images, labels), a path of an .npz file,
            or a name or folder as for `preset`. Images are uint8 (N, H, W, 3) or grey (N, H, W),
            labels are class numbers from 0 or class names, (N,) or (N, 1).
        workdir: Folder of the run. A call locks it.
        data_dir: Folder of prepared data sets.
        download: Downloads and prepares the data set first.
        validation: Arrays (images, labels) to validate on. By default a part of each class of the
            training arrays is held out.
        classes: Names of the classes of arrays.
        save_seconds: Seconds between two saves in an epoch. The end of each epoch is also saved.
        keep: Number of checkpoints to keep in `last/`, and in `best/`.
        on_nan: "stop" raises DivergedError if the loss or a parameter is infinite or NaN.
            "halve" resumes from the last save with half the learning rate, at most
            `MAX_LR_HALVINGS` times.
        debug_nans: Checks each step, and names the layer in the DivergedError.
        tensorboard: Writes events for TensorBoard to `workdir/tensorboard`.
        profile: The first and the last step to trace, counted from 1 in this call. The trace is
            written to `workdir/tensorboard`.
        mesh_config: The parallelism over the devices of all processes.
        command: The command line that starts the run, kept in `run.json`.
        trainer_class: Replaces the `Trainer`, for tests.
        **settings: Fields of TrainConfig, if `config` is data. The others are the defaults of
            `preset`. Those of arrays suit the size of the images: up to 64 pixels CIFAR-10's, else
            the paper's.

    Returns:
        The records of the finished epochs, and whether a signal stopped the run.

    Raises:
        InputError: The input is wrong.
        DataError: An image cannot be read.
        DivergedError: The loss or a parameter is infinite or NaN.
        CheckpointSaveError: The end of the run could not be saved.
        OutOfMemoryError: The device ran out of memory.
        ProcessLostError: Another process of the run has ended.
    """
    if on_nan not in ON_NAN:
        raise InputError(f"on_nan is {on_nan!r}: expected one of {', '.join(ON_NAN)}")
    if not save_seconds >= 0:
        raise InputError(f"save_seconds is {save_seconds}: expected 0 or more")
    # The best checkpoint of a diverged attempt is deleted, and the one before takes its place.
    if keep < 1 + (on_nan == "halve"):
        raise InputError(
            f"keep is {keep} and on_nan is {on_nan!r}: expected at least 1 checkpoint, and 2 with "
            "'halve'"
        )
    folder, halvings = to_path(workdir), 0
    events_folder = folder / "tensorboard"
    flags = [name for name, value in (("tensorboard", tensorboard), ("profile", profile)) if value]
    if flags and is_remote(workdir):
        raise InputError(
            f"{workdir} is in an object store: expected a local folder with --{flags[0]}; pass "
            f"another --workdir, or leave out --{flags[0]}"
        )
    if tensorboard:
        require_tensorboardx()
    step_profile = None if profile is None else StepProfile(profile, events_folder)
    run_config, arrays = resolve_config(config, validation, classes, settings)
    prepare = partial(
        prepare_run, run_config, folder, data_dir, download, mesh_config, command, arrays
    )
    make_trainer = partial(
        trainer_class or Trainer,
        save_seconds=save_seconds,
        debug_nans=debug_nans,
        events_folder=events_folder if tensorboard else None,
        profile=step_profile,
    )
    with translate_lost_peer(folder), contextlib.ExitStack() as stack:

        def lock_workdir() -> None:
            stack.enter_context(workdir_lock(folder))

        assert_same_on_all({"on_nan": on_nan, "debug_nans": debug_nans, "tensorboard": tensorboard})
        run_on_main_and_broadcast(lock_workdir)
        if step_profile is not None and is_main_process():
            stack.callback(step_profile.close)
        logger.info(f"the folder of this run is {folder}")
        while True:
            try:
                return _fit(prepare, make_trainer, halvings, keep)
            except DivergedError as error:
                is_last_attempt = on_nan == "stop" or error.halvings == MAX_LR_HALVINGS
                if is_last_attempt or any_process(error.stop.is_set()):
                    run_on_main_and_broadcast(partial(_note_divergence, folder, str(error)))
                    raise
                halvings = error.halvings + 1
                logger.warning(f"{error}: resuming from the last save with half the learning rate")


def _note_divergence(workdir: Path, message: str) -> None:
    """Writes the error into the workdir, for reports."""
    # The error itself matters more than a disk or a store, which has its own errors, that fails.
    with contextlib.suppress(Exception):
        atomic_write(workdir / "diverged.txt", f"{message}\n".encode())


def _fit(
    prepare: Callable[[], tuple[Setup, Pretrained | None]],
    make_trainer: Callable[..., Trainer],
    halvings: int,
    keep: int,
) -> FitResult:
    """Trains to the end of the run, a signal or an error."""
    try:
        with interrupt_on_sigterm():
            setup, pretrained = prepare()
    except KeyboardInterrupt:  # nothing is lost: what the run has done is on the disk
        logger.info("stopped before training: run the same command again")
        return FitResult([], stopped=True)
    if is_main_process():
        with contextlib.suppress(Exception):  # as in `_note_divergence`
            (setup.workdir / "diverged.txt").unlink(missing_ok=True)  # of an earlier call
    # From here on JAX traces and compiles. A KeyboardInterrupt raised there is swallowed, or it
    # crashes the process.
    with (
        graceful_stop() as stop,
        Checkpointer(setup.workdir, keep) as checkpointer,
        Watchdog() as watchdog,
    ):
        trainer = make_trainer(setup, checkpointer, watchdog, stop)
        with contextlib.closing(trainer), _explain_out_of_memory(trainer):
            trainer.restore_or_init(pretrained, halvings)
            del pretrained  # free its memory
            if not trainer.make_batches():
                return trainer.save_and_stop()
            while (lr := trainer.next_learning_rate()) is not None:
                if not trainer.train_epoch(lr) or not trainer.validate():
                    return trainer.save_and_stop()
                trainer.finish_epoch()
            checkpointer.wait_until_finished()
    return trainer.result()


@contextlib.contextmanager
def _explain_out_of_memory(trainer: Trainer) -> Iterator[None]:
    """Turns an error of missing memory into an OutOfMemoryError that names what would fit."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not is_out_of_memory(error):
            raise
        message = f"out of memory ({single_line(error)})"
    else:
        return
    # After the block, so that the error's traceback holds no arrays any more.
    raise OutOfMemoryError(f"{message}: {trainer.memory_remedy()}")
