"""Which layout and which net a file of weights is, from its names and shapes; all the differences in one message."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from vgg_jax.configs.models import CONFIGS, VGGConfig, layer_table
from vgg_jax.errors import InputError
from vgg_jax.weights.layouts import (
    LAYOUTS,
    TensorMapping,
    WeightLayout,
    tensor_table,
    window_and_width,
)

Shapes = Mapping[str, tuple[int, ...]]


class DetectedModel(NamedTuple):
    """What a file holds."""

    layout: WeightLayout
    net: str
    config: VGGConfig
    num_classes: int
    batch_norm: bool
    image_size: int
    top: bool  # whether the fully connected layers are there
    rows: list[TensorMapping]


def detect(shapes: Shapes, net: str | None = None, image_size: int | None = None) -> DetectedModel:
    """The layout and net whose tensors these are. Raises InputError with what is missing, extra or misshapen of the nearest one.

    A-LRN has the tensors of A: it is only found where `net` says so. The side of the images is the smallest that gives fc6's window,
    unless `image_size` is another that does.
    """
    nets = [net] if net else [name for name, config in CONFIGS.items() if not config.lrn]
    kinds = [
        (layout, batch_norm)
        for layout in LAYOUTS
        for batch_norm in ((False, True) if "mean" in layout.leaves else (False,))
    ]
    candidates = [
        _candidate(shapes, layout, name, batch_norm)
        for layout, batch_norm in kinds
        for name in nets
    ]
    nearest = min(candidates, key=lambda candidate: len(differences(shapes, candidate)))
    if not any(row.foreign_name in shapes for row in nearest.rows):
        raise InputError(
            f"its names ({', '.join(sorted(shapes)[:5]) or 'none'}{', …' if len(shapes) > 5 else ''}) are of no known layout: "
            f"expected those of {', '.join(layout.name for layout in LAYOUTS)}"
        )
    found = differences(shapes, nearest)
    poolings = 2 ** len(nearest.config.stages)
    if (
        image_size is not None
        and nearest.top
        and image_size // poolings != nearest.image_size // poolings
    ):
        found.append(
            f"image_size is {image_size}, and fc6 has {nearest.image_size // poolings}² positions"
        )
    if found:
        which = f"{nearest.net}{' with batch normalisation' if nearest.batch_norm else ''} as {nearest.layout.name} has it"
        raise InputError(
            f"these are not the weights of a VGG; of {which}, which comes nearest: {'; '.join(found)}"
        )
    return nearest._replace(image_size=image_size or nearest.image_size)


def differences(shapes: Shapes, candidate: DetectedModel) -> list[str]:
    """What is missing, misshapen and too much, each in a few words."""
    expected = {row.foreign_name: row.shape for row in candidate.rows}
    missing = [
        f"{name} {shape} is missing" for name, shape in expected.items() if name not in shapes
    ]
    misshapen = [
        f"{name} is {shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    extra = [
        f"{name} is too much"
        for name in shapes
        if name not in expected and not re.fullmatch(candidate.layout.ignored, name)
    ]
    return missing + misshapen + extra


def _candidate(shapes: Shapes, layout: WeightLayout, net: str, batch_norm: bool) -> DetectedModel:
    """A net in a layout with the widths that the file's fully connected layers have."""
    config = CONFIGS[net]
    modules = layout.modules(layer_table(config, batch_norm=batch_norm))
    widths, inputs, window = (
        {"fc6": config.fc[0], "fc7": config.fc[1], "fc8": 1000},
        config.stages[-1][-1].features,
        7,
    )
    top = False
    for name in widths:
        shape = shapes.get(modules[name] + layout.leaves["kernel"])
        top = top or shape is not None
        side, width = window_and_width(
            layout.patterns.get(name) or layout.patterns["fc"], shape or (), inputs
        )
        if 0 < width <= _WIDEST and 0 < side <= _LARGEST_WINDOW:
            widths[name] = width
            window = side if name == "fc6" else window
        inputs = widths[name]
    config = VGGConfig(config.stages, (widths["fc6"], widths["fc7"]), config.lrn)
    image_size = window * 2 ** len(config.stages)
    found = tensor_table(layout, config, widths["fc8"], batch_norm, image_size, top)
    return DetectedModel(layout, net, config, widths["fc8"], batch_norm, image_size, top, found)


# What a header may claim: fc8 of all 21,841 classes of ImageNet, and fc6 of images of 1,024 pixels.
_WIDEST, _LARGEST_WINDOW = 32_768, 32
