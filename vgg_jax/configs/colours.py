"""The colours of a data set: what is subtracted from a pixel, and the basis of the colour shift."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ColourStatistics:
    """The colours of a training set, in the units of 0-255 pixels: what is subtracted, and the basis of the colour shift."""

    mean_rgb: tuple[float, float, float]
    eigenvalues: tuple[float, float, float]  # of the 3x3 covariance of RGB pixels, largest first
    eigenvectors: tuple[
        tuple[float, float, float], ...
    ]  # rows R, G, B; column j belongs to eigenvalue j


IMAGENET = ColourStatistics(
    mean_rgb=(123.68, 116.779, 103.939),  # the mean pixel released with the authors' models
    # fb.resnet.torch has the eigenvalues of pixels scaled to [0, 1].
    eigenvalues=(0.2175 * 255**2, 0.0188 * 255**2, 0.0045 * 255**2),
    eigenvectors=(
        (-0.5675, 0.7192, 0.4009),
        (-0.5808, -0.0045, -0.8140),
        (-0.5836, -0.6948, 0.4203),
    ),
)
