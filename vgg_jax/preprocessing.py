"""Preprocessing of images into the input of a net."""

import jax.numpy as jnp
from jax import Array


def preprocess(
    images: Array, mean_rgb: tuple[float, float, float], colour_shift: Array | None = None
) -> Array:
    """Subtracts the mean RGB value (§2.1) and adds a colour shift to each image (§3.1).

    Args:
        images: uint8 (N, H, W, 3).
        mean_rgb: Mean of the training images, on the 0-255 scale.
        colour_shift: Shift (N, 3) of each image's colour, on the same scale; None for no shift.

    Returns:
        float32 (N, H, W, 3), the input of a net.
    """
    images = images.astype(jnp.float32) - jnp.array(mean_rgb, jnp.float32)[None, None, None]
    return images if colour_shift is None else images + colour_shift[:, None, None, :]
