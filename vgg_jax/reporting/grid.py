"""Images as the net sees them, side by side."""

import math

import numpy as np

GAP = 2  # pixels between two images


def add_colour_shift(images: np.ndarray, colour_shift: np.ndarray) -> np.ndarray:
    """Adds the colour shift to training crops, for people to look at.

    Args:
        images: uint8 (N, H, W, 3).
        colour_shift: float (N, 3), on the 0-255 scale.

    Returns:
        uint8 (N, H, W, 3), rounded, and clipped to 0-255.
    """
    shifted = images + colour_shift[:, None, None]
    return np.clip(np.rint(shifted), 0, 255).astype(np.uint8)


def make_grid(images: np.ndarray, gap: int = GAP) -> np.ndarray:
    """Places images side by side, in rows of equal length.

    Args:
        images: (N, H, W, C), at least one.
        gap: Pixels between two images.

    Returns:
        (h, w, C) of the same type, a grid that is as wide as it is high, or a row higher or less.
        Gaps and empty cells are 0.
    """
    num_images, height, width, channels = images.shape
    num_columns = math.ceil(math.sqrt(num_images))
    num_rows = -(-num_images // num_columns)
    shape = (num_rows * (height + gap) - gap, num_columns * (width + gap) - gap, channels)
    grid = np.zeros(shape, images.dtype)
    for number, image in enumerate(images):
        row, column = divmod(number, num_columns)
        top, left = row * (height + gap), column * (width + gap)
        grid[top : top + height, left : left + width] = image
    return grid
