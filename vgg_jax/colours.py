"""Colours of a data set: their measurement, and the basis of the colour shift (§2.1, §3.1)."""

import dataclasses

import numpy as np

from vgg_jax.configs.colours import ColourStatistics


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


def from_sums(sums: np.ndarray, count: int) -> ColourMeasurements:
    """Computes the measurements from sums over all images.

    Args:
        sums: float64 (5, 3, 3): the number of pixels, their sum, their outer products, and the sums
            of the images' means and standard deviations. Those of three values are repeated along
            the first axis.
        count: Number of images.

    Returns:
        The measurements.
    """
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


def shift_components(convention: str, statistics: ColourStatistics) -> np.ndarray:
    """Eigenvectors, scaled so that three normal alphas give a colour shift.

    The printed formula multiplies an eigenvector by its variance. For 0-255 pixels, that shift
    would be far too large.

    Args:
        convention: Unit of the shift, as `TrainConfig.colour_convention`.
        statistics: Colours of the data set.

    Returns:
        The columns of a float32 (3, 3): RGB, in the units of 0-255 pixels.
    """
    eigenvalues = np.array(statistics.eigenvalues)
    # "deviation" is the convention of Krizhevsky's own code and of MatConvNet. "variance" is that
    # of fb.resnet.torch, whose pixels are in [0, 1]: divide by 255², then multiply by 255.
    scale = np.sqrt(eigenvalues) if convention == "deviation" else eigenvalues / 255
    return (np.array(statistics.eigenvectors) * scale).astype(np.float32)
