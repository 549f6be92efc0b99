"""XLA's own convolution, which every path of `vgg_jax.ops.convolution` can fall back on."""

from jax import Array, lax

DIMENSION_NUMBERS = ("NHWC", "HWIO", "NHWC")
# An input of at most this many channels is an image: too few for Winograd and for tensor cores.
MAX_IMAGE_CHANNELS = 4


def xla_conv(x: Array, kernel: Array) -> Array:
    """Convolves by XLA, with stride 1 and zero padding that keeps the size.

    Args:
        x: Input (N, H, W, C).
        kernel: Kernel (k, k, C, K).

    Returns:
        Output (N, H, W, K).
    """
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSION_NUMBERS)
