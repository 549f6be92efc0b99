"""Colour statistics of a data set, for the mean subtraction and the colour shift (§2.1, §3.1)."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ColourStatistics:
    """Colour statistics of a training set, of RGB pixels in 0-255.

    Attributes:
        mean_rgb: The mean pixel, which is subtracted from every image.
        eigenvalues: Eigenvalues of the 3x3 covariance of RGB pixels, largest first.
        eigenvectors: Its eigenvectors. The rows are R, G and B; column j belongs to eigenvalue j.
    """

    mean_rgb: tuple[float, float, float]
    eigenvalues: tuple[float, float, float]
    eigenvectors: tuple[tuple[float, float, float], ...]


# Scales of images in other libraries, and their largest values.
IMAGE_RANGES = {"0-1": 1.0, "0-255": 255.0}
CHANNEL_ORDERS = ("rgb", "bgr")

IMAGENET = ColourStatistics(
    mean_rgb=(123.68, 116.779, 103.939),  # the mean pixel released with the authors' models
    # fb.resnet.torch gives the eigenvalues for pixels in [0, 1].
    eigenvalues=(0.2175 * 255**2, 0.0188 * 255**2, 0.0045 * 255**2),
    eigenvectors=(
        (-0.5675, 0.7192, 0.4009),
        (-0.5808, -0.0045, -0.8140),
        (-0.5836, -0.6948, 0.4203),
    ),
)
