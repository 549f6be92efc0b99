"""What a network holds and costs, layer by layer: shapes, parameters, multiply-adds, receptive fields, torchsummary's totals."""

import math
from typing import NamedTuple

from vgg_jax.configs.models import VGGConfig, layer_table

MEGABYTE = 2**20


class Row(NamedTuple):
    """One layer of a network, for one image."""

    name: str
    shape: tuple[int, ...]  # (H, W, C), or (width,) in the head
    params: int
    macs: int  # multiply-adds of convolutions and fully connected layers
    receptive_field: int  # the side, in pixels of the image, of what one output sees


def summarize(
    config: VGGConfig, num_classes: int = 1000, batch_norm: bool = False, image_size: int = 224
) -> list[Row]:
    """The rows of a network, in order. The memory of running statistics is not among the parameters, as in torchsummary."""
    rows: list[Row] = []
    side, channels, field, stride = image_size, 3, 1, 1
    for name, kind, width, kernel in layer_table(config, num_classes, batch_norm, image_size):
        params = macs = 0
        if kind in ("conv", "fc"):
            if kind == "fc":
                side = side - kernel + 1
            params = kernel * kernel * channels * width + width
            macs = kernel * kernel * channels * width * side * side
            field += (kernel - 1) * stride
            channels = width
        elif kind == "bn":
            params = 2 * channels
        elif kind == "pool":
            field, stride, side = field + stride, stride * 2, side // 2
        head = rows and (kind == "fc" or len(rows[-1].shape) == 1)
        rows.append(Row(name, (channels,) if head else (side, side, channels), params, macs, field))
    return rows


def totals(rows: list[Row], image_size: int = 224) -> dict[str, float]:
    """Parameters, multiply-adds, and torchsummary's megabytes (2^20 bytes, float32, one image; its activations count twice)."""
    params = sum(row.params for row in rows)
    megabytes = {
        "input_mb": 3 * image_size**2 * 4 / MEGABYTE,
        "forward_backward_mb": 2 * sum(math.prod(row.shape) for row in rows) * 4 / MEGABYTE,
        "params_mb": params * 4 / MEGABYTE,
    }
    return (
        {"params": params, "macs": sum(row.macs for row in rows)}
        | megabytes
        | {"total_mb": sum(megabytes.values())}
    )


def table(
    config: VGGConfig, num_classes: int = 1000, batch_norm: bool = False, image_size: int = 224
) -> str:
    """The summary as text, one line a layer, as torchsummary prints it, with multiply-adds and receptive fields beside it."""
    rows = summarize(config, num_classes, batch_norm, image_size)
    total = totals(rows, image_size)
    line, double = "-" * 84, "=" * 84
    text = [
        line,
        f"{'Layer':<10}{'Output shape':>24}{'Param #':>16}{'MACs':>18}{'Receptive field':>16}",
        double,
    ]
    for name, shape, params, macs, field in rows:
        text.append(
            f"{name:<10}{[-1, *shape]!s:>24}{params:>16,}{f'{macs:,}' if macs else '':>18}{field:>16}"
        )
    text += [
        double,
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
