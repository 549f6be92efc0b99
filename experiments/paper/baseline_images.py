"""Images of `baseline.py`: digits or an .npz file, their mean and deviation, and their crops."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from experiments.paper.scan_training import Data, load_data, take_first
from vgg_jax.array_batches import IMAGES_PER_CALL, crop_function, measure_colours
from vgg_jax.arrays import ArraySource, check_arrays, train_val_sources
from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError, install_hint

Rgb = tuple[float, float, float]


def load_images(data: str, num_train: int | None) -> tuple[Data, Rgb]:
    """Reads the images, and measures their mean and deviation.

    Args:
        data: "digits", or an .npz file of `cifar10_arrays`.
        num_train: Number of training images to use, before a tenth is held out. None: all.

    Returns:
        The images, whose `colours` have the mean over images of their means; and the mean over
        images of their deviations, on the 0-255 scale.

    Raises:
        InputError: There are no such images, or each has a single colour.
    """
    images = _load_digits(num_train) if data == "digits" else load_data(data, num_train)
    measured = measure_colours(images.train)
    if not measured.image_std.all():
        raise InputError(
            f"the images of {data} have the deviations {measured.image_std.tolist()}: expected "
            "images of more than one colour, because they are divided by these"
        )
    colours = dataclasses.replace(images.colours, mean_rgb=tuple(measured.image_mean.tolist()))
    return images._replace(colours=colours), tuple(measured.image_std.tolist())


def _load_digits(num_train: int | None) -> Data:
    """The digits of scikit-learn, as `vgg-jax train digits` makes images of them."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError(
            f"the data 'digits' needs scikit-learn ({error}): {install_hint('train')}"
        ) from error
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # values are 0-16
    arrays = take_first(check_arrays(pixels, digits.target, "digits"), num_train, "train", "digits")
    train_source, validation = train_val_sources(arrays, None, "digits")
    # The digits have no test images, which this script does not use.
    return Data(train_source, validation, validation, measure_colours(train_source).statistics)


def crop_images(source: ArraySource, config: TrainConfig, data: Data) -> np.ndarray:
    """The images of a source as the net reads them, uint8 (n, size, size, 3)."""
    crop, parts = crop_function(config, data.colours), []
    for start in range(0, source.size, IMAGES_PER_CALL):
        indices = source.indices[start : start + IMAGES_PER_CALL]
        labels = {"label": jnp.zeros(len(indices)), "mask": jnp.ones(len(indices), bool)}
        parts.append(np.asarray(crop({"pixels": source.images[indices], **labels})["image"]))
    return np.concatenate(parts)
