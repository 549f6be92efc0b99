"""Colours of a data set: the mean to subtract, and the basis of the colour shift (§2.1, §3.1)."""

import dataclasses

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from vgg_jax.configs.colours import ColourStatistics
from vgg_jax.data.batches import BatchIterator
from vgg_jax.data.decode import decode
from vgg_jax.data.splits import DataSource
from vgg_jax.errors import InputError

IMAGES_PER_BATCH = 64


@dataclasses.dataclass(frozen=True)
class ColourMeasurements:
    """Colours of a data set, RGB, 0-255.

    `pixel_*` count each pixel once. `image_*` are averages over the images. `image_std` is smaller
    than `pixel_std`, because it does not contain the variance of the images' means.

    Attributes:
        count: Number of images.
        pixel_mean: Mean of all pixels, float64 (3,), as are the next four.
        pixel_std: Standard deviation of all pixels.
        image_mean: Average of the images' means.
        image_std: Average of the images' standard deviations.
        eigenvalues: Eigenvalues of the covariance of all pixels, largest first.
        eigenvectors: float64 (3, 3); column j belongs to eigenvalue j, and its largest entry is
            positive.
    """

    count: int
    pixel_mean: np.ndarray
    pixel_std: np.ndarray
    image_mean: np.ndarray
    image_std: np.ndarray
    eigenvalues: np.ndarray
    eigenvectors: np.ndarray

    @property
    def statistics(self) -> ColourStatistics:
        """The mean, eigenvalues and eigenvectors as plain numbers, for training."""
        return ColourStatistics(
            mean_rgb=tuple(self.pixel_mean.tolist()),
            eigenvalues=tuple(self.eigenvalues.tolist()),
            eigenvectors=tuple(map(tuple, self.eigenvectors.tolist())),
        )


def measure_colours(
    source: DataSource, progress: bool = True, skip_bad: bool = False
) -> ColourMeasurements:
    """Measures the colours of the whole images of a source, in one pass and constant memory.

    EXIF is ignored, since an orientation changes no colour.

    Args:
        source: The images.
        progress: Show a progress bar on a terminal.
        skip_bad: Leave out images that cannot be decoded, within the limit of `BatchIterator`.

    Returns:
        The measurements.

    Raises:
        InputError: The source is empty.
        DataError: An image cannot be decoded.
    """
    if not source.size:
        raise InputError(
            f"{source.name} has no images: expected at least one to measure colours on"
        )
    sums, count = np.zeros((5, 3, 3)), 0
    batches = BatchIterator(
        source,
        lambda number: source.examples(None, number * IMAGES_PER_BATCH),
        _sums,
        IMAGES_PER_BATCH,
        skip_bad,
    )
    bar = tqdm(
        total=source.size,
        desc=f"colours of {source.name}",
        unit="image",
        disable=None if progress else True,
        delay=2,
    )
    with bar:
        for batch in batches:
            sums += batch["sums"].sum(0)
            count += int(batch["mask"].sum())
            bar.update(len(batch["sums"]))
    num_pixels = sums[0, 0, 0]
    mean = sums[1, 0] / num_pixels
    covariance = sums[2] / num_pixels - np.outer(mean, mean)
    eigenvalues, eigenvectors = np.linalg.eigh(covariance)
    eigenvalues, eigenvectors = np.maximum(eigenvalues[::-1], 0), eigenvectors[:, ::-1]
    largest = np.take_along_axis(eigenvectors, np.abs(eigenvectors).argmax(0)[None], 0)
    return ColourMeasurements(
        count=count,
        pixel_mean=mean,
        pixel_std=np.sqrt(np.diag(covariance).clip(0)),
        image_mean=sums[3, 0] / count,
        image_std=sums[4, 0] / count,
        eigenvalues=eigenvalues,
        eigenvectors=eigenvectors * np.sign(largest),
    )


def _sums(example: dict) -> dict:
    """Sums of one image: pixels, their sum, their outer products, their mean, their deviation.

    They are stacked to a float64 (5, 3, 3). The first three are whole numbers, so their sums over
    images are exact in any order below 2**53 (docs/performance.md#sums-of-colours).
    """
    pixels = tf.cast(tf.reshape(decode(example["encoded"], exif=False), (-1, 3)), tf.float64)
    count = tf.cast(tf.shape(pixels)[0], tf.float64)
    total = tf.reduce_sum(pixels, 0)
    products = tf.matmul(pixels, pixels, transpose_a=True)
    mean = total / count
    variance = tf.linalg.diag_part(products) / count - mean**2
    deviation = tf.sqrt(tf.maximum(variance, 0.0))
    rows = (count, total, products, mean, deviation)
    sums = tf.stack([tf.broadcast_to(row, (3, 3)) for row in rows])
    return {"index": example["index"], "mask": True, "sums": sums}
