"""The crops that training gets of some images, and what evaluation sees of them."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vgg_jax.configs.colours import IMAGENET, ColourStatistics
from vgg_jax.configs.train import TrainConfig
from vgg_jax.division import INPUT_VERSION
from vgg_jax.errors import InputError
from vgg_jax.input_data import (
    cached,
    cropped,
    eval_batches,
    first_examples,
    measure_colours,
    open_train_val,
    rescaled_images,
    resolve_config,
    train_batches,
)
from vgg_jax.reporting.grid import add_colour_shift

if TYPE_CHECKING:
    from vgg_jax.input_data import Source


# A sheet of so many pixels takes half a gigabyte. matplotlib draws at most 65,535 on a side.
MAX_COUNT, MAX_CROPS = 100, 2000


class Crops(NamedTuple):
    """Images of a training split, and their crops.

    All images are RGB, uint8.
    """

    photos: tuple[np.ndarray, ...]  # (H, W, 3), the shorter side is the test scale
    crops: np.ndarray  # (n, epochs, size, size, 3), with the colour shift
    evaluation: np.ndarray  # (n, size, size, 3), the centre crop at the test scale
    labels: np.ndarray  # int32 (n,)
    names: tuple[str, ...]  # of the files


class Preview(NamedTuple):
    """Crops of the images that a run sees first, and where they come from."""

    crops: Crops
    config: TrainConfig
    source: str  # name of the training split
    size: int  # number of its images
    classes: tuple[str, ...]


def open_preview(
    data: Any,
    images: int,
    epochs: int,
    *,
    data_dir: str | None = None,
    download: bool = False,
    validation: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
    **settings: Any,
) -> Preview:
    """Opens the data of a run, and crops the images that it sees first.

    Args:
        data: As the first argument of `vgg_jax.fit`.
        images: Maximum number of images.
        epochs: Number of epochs, and so of crops of each image.
        data_dir: Folder of prepared data sets.
        download: Download a data set that is not prepared.
        validation: Arrays (images, labels) of the run to validate on.
        classes: Names of the classes of arrays.
        **settings: Fields of TrainConfig, if `data` is not one.

    Returns:
        The crops.

    Raises:
        InputError: An argument is wrong, or the data is missing or cannot be used.
        DataError: An image cannot be read.
    """
    for name, value in {"images": images, "epochs": epochs}.items():
        if not 1 <= value <= MAX_COUNT:
            raise InputError(f"{name} is {value}: expected a number from 1 to {MAX_COUNT}")
    if images * epochs > MAX_CROPS:
        raise InputError(
            f"images is {images} and epochs is {epochs}: expected at most {MAX_CROPS} crops; pass "
            "fewer of them"
        )
    config, arrays = resolve_config(data, validation, classes, settings)
    train, _ = open_train_val(
        config, arrays=arrays, data_dir=data_dir, download=download, version=INPUT_VERSION
    )
    if config.cache:
        train = cached(train, config)
    colours = IMAGENET
    if config.statistics == "measure" and config.colour_shift:
        colours = measure_colours(train, skip_bad=config.skip_bad).statistics
    crops = first_crops(train, config, colours, images, epochs)
    return Preview(crops, config, train.name, train.size, train.classes)


def describe(preview: Preview) -> tuple[str, str]:
    """Describes a preview in words.

    Args:
        preview: The preview.

    Returns:
        Its images, as "8 of the 1617 images of digits train, epochs 1 to 6"; and what the net sees,
        as "S = 32, random crops of 32 pixels, no flip, no colour shift, Q = 32".
    """
    config, (count, epochs) = preview.config, preview.crops.crops.shape[:2]
    shown = f"all {count}" if count == preview.size else f"{count} of the {preview.size}"
    scales = " to ".join(map(str, sorted({*config.scale})))
    flip = "flip" if config.flip else "no flip"
    shift = f"colour shift {config.colour_shift:g}" if config.colour_shift else "no colour shift"
    return (
        f"{shown} images of {preview.source}, {'epoch' if epochs == 1 else 'epochs 1 to'} {epochs}",
        f"S = {scales}, {config.crop} crops of {config.image_size} pixels, {flip}, {shift}, "
        f"Q = {config.test_scale}",
    )


def first_crops(
    source: "Source", config: TrainConfig, colours: ColourStatistics, images: int, epochs: int
) -> Crops:
    """Crops the images that training sees first, as training crops them.

    Args:
        source: The training images, cached if training caches them.
        config: The configuration of training.
        colours: Colours of the data set, for the colour shift.
        images: Maximum number of images.
        epochs: Number of epochs.

    Returns:
        The first images of the first epoch, in its order, and their crops in epochs 1 to `epochs`.

    Raises:
        DataError: An image cannot be read.
    """
    first, order = first_examples(source, config, images)
    count = len(order)
    # With all images in one batch, an epoch has one batch.
    shown = dataclasses.replace(config, batch_size=count, microbatch=None, epochs=epochs)
    crops = np.empty((count, epochs, *[config.image_size] * 2, 3), np.uint8)
    batches = cropped(train_batches(first, shown, colours), shown, colours)
    for epoch, batch in enumerate(batches):
        shifted = add_colour_shift(batch["image"], batch["colour_shift"])
        crops[:, epoch] = shifted[_rows(batch, order)]
    (batch,) = cropped(eval_batches(first, shown, count)(), shown, colours)
    rows = _rows(batch, order)
    scaled = rescaled_images(first, (config.test_scale,), config.exif, "nearest")
    photos = {int(photo["index"][0]): photo["scaled"][0][0] for photo in scaled}
    return Crops(
        photos=tuple(photos[index] for index in order.tolist()),
        crops=crops,
        evaluation=batch["image"][rows],
        labels=batch["label"][rows],
        names=tuple(map(first.file_name, order.tolist())),
    )


def _rows(batch: dict[str, np.ndarray], order: np.ndarray) -> np.ndarray:
    """Rows of a batch in which the images of these indices are, int64 (n,)."""
    ranks = np.argsort(batch["index"])
    return ranks[np.searchsorted(batch["index"], order, sorter=ranks)]
