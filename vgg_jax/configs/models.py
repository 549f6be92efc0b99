"""Table 1 of the paper (arXiv 1409.1556) and the numbers of its section 3, as frozen, hashable data. Imports neither JAX nor TensorFlow."""

import dataclasses
from typing import NamedTuple

from vgg_jax.errors import InputError


class Conv(NamedTuple):
    """A convolution with stride 1 that keeps the size of its input; a ReLU follows it."""

    features: int
    kernel_size: int = 3


@dataclasses.dataclass(frozen=True)
class VGGConfig:
    """One column of Table 1. A 2x2 max-pool ends each stage; the last fully connected layer comes with the number of classes."""

    stages: tuple[tuple[Conv, ...], ...]
    fc: tuple[int, int] = (4096, 4096)
    lrn: tuple[str, ...] = ()  # the convolutions whose ReLU a local response normalisation follows


def c1(features: int) -> Conv:
    return Conv(features, 1)


def c3(features: int) -> Conv:
    return Conv(features, 3)


def c5(features: int) -> Conv:
    return Conv(features, 5)


CONFIGS = {
    "A": VGGConfig(((c3(64),), (c3(128),), (c3(256),) * 2, (c3(512),) * 2, (c3(512),) * 2)),
    "A-LRN": VGGConfig(
        ((c3(64),), (c3(128),), (c3(256),) * 2, (c3(512),) * 2, (c3(512),) * 2), lrn=("conv1_1",)
    ),
    "B": VGGConfig(((c3(64),) * 2, (c3(128),) * 2, (c3(256),) * 2, (c3(512),) * 2, (c3(512),) * 2)),
    "C": VGGConfig(
        (
            (c3(64),) * 2,
            (c3(128),) * 2,
            (c3(256), c3(256), c1(256)),
            (c3(512), c3(512), c1(512)),
            (c3(512), c3(512), c1(512)),
        )
    ),
    "D": VGGConfig(((c3(64),) * 2, (c3(128),) * 2, (c3(256),) * 3, (c3(512),) * 3, (c3(512),) * 3)),
    "E": VGGConfig(((c3(64),) * 2, (c3(128),) * 2, (c3(256),) * 4, (c3(512),) * 4, (c3(512),) * 4)),
    # §2.3: B with each pair of 3x3 layers replaced by one 5x5 layer, 7 % worse in top-1 error.
    "B-5x5": VGGConfig(((c5(64),), (c5(128),), (c5(256),), (c5(512),), (c5(512),))),
}


class Layer(NamedTuple):
    """One step of the forward pass, by its name in the released models."""

    name: str  # conv3_1, bn3_1, relu3_1, lrn1_1, pool3, fc6, relu6, drop6
    type: str  # the name without its numbers
    features: int = 0  # output channels of a conv or fc layer
    kernel_size: int = 0  # the side of the window that a conv or fc layer reads


def layer_table(
    config: VGGConfig, num_classes: int = 1000, batch_norm: bool = False, image_size: int = 224
) -> tuple[Layer, ...]:
    """A configuration written out layer by layer, as in the released models: what the module runs and what the summary counts.

    Raises InputError for an image that the poolings leave nothing of.
    """
    if image_size < 2 ** len(config.stages):
        raise InputError(
            f"image_size is {image_size}: expected at least {2 ** len(config.stages)}, since each stage halves the image"
        )
    if num_classes < 1:
        raise InputError(f"num_classes is {num_classes}: expected at least 1")
    table = []
    for i, stage in enumerate(config.stages, 1):
        for j, conv in enumerate(stage, 1):
            table.append(Layer(f"conv{i}_{j}", "conv", conv.features, conv.kernel_size))
            if batch_norm:
                table.append(Layer(f"bn{i}_{j}", "bn"))
            table.append(Layer(f"relu{i}_{j}", "relu"))
            if f"conv{i}_{j}" in config.lrn:
                table.append(Layer(f"lrn{i}_{j}", "lrn"))
        table.append(Layer(f"pool{i}", "pool"))
    window = image_size // 2 ** len(
        config.stages
    )  # fc6 reads the whole map of an image of this size
    for i, (width, side) in enumerate(zip(config.fc, (window, 1), strict=True), 6):
        table += [
            Layer(f"fc{i}", "fc", width, side),
            Layer(f"relu{i}", "relu"),
            Layer(f"drop{i}", "drop"),
        ]
    table.append(Layer("fc8", "fc", num_classes, 1))
    return tuple(table)
