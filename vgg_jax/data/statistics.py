"""The colours of a data set: what is subtracted from a pixel, and the basis of the colour shift (§2.1, §3.1)."""

import dataclasses

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from vgg_jax.configs.colours import ColourStatistics
from vgg_jax.data.batches import BatchIterator
from vgg_jax.data.decode import decode
from vgg_jax.data.splits import DataSource
from vgg_jax.errors import InputError

BATCH = 64


@dataclasses.dataclass(frozen=True)
class ColourMeasurements:
    """Colours over all pixels, each counted once (`pixel_*`), and averages of what single images have (`image_*`). RGB, 0-255.

    `image_std` is the smaller one: the variance of the images' means is missing in it. The PyTorch baseline normalises by `image_*`.
    """

    count: int  # images
    pixel_mean: np.ndarray  # float64 (3,)
    pixel_std: np.ndarray
    image_mean: np.ndarray
    image_std: np.ndarray
    eigenvalues: np.ndarray  # of the covariance of pixels, largest first
    eigenvectors: (
        np.ndarray
    )  # float64 (3, 3); column j belongs to eigenvalue j, its largest entry is positive

    @property
    def statistics(self) -> ColourStatistics:
        """What the training configuration takes."""
        mean, values, vectors = (
            self.pixel_mean.tolist(),
            self.eigenvalues.tolist(),
            self.eigenvectors.tolist(),
        )
        return ColourStatistics(
            mean_rgb=tuple(mean), eigenvalues=tuple(values), eigenvectors=tuple(map(tuple, vectors))
        )


def measure_colours(
    source: DataSource, progress: bool = True, skip_bad: bool = False
) -> ColourMeasurements:
    """One pass over the whole images of a source, in constant memory. How EXIF turns them does not matter to their colours.

    With `skip_bad` an image that cannot be decoded does not count, within the limit of `BatchIterator`. Raises InputError for an empty source,
    and DataError for such an image.
    """
    if not source.size:
        raise InputError(
            f"{source.name} has no images: expected at least one to measure colours on"
        )
    sums, count = np.zeros((5, 3, 3)), 0
    batches = BatchIterator(
        source, lambda batch: source.examples(None, batch * BATCH), _sums, BATCH, skip_bad
    )
    with tqdm(
        total=source.size,
        desc=f"colours of {source.name}",
        unit="image",
        disable=None if progress else True,
        delay=2,
    ) as bar:
        for batch in batches:
            sums += batch["sums"].sum(0)
            count += int(batch["mask"].sum())
            bar.update(len(batch["sums"]))
    pixels = sums[0, 0, 0]
    mean = sums[1, 0] / pixels
    covariance = sums[2] / pixels - np.outer(mean, mean)
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
    """float64 (5, 3, 3): of one image the number of pixels, their sum, the sum of their outer products, their mean, their deviation.

    The first three are whole numbers, so adding them up is exact, in any order, below 2**53: some 700,000 ImageNet photos.
    """
    pixels = tf.cast(tf.reshape(decode(example["encoded"], exif=False), (-1, 3)), tf.float64)
    count = tf.cast(tf.shape(pixels)[0], tf.float64)
    total = tf.reduce_sum(pixels, 0)
    products = tf.matmul(pixels, pixels, transpose_a=True)
    mean = total / count
    deviation = tf.sqrt(tf.maximum(tf.linalg.diag_part(products) / count - mean**2, 0.0))
    rows = [tf.broadcast_to(each, (3, 3)) for each in (count, total, products, mean, deviation)]
    return {"index": example["index"], "mask": True, "sums": tf.stack(rows)}
