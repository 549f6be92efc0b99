"""Preprocessing of images into the input of a net."""

import jax.numpy as jnp
from jax import Array

from vgg_jax.errors import InputError


def preprocess(
    images: Array, mean_rgb: tuple[float, ...], colour_shift: Array | None = None
) -> Array:
    """Subtracts the mean RGB value (§2.1) and adds a colour shift to each image (§3.1).

    Args:
        images: uint8 (N, H, W, 3), or (N, H, W, C) for a net with other channels.
        mean_rgb: Mean of each channel of the training images, on the 0-255 scale.
        colour_shift: Shift (N, 3) of each image's colour, on the same scale; None for no shift.

    Returns:
        float32 of the shape of the images, the input of a net.

    Raises:
        InputError: There is not one mean for each channel.
    """
    if images.shape[-1] != len(mean_rgb):
        raise InputError(
            f"the images have {images.shape[-1]} channels and the net's mean {len(mean_rgb)}: "
            "expected images with the channels of the net"
        )
    images = images.astype(jnp.float32) - jnp.array(mean_rgb, jnp.float32)[None, None, None]
    return images if colour_shift is None else images + colour_shift[:, None, None, :]
