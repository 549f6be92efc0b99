"""Table 1 of the paper (arXiv 1409.1556) as frozen, hashable data.

Imports neither JAX nor TensorFlow.
"""

import dataclasses
from typing import NamedTuple

from vgg_jax.errors import InputError


class Conv(NamedTuple):
    """A convolution with stride 1 and padding "SAME", followed by a ReLU.

    Attributes:
        features: Output channels.
        kernel_size: Side of the square kernel, odd.
    """

    features: int
    kernel_size: int = 3


@dataclasses.dataclass(frozen=True)
class VGGConfig:
    """One column of Table 1.

    The number of classes is not part of it: `layer_table` adds fc8.

    Attributes:
        stages: The convolutions of each stage. A 2x2 max pooling ends a stage.
        fc: Output features of fc6 and fc7.
        lrn: Names of the convolutions with local response normalisation after their ReLU.

    Raises:
        InputError: If a kernel size is even: the output would not have the size of the input.
    """

    stages: tuple[tuple[Conv, ...], ...]
    fc: tuple[int, int] = (4096, 4096)
    lrn: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for i, stage in enumerate(self.stages, 1):
            for j, conv in enumerate(stage, 1):
                if conv.kernel_size % 2 == 0 or conv.kernel_size < 1 or conv.features < 1:
                    raise InputError(
                        f"conv{i}_{j} has kernel_size {conv.kernel_size} and {conv.features} "
                        "features: expected an odd kernel_size, and at least one feature"
                    )


def c1(features: int) -> Conv:
    """A 1x1 convolution."""
    return Conv(features, 1)


def c3(features: int) -> Conv:
    """A 3x3 convolution."""
    return Conv(features, 3)


def c5(features: int) -> Conv:
    """A 5x5 convolution."""
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
    # §2.3: B with one 5x5 layer for each pair of 3x3 layers. Its top-1 error is 7 % higher.
    "B-5x5": VGGConfig(((c5(64),), (c5(128),), (c5(256),), (c5(512),), (c5(512),))),
}


class Layer(NamedTuple):
    """One layer of a net, named as in the released models."""

    name: str  # conv3_1, bn3_1, relu3_1, lrn1_1, pool3, fc6, relu6, drop6
    type: str  # the name without its numbers
    features: int = 0  # output channels of a conv or fc layer
    kernel_size: int = 0  # side of the window that a conv or fc layer reads


def layer_table(
    config: VGGConfig, num_classes: int = 1000, batch_norm: bool = False, image_size: int = 224
) -> tuple[Layer, ...]:
    """Lists the layers of a net in the order of the forward pass.

    The module, the summary, the weight layouts and the exports are all built from this list.

    Args:
        config: A column of Table 1.
        num_classes: Output features of fc8.
        batch_norm: Adds batch normalisation after every convolution.
        image_size: Side of the square images. fc6 reads the whole last map of such an image.

    Returns:
        The layers, from conv1_1 to fc8. The soft-max is not among them.

    Raises:
        InputError: If the poolings leave nothing of the image, or if there is no class.
    """
    reduction = 2 ** len(config.stages)
    if image_size < reduction:
        raise InputError(
            f"image_size is {image_size}: expected at least {reduction}, "
            "since each stage halves the image"
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
    kernel_sizes = (image_size // reduction, 1)
    for i, (features, kernel_size) in enumerate(zip(config.fc, kernel_sizes, strict=True), 6):
        table.append(Layer(f"fc{i}", "fc", features, kernel_size))
        table.append(Layer(f"relu{i}", "relu"))
        table.append(Layer(f"drop{i}", "drop"))
    table.append(Layer("fc8", "fc", num_classes, 1))
    return tuple(table)
