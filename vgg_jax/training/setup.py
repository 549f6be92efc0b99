"""The fixed part of a training run: its data, its metadata and its devices."""

import dataclasses
import enum
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from vgg_jax.configs.colours import IMAGENET
from vgg_jax.configs.presets import resolve_learning_rate
from vgg_jax.configs.train import MAX_CACHED_PIXELS, TrainConfig
from vgg_jax.distributed.multihost import (
    assert_same_on_all,
    is_main_process,
    run_on_main_and_broadcast,
)
from vgg_jax.distributed.sharding import MeshConfig, make_mesh
from vgg_jax.division import INPUT_VERSION
from vgg_jax.errors import InputError
from vgg_jax.input_data import (
    TrainingArrays,
    cached,
    class_counts,
    first_batch,
    measure_colours,
    open_train_val,
)
from vgg_jax.ops.bfloat16 import choose_bfloat16_conv
from vgg_jax.paths import is_npz
from vgg_jax.runs.metadata import (
    RunMetadata,
    as_json,
    check_same_run,
    create_run,
    from_json,
    has_checkpoint,
    load_existing_run,
)
from vgg_jax.training.environment import describe_environment
from vgg_jax.training.init_from import Pretrained, has_new_head, measure_activations
from vgg_jax.weights import load

if TYPE_CHECKING:
    from vgg_jax.input_data import Source

logger = logging.getLogger(__name__)

# Share of an image that a crop shows. The paper's smallest is 0.19: 224 pixels at S = 512.
SMALLEST_SHARE = 0.12
MEASURED_IMAGES = 32  # whose activations show the scale of what a new fc6 reads


class Start(enum.Enum):
    """The state that a run starts from."""

    NEW = enum.auto()  # the workdir holds no checkpoint
    RESTARTED = enum.auto()  # it holds a best checkpoint, but none to resume from
    RESUMED = enum.auto()  # it holds a checkpoint to resume from


@dataclasses.dataclass(frozen=True)
class Setup:
    """All that stays the same during a run."""

    workdir: Path
    config: TrainConfig  # with its learning rate
    run: RunMetadata  # the content of run.json
    start: Start
    train: "Source"
    validation: "Source"
    mesh: Mesh
    mesh_config: MeshConfig
    class_weights: tuple[float, ...] | None = None  # of the loss; None: all 1


def prepare_run(
    config: TrainConfig,
    workdir: Path,
    data_dir: str | Path | None,
    download: bool,
    mesh_config: MeshConfig,
    command: str | None = None,
    arrays: TrainingArrays | None = None,
) -> tuple[Setup, Pretrained | None]:
    """Opens the data, and creates the run or compares it with the one in the workdir.

    Args:
        config: Settings of the run.
        workdir: Folder of the run.
        data_dir: Folder of prepared data sets.
        download: Downloads and prepares the data set first.
        mesh_config: The parallelism over all devices.
        command: The command line that starts the run, for `run.json`.
        arrays: Images in memory, instead of `config.data`.

    Returns:
        The setup, and the pretrained net of `config.init_from`. The net is None if the run
        resumes, or if it starts from random parameters. It is no part of the setup, so that its
        memory can be freed.

    Raises:
        InputError: The workdir holds another run, or the input is wrong.
    """
    if config.cache_features and jax.process_count() > 1:
        raise InputError(
            f"cache_features is set in one of {jax.process_count()} processes: expected one "
            "process, which holds all features; leave out --cache-features"
        )
    mesh = make_mesh(config.microbatch or config.batch_size, mesh_config=mesh_config)
    existing, start = find_existing_run(workdir)
    if existing is not None:  # compare before the slow reading of the data
        config = resolve_learning_rate(config, len(existing.classes), existing.activation_rms)
        check_same_run(workdir, existing, dataclasses.replace(existing, config=config))
    pretrained = None
    if config.init_from is not None and start is not Start.RESUMED:
        pretrained = Pretrained(*load(config.init_from))

    version = existing.input_version if existing else INPUT_VERSION
    train, validation = _open_data(config, data_dir, download, version, arrays)
    run = RunMetadata(
        config,
        train.classes,
        existing.colours if existing else IMAGENET,
        train.storage,
        train.size,
        validation.size,
        existing.activation_rms if existing else None,
        input_version=version,
        command=existing.command if existing else command,
        validation_storage=validation.storage,
        environment=existing.environment if existing else describe_environment(),
    )
    assert_same_on_all(
        as_json(run)["config"]
        | {"data": [run.storage, run.train_size, run.validation_size], "mesh_config": mesh_config}
        | {"validation": run.validation_storage}
        # A program that differs between processes may hang.
        | ({"bfloat16": choose_bfloat16_conv().describe()} if config.dtype == "bfloat16" else {})
    )
    if existing is not None and (changes := check_same_run(workdir, existing, run)):
        _log_changes(workdir, changes, config)
        run_on_main_and_broadcast(lambda: create_run(workdir, run))
    if config.cache:
        train, validation = cached(train, config), cached(validation, config)
    if existing is None:
        if config.statistics == "measure":
            run = _with_measured_colours(run, train)
        if pretrained is not None and has_new_head(pretrained, config, len(train.classes)):
            run = _with_measured_activations(run, train, pretrained)
        config = resolve_learning_rate(config, len(train.classes), run.activation_rms)
        run = dataclasses.replace(run, config=config)
        run_on_main_and_broadcast(lambda: create_run(workdir, run))
    weights = None
    if config.class_weights == "balanced":
        weights = balanced_weights(class_counts(train))
    setup = Setup(workdir, config, run, start, train, validation, mesh, mesh_config, weights)
    if existing is None and is_main_process():
        for warning in unlikely_choices(config, train.size):
            logger.warning(warning)
    return setup, pretrained


