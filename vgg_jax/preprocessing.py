"""From pixels to what the nets read."""

import jax.numpy as jnp
from jax import Array


def preprocess(
    images: Array, mean_rgb: tuple[float, float, float], colour_shift: Array | None = None
) -> Array:
    """uint8 (N, H, W, 3) -> what the nets read: float32 less the mean RGB, plus a shift (N, 3) of each image's colour (§2.1, §3.1)."""
    images = images.astype(jnp.float32) - jnp.array(mean_rgb, jnp.float32)[None, None, None]
    return images if colour_shift is None else images + colour_shift[:, None, None, :]
