"""The images of a run: files, which TensorFlow reads (`vgg_jax.data`), or arrays in memory.

TensorFlow is imported for files only.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax import array_batches
from vgg_jax.array_batches import crop_function
from vgg_jax.arrays import (
    IN_MEMORY,
    Arrays,
    ArraySource,
    check_arrays,
    default_settings,
    npz_split_names,
    open_npz_split,
    read_npz,
    train_val_sources,
)
from vgg_jax.colours import ColourMeasurements
from vgg_jax.configs.colours import ColourStatistics
from vgg_jax.configs.presets import preset
from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError
from vgg_jax.paths import is_npz

if TYPE_CHECKING:
    from vgg_jax.data import DataSource

    Source = DataSource | ArraySource

__all__ = [
    "TrainingArrays",
    "cached",
    "class_counts",
    "crop_function",
    "cropped",
    "eval_batches",
    "first_batch",
    "first_examples",
    "measure_colours",
    "open_split",
    "open_train_val",
    "pick",
    "rescaled_images",
    "resolve_config",
    "split_names",
    "train_batches",
]

Batches = Iterator[dict[str, np.ndarray]]


class TrainingArrays(NamedTuple):
    """The arrays of a run."""

    train: Arrays
    validation: Arrays | None  # None holds out a part of each class


def resolve_config(
    data: TrainConfig | str | os.PathLike | tuple[Any, Any],
    validation: tuple[Any, Any] | None,
    classes: Sequence[str] | None,
    settings: Mapping[str, Any],
) -> tuple[TrainConfig, TrainingArrays | None]:
    """Makes the configuration of a run of its data.

    Args:
        data: As the first argument of `vgg_jax.fit`.
        validation: Arrays to validate on, with arrays.
        classes: Names of the classes, with arrays.
        settings: Fields of TrainConfig, unless `data` is one.

    Returns:
        The configuration, and the arrays in memory.

    Raises:
        InputError: An argument is wrong, or does not fit the others.
    """
    options = {"validation": validation, "classes": classes}
    array_options = [name for name, value in options.items() if value is not None]
    if isinstance(data, TrainConfig):
        if array_options or settings:
            name = [*array_options, *settings][0]
            raise InputError(
                f"{name} is passed with a TrainConfig: expected it in the configuration, or arrays "
                "(images, labels) instead of one"
            )
        return data, None
    fields = [field.name for field in dataclasses.fields(TrainConfig) if field.name != "data"]
    unknown = [name for name in settings if name not in fields]
    if unknown:
        raise InputError(f"{unknown[0]} is no setting: expected some of {', '.join(fields)}")
    if isinstance(data, (str, os.PathLike)):
        if array_options:
            raise InputError(
                f"{array_options[0]} is passed and the data is {data!r}: expected it with arrays "
                "only"
            )
        name = os.fspath(data)
        if not is_npz(name):
            return preset(name, **settings), None
        arrays = _read_training_arrays(name)
    else:
        name, train = IN_MEMORY, check_arrays(*_as_pair(data, "the data"), "the data", classes)
        held_out = None
        if validation is not None:
            pair = _as_pair(validation, "validation")
            held_out = check_arrays(*pair, "the validation data", train.classes)
        arrays = TrainingArrays(train, held_out)
    defaults = default_settings(arrays.train.images, settings.get("image_size"))
    return preset(name, **defaults | dict(settings)), arrays


def _as_pair(data: Any, name: str) -> tuple[Any, Any]:
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        kind = f"{len(data)} items" if isinstance(data, (tuple, list)) else type(data).__name__
        raise InputError(f"{name} is {kind}: expected arrays (images, labels)")
    return data[0], data[1]


def _read_training_arrays(path: str) -> TrainingArrays:
    names = npz_split_names(path)
    if "train" not in names:
        raise InputError(f"{path!r} has the splits {', '.join(names)}: expected images to train on")
    splits = read_npz(path, ("train", "validation"))
    return TrainingArrays(splits["train"], splits.get("validation"))


def open_train_val(
    config: TrainConfig,
    *,
    arrays: TrainingArrays | None = None,
    data_dir: str | None = None,
    download: bool = False,
    version: int,
) -> "tuple[Source, Source]":
    """Opens the training and the validation images of a run.

    Args:
        config: The data, its division and what to leave out.
        arrays: Images in memory, instead of `config.data`.
        data_dir: Folder of prepared data sets.
        download: Download a data set that is not prepared.
        version: Version of the division and of the orders of epochs.

    Returns:
        The two sources.

    Raises:
        InputError: The data is missing or cannot be used.
    """
    if arrays is None and is_npz(config.data):
        arrays = _read_training_arrays(config.data)
    if arrays is not None:
        _check_config(config)
        return train_val_sources(
            *arrays,
            config.data,
            validation_fraction=config.validation_fraction,
            seed=config.seed,
        )
    if config.data == IN_MEMORY:
        raise InputError(
            f"data is {IN_MEMORY!r}: expected the arrays that the run was started with; pass "
            "(images, labels)"
        )
    from vgg_jax.data import open_train_val

    return open_train_val(
        config.data,
        data_dir=data_dir,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        skip_bad=config.skip_bad,
        exclude=config.exclude,
        download=download,
        version=version,
    )


def _check_config(config: TrainConfig) -> None:
    for name in ("exclude", "cache_features"):
        if getattr(config, name):
            raise InputError(
                f"{name} is set and the data are arrays: expected an image folder or a data set "
                f"with it; leave out {name}"
            )


def open_split(
    data: str, split: str, *, data_dir: str | None, download: bool, skip_bad: bool, **options: Any
) -> "Source":
    """Opens a whole split of a data set, see `vgg_jax.data.open_split`."""
    if is_npz(data):
        return open_npz_split(data, split)
    from vgg_jax.data import open_split

    return open_split(
        data, split, data_dir=data_dir, download=download, skip_bad=skip_bad, **options
    )


def split_names(data: str, *, data_dir: str | None, download: bool) -> tuple[str, ...]:
    """Lists the splits that `open_split` can open, see `vgg_jax.data.split_names`."""
    if is_npz(data):
        return npz_split_names(data)
    from vgg_jax.data import split_names

    return split_names(data, data_dir=data_dir, download=download)


def cached(source: "Source", config: TrainConfig) -> "Source":
    """Reads a source into memory, see `vgg_jax.data.cache_in_memory`. Arrays are there already."""
    if isinstance(source, ArraySource):
        return source
    from vgg_jax.data import cache_in_memory

    return cache_in_memory(source, config)


def pick(source: "Source", positions: np.ndarray) -> "Source":
    """Selects some examples of a source.

    Args:
        source: The images.
        positions: Positions of the examples in the source's own order, int (n,).

    Returns:
        A source of these examples in the order of `source`, each once. They keep their index, label
        and file name, and so the random draws of training.
    """
    if isinstance(source, ArraySource):
        return dataclasses.replace(source, indices=source.indices[np.unique(positions)])
    from vgg_jax.data import pick

    return pick(source, positions)


def first_examples(
    source: "Source", config: TrainConfig, count: int
) -> "tuple[Source, np.ndarray]":
    """Selects the examples that training sees first, see `vgg_jax.data.first_examples`."""
    if isinstance(source, ArraySource):
        positions = array_batches.epoch_order(source.size, config.seed, 0)[:count]
        return pick(source, positions), source.indices[positions]
    from vgg_jax.data import first_examples

    return first_examples(source, config, count)


def class_counts(source: "Source") -> np.ndarray:
    """Counts the images of each class, int (K,)."""
    if isinstance(source, ArraySource):
        labels = source.labels
    else:
        from vgg_jax.data import read_labels

        labels = read_labels(source)
    return np.bincount(labels, minlength=len(source.classes))


def train_batches(
    source: "Source", config: TrainConfig, colours: ColourStatistics, **position: Any
) -> Batches:
    """Makes the training batches of all epochs, see `vgg_jax.data.train_batches`.

    Args:
        source: The training images.
        config: Augmentation, batch size, number of epochs and seed.
        colours: Colours of the data set, for the colour shift.
        **position: `first_epoch`, `first_batch` and `rows`.

    Returns:
        The batches. Those of arrays have "pixels", which `crop_function` crops on the devices.
    """
    if isinstance(source, ArraySource):
        return array_batches.train_batches(source, config, **position)
    from vgg_jax.data import train_batches

    return iter(train_batches(source, config, colours, **position))


def first_batch(
    source: "Source", config: TrainConfig, colours: ColourStatistics
) -> dict[str, np.ndarray]:
    """The first training batch, with "image", "colour_shift", "label" and "mask"."""
    return next(cropped(train_batches(source, config, colours), config, colours))


def cropped(batches: Batches, config: TrainConfig, colours: ColourStatistics) -> Batches:
    """Crops the batches of arrays on the default device.

    Args:
        batches: Batches of `train_batches` or `eval_batches`.
        config: Augmentation and seed.
        colours: Colours of the data set, for the colour shift.

    Yields:
        The batches with "image", "colour_shift", "label", "mask" and "index".
    """
    crop = None
    for batch in batches:
        if "pixels" not in batch:
            yield batch
            continue
        crop = crop or crop_function(config, colours)
        index = batch.pop("index")
        images = crop(jax.tree.map(jnp.asarray, batch))
        yield jax.tree.map(np.asarray, images) | {"index": index}


def eval_batches(
    source: "Source", config: TrainConfig, batch_size: int, rows: np.ndarray | None = None
) -> Callable[[], Batches]:
    """Makes the batches of one pass over a source, see `vgg_jax.data.eval_batches`.

    Args:
        source: The images.
        config: Test scale and image size.
        batch_size: Number of examples in a batch.
        rows: Rows of each batch to make; None for all.

    Returns:
        A function that starts a pass.
    """
    if isinstance(source, ArraySource):
        return partial(array_batches.eval_batches, source, batch_size, rows)
    from vgg_jax.data import eval_batches

    return partial(iter, eval_batches(source, config, batch_size, rows))


def measure_colours(source: "Source", skip_bad: bool = False) -> ColourMeasurements:
    """Measures the colours of a source, see `vgg_jax.data.measure_colours`."""
    if isinstance(source, ArraySource):
        return array_batches.measure_colours(source)
    from vgg_jax.data import measure_colours

    return measure_colours(source, skip_bad=skip_bad)


def rescaled_images(
    source: "Source", scales: tuple[int, ...], exif: bool, rounding: str
) -> Batches:
    """Makes batches of one whole image each, see `vgg_jax.data.rescaled_images`."""
    if isinstance(source, ArraySource):
        return array_batches.rescaled_images(source, scales, rounding)
    from vgg_jax.data import rescaled_images

    return iter(rescaled_images(source, scales, exif, rounding))
