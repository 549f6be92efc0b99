"""Layer-by-layer summary of a net: shapes, parameters, multiply-adds and receptive fields.

The totals and the printed table follow torchsummary.
"""

import math
from typing import NamedTuple

from vgg_jax.configs.models import VGGConfig, layer_table

MEGABYTE = 2**20


class LayerSummary(NamedTuple):
    """Output and cost of one layer, for one image."""

    name: str
    shape: tuple[int, ...]  # (H, W, C), or (features,) from fc6 on
    params: int
    macs: int  # multiply-adds of a convolution or fully connected layer
    receptive_field: int  # side of the image region that one output depends on, in pixels


def summarize(
    config: VGGConfig,
    num_classes: int = 1000,
    batch_norm: bool = False,
    image_size: int = 224,
    top: bool = True,
    in_channels: int = 3,
) -> list[LayerSummary]:
    """Computes the shape and cost of every layer.

    Args:
        config: A column of Table 1.
        num_classes: Output features of fc8.
        batch_norm: Adds batch normalisation after every convolution. Its running statistics are
            not counted as parameters, as in torchsummary.
        image_size: Side of the square images.
        top: Includes the fully connected layers.
        in_channels: Channels of the images.

    Returns:
        The layers in the order of the forward pass.

    Raises:
        InputError: If the image is too small, or if there is no class.
    """
    layers: list[LayerSummary] = []
    side, channels, receptive_field, stride = image_size, in_channels, 1, 1
    in_head = False
    for layer in layer_table(config, num_classes, batch_norm, image_size):
        params = macs = 0
        if layer.type == "fc" and not top:
            break
        if layer.type in ("conv", "fc"):
            if layer.type == "fc":
                in_head = True
                side = side - layer.kernel_size + 1
            weights = layer.kernel_size**2 * channels * layer.features
            params, macs = weights + layer.features, weights * side * side
            receptive_field += (layer.kernel_size - 1) * stride
            channels = layer.features
        elif layer.type == "bn":
            params = 2 * channels
        elif layer.type == "pool":
            receptive_field, stride, side = receptive_field + stride, stride * 2, side // 2
        shape = (channels,) if in_head else (side, side, channels)
        layers.append(LayerSummary(layer.name, shape, params, macs, receptive_field))
    return layers


def totals(
    layers: list[LayerSummary], image_size: int = 224, in_channels: int = 3
) -> dict[str, float]:
    """Adds up parameters, multiply-adds and torchsummary's memory estimate.

    Args:
        layers: The layers of a net.
        image_size: Side of the square images.
        in_channels: Channels of the images.

    Returns:
        "params", "macs", and for one float32 image in units of 2^20 bytes "input_mb",
        "forward_backward_mb" (all outputs, twice), "params_mb" and "total_mb".
    """
    params = sum(layer.params for layer in layers)
    megabytes = {
        "input_mb": in_channels * image_size**2 * 4 / MEGABYTE,
        "forward_backward_mb": 2 * sum(math.prod(layer.shape) for layer in layers) * 4 / MEGABYTE,
        "params_mb": params * 4 / MEGABYTE,
    }
    counts = {"params": params, "macs": sum(layer.macs for layer in layers)}
    return counts | megabytes | {"total_mb": sum(megabytes.values())}


def table(
    config: VGGConfig,
    num_classes: int = 1000,
    batch_norm: bool = False,
    image_size: int = 224,
    top: bool = True,
    in_channels: int = 3,
) -> str:
    """Formats the summary as torchsummary does, with multiply-adds and receptive fields added.

    Args:
        config: A column of Table 1.
        num_classes: Output features of fc8.
        batch_norm: Adds batch normalisation after every convolution.
        image_size: Side of the square images.
        top: Includes the fully connected layers.
        in_channels: Channels of the images.

    Returns:
        The lines to print, one for each layer and the totals.

    Raises:
        InputError: If the image is too small, or if there is no class.
    """
    layers = summarize(config, num_classes, batch_norm, image_size, top, in_channels)
    total = totals(layers, image_size, in_channels)
    line, double_line = "-" * 84, "=" * 84
    text = [
        line,
        f"{'Layer':<10}{'Output shape':>24}{'Param #':>16}{'MACs':>18}{'Receptive field':>16}",
        double_line,
    ]
    for layer in layers:
        shape = [-1, *layer.shape]  # -1 for the batch
        macs = f"{layer.macs:,}" if layer.macs else ""
        text.append(
            f"{layer.name:<10}{shape!s:>24}{layer.params:>16,}{macs:>18}{layer.receptive_field:>16}"
        )
    text += [
        double_line,
        f"Total params: {total['params']:,}",
        f"Trainable params: {total['params']:,}",
        "Non-trainable params: 0",
        f"Total MACs: {total['macs']:,}",
        line,
        f"Input size (MB): {total['input_mb']:.2f}",
        f"Forward/backward pass size (MB): {total['forward_backward_mb']:.2f}",
        f"Params size (MB): {total['params_mb']:.2f}",
        f"Estimated Total Size (MB): {total['total_mb']:.2f}",
        line,
    ]
    return "\n".join(text)