def balanced_weights(counts: np.ndarray) -> tuple[float, ...]:
    """Weights of the classes that are inverse to their numbers of images.

    They are those of scikit-learn's "balanced": n / (classes · images of the class).

    Args:
        counts: Number of training images of each class, int (K,). A class may have none.

    Returns:
        The weights. Their mean over the images is 1, so the learning rate keeps its meaning.
    """
    num_classes = np.count_nonzero(counts)
    return tuple((counts.sum() / (num_classes * np.maximum(counts, 1))).tolist())


def unlikely_choices(config: TrainConfig, num_images: int) -> list[str]:
    """Describes settings of a new run that are surely not meant.

    Args:
        config: The settings.
        num_images: Number of training images.

    Returns:
        A sentence for each, with what to do.
    """
    warnings = []
    if num_images <= config.batch_size and num_images > 1:
        proposal = 2 ** max(0, round(math.log2(num_images / 8)))
        warnings.append(
            f"an epoch is a single step, because {num_images} training images fit into one batch "
            f"of {config.batch_size}: pass a smaller batch size, such as --batch-size {proposal}"
        )
    share = (config.image_size / config.scale[0]) ** 2
    if share < SMALLEST_SHARE:
        ratio = round(config.image_size * 256 / 224)
        warnings.append(
            f"a crop of {config.image_size} pixels shows at most a {1 / share:.0f}th of an image "
            f"at S = {config.scale[0]}: pass --scale {ratio}, the paper's ratio, or a larger "
            "--image-size"
        )
    return warnings


def find_existing_run(workdir: Path) -> tuple[RunMetadata | None, Start]:
    """Reads the run that the workdir holds, as the main process finds it.

    Args:
        workdir: Folder of a run. It need not exist.

    Returns:
        The run if there is a checkpoint of it, and the state that it starts from.

    Raises:
        InputError: A run is damaged.
    """

    def find() -> dict[str, Any]:
        run = load_existing_run(workdir)
        # A run may have been killed after its first best checkpoint and before its last one.
        return {
            "run": None if run is None else as_json(run),
            "resumes": run is not None and has_checkpoint(workdir / "last"),
        }

    existing = run_on_main_and_broadcast(find)
    if existing["run"] is None:
        return None, Start.NEW
    return from_json(existing["run"]), Start.RESUMED if existing["resumes"] else Start.RESTARTED


def _log_changes(workdir: Path, changes: list[str], config: TrainConfig) -> None:
    """Logs how a run is carried out from now on, and warns if that may change its result."""
    logger.info(f"{workdir}: {'; '.join(changes)}")
    if config.batch_norm and any(change.startswith("microbatch ") for change in changes):
        logger.warning(
            "batch normalisation uses the statistics of a micro-batch, so the run goes on "
            "otherwise than it would have with the earlier --microbatch"
        )
    if config.image_size**2 <= MAX_CACHED_PIXELS and any(
        change.startswith("cache ") for change in changes
    ):
        logger.warning(
            "crops of small images of one size are computed otherwise with --cache, and differ by "
            "at most one grey level, so the run goes on otherwise than it would have"
        )


def _open_data(
    config: TrainConfig,
    data_dir: str | Path | None,
    download: bool,
    version: int,
    arrays: TrainingArrays | None,
) -> "tuple[Source, Source]":
    """Opens the training and the validation images, and logs their numbers."""
    folder = None if data_dir is None else str(data_dir)

    def download_data() -> None:
        if download and not is_npz(config.data):
            from vgg_jax.data import split_names

            split_names(config.data, data_dir=folder, download=True)

    # One process at a time: they may share a disk.
    run_on_main_and_broadcast(download_data)
    train, validation = open_train_val(
        config, arrays=arrays, data_dir=folder, download=download, version=version
    )
    logger.info(
        f"{config.data}: {train.size} training and {validation.size} validation images "
        f"of {len(train.classes)} classes"
    )
    if train.skipped or validation.skipped:
        logger.info(
            f"skipped {len(train.skipped)} training and {len(validation.skipped)} validation files "
            "that are not images"
        )
    return train, validation


def _with_measured_colours(run: RunMetadata, train: "Source") -> RunMetadata:
    """Replaces the run's colours by those of its training images."""

    def measure() -> dict[str, Any]:
        measurements = measure_colours(train, skip_bad=run.config.skip_bad)
        return as_json(dataclasses.replace(run, colours=measurements.statistics))

    return from_json(run_on_main_and_broadcast(measure))


def _with_measured_activations(
    run: RunMetadata, train: "Source", pretrained: Pretrained
) -> RunMetadata:
    """Fills in the run's `activation_rms`, measured on its first training images."""

    def measure() -> float | None:
        config = dataclasses.replace(run.config, batch_size=MEASURED_IMAGES, microbatch=None)
        batch = first_batch(train, config, run.colours)
        return measure_activations(pretrained, batch, run.colours.mean_rgb)

    return dataclasses.replace(run, activation_rms=run_on_main_and_broadcast(measure))
