"""Names of splits, and the division of a training split into one to train and one to validate."""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vgg_jax.errors import InputError

logger = logging.getLogger(__name__)

# Version of the division and of the orders of epochs, which run.json records. A run keeps the one
# it began with. Version 1, of 0.1.0, held out images without regard to their classes, and hardly
# shuffled small data sets in a few TFRecord files.
INPUT_VERSION = 2
# A part of the storage of TFRecord files that are too large to be shuffled completely. In memory
# (`cache`), their images have another order.
BY_A_BUFFER = ", shuffled by a buffer"
# Names of the splits, in lower case and without "_set". The first of each is the kind.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}


def split_kind(name: str) -> str | None:
    """Tells which split a name means: "Training", "val" or "test_set", for example.

    Args:
        name: Name of a folder or of a split, in any case.

    Returns:
        A key of `SPLIT_NAMES`, or None for other names.
    """
    stem = name.lower().removesuffix("set").rstrip("_- ")
    return next((kind for kind, names in SPLIT_NAMES.items() if stem in names), None)


class Division(NamedTuple):
    """The images to train on and the held-out ones."""

    train: np.ndarray  # positions, int64, sorted
    held_out: np.ndarray  # positions, int64, sorted


def divide_by_class(
    name: str, classes: Sequence[str], labels: np.ndarray, fraction: float, seed: int
) -> Division:
    """Holds out the same fraction of each class, as far as its number of images allows.

    The number of held-out images of a class is rounded up or down, so that their total is that of
    `divide_at_random`. The largest remainders are rounded up, and equal ones by chance. Each class
    keeps an image to train on. A warning counts the classes that are not validated.

    Args:
        name: Name of the images, for messages.
        classes: Names of the classes, for messages.
        labels: Class of each image, int (n,).
        fraction: Fraction to hold out, at least one image unless it is 0.
        seed: Seed of the choice.

    Returns:
        The division.

    Raises:
        InputError: Each class has a single image.
    """
    order = _permutation(len(labels), seed)
    present, first, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    if fraction and sizes.max(initial=1) == 1:
        raise InputError(
            f"no image of {name} can be held out for validation: it has one image in each of its "
            f"{len(present)} class(es); add images, or a validation split"
        )
    total = _num_held_out(len(labels), fraction)
    counts = np.minimum(np.floor(sizes * fraction).astype(np.int64), sizes - 1)
    remainders = np.where(counts < sizes - 1, sizes * fraction - counts, -1)
    # `first` is the position of a class in the permutation, so equal remainders are in its order.
    by_remainder = np.lexsort((first, -remainders))
    can_grow = by_remainder[remainders[by_remainder] >= 0]
    counts[can_grow[: max(0, total - counts.sum())]] += 1
    by_class = order[np.argsort(labels[order], kind="stable")]
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    held_out = by_class[rank_in_class < np.repeat(counts, sizes)]
    train = np.setdiff1d(order, held_out)  # sorted
    missing = present[counts == 0]
    if fraction and len(missing):
        logger.warning(
            f"{len(missing)} of the {len(present)} classes of {name} have no image among the "
            f"{len(held_out)} for validation, for example {classes[missing[0]]!r}, which has "
            f"{np.sum(labels == missing[0])}: pass a larger --validation-fraction, or use a "
            "validation split"
        )
    return Division(train, np.sort(held_out))


def divide_at_random(size: int, fraction: float, seed: int) -> Division:
    """Holds out images at random.

    Args:
        size: Number of images.
        fraction: Fraction to hold out, at least one image unless it is 0.
        seed: Seed of the choice.

    Returns:
        The division.
    """
    order, count = _permutation(size, seed), _num_held_out(size, fraction)
    return Division(np.sort(order[count:]), np.sort(order[:count]))


def _permutation(size: int, seed: int) -> np.ndarray:
    # RandomState's stream is frozen. A new numpy must not move training images into the validation
    # part of a resumed run.
    return np.random.RandomState(np.random.MT19937(seed)).permutation(size).astype(np.int64)


def _num_held_out(size: int, fraction: float) -> int:
    return max(1, round(size * fraction)) if fraction else 0
