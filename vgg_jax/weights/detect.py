"""Recognises the layout and the net of a weight file from its names and shapes."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from vgg_jax.configs.models import CONFIGS, VGGConfig, layer_table
from vgg_jax.errors import InputError
from vgg_jax.weights.layouts import (
    LAYOUTS,
    TensorMapping,
    WeightLayout,
    infer_fc_sizes,
    tensor_table,
)

Shapes = Mapping[str, tuple[int, ...]]

# Limits for sizes that a header claims. fc8 of all of ImageNet has 21,841 classes.
_MAX_FC_FEATURES = 32_768
_MAX_FC6_WINDOW = 32  # for images of 1,024 pixels


class DetectedModel(NamedTuple):
    """The net that a file holds, and the layout that it is in."""

    layout: WeightLayout
    net: str
    config: VGGConfig
    num_classes: int
    batch_norm: bool
    image_size: int
    top: bool  # the file has fully connected layers
    tensors: list[TensorMapping]
    left_out: tuple[str, ...] = ()  # tensors of another head
    mean_window: int = 1  # the file's fc6 reads the mean of so many positions of pool5, squared

    def __str__(self) -> str:
        suffix = " with batch normalisation" if self.batch_norm else ""
        return f"{self.net}{suffix} in the {self.layout.name} layout"


def detect(shapes: Shapes, net: str | None = None, in_channels: int = 3) -> DetectedModel:
    """Finds the layout and the net whose tensors have these names and shapes.

    Args:
        shapes: Shape of each tensor by its name in the file.
        net: Name of the net, or None to try all but A-LRN. A-LRN has the tensors of A, so it
            has to be named.
        in_channels: Channels of the images.

    Returns:
        The net and its layout. The image size is the smallest that gives fc6's window.

    Raises:
        InputError: No layout has these tensors. The message lists every missing, unexpected or
            misshapen tensor of the closest match.
    """
    nets = [net] if net else [name for name, config in CONFIGS.items() if not config.lrn]
    candidates = [
        _candidate(shapes, layout, name, batch_norm, in_channels)
        for layout in LAYOUTS.values()
        for batch_norm in ((False, True) if "mean" in layout.param_names else (False,))
        for name in nets
    ]
    nearest = min(candidates, key=lambda candidate: len(differences(shapes, candidate)))
    if not any(tensor.foreign_name in shapes for tensor in nearest.tensors):
        if not shapes:
            raise InputError("it holds no floating-point tensors: expected the weights of a VGG")
        raise InputError(
            f"these are not the weights of a VGG; it has {', '.join(sorted(shapes))}: expected the "
            f"names of a VGG of {', '.join(LAYOUTS)}"
        )
    messages = differences(shapes, nearest)
    if messages:
        # Layouts may share the names of the convolutions. None of them may know the head.
        fitting = [candidate for candidate in candidates if _has_convolutions(shapes, candidate)]
        # The names of A's convolutions are among those of D.
        most = max((len(_convolutions(candidate)) for candidate in fitting), default=0)
        fitting = [candidate for candidate in fitting if len(_convolutions(candidate)) == most]
        if fitting and all(_has_other_head(shapes, candidate) for candidate in fitting):
            return _without_head(shapes, fitting[0], in_channels)
        is_part = all(message.endswith(" is missing") for message in messages)
        remedy = "; if it is one of several parts, join them" if is_part else ", and no others"
        raise InputError(
            f"these are not the weights of a VGG; {'; '.join(messages)}: expected all tensors of "
            f"the closest match, {nearest}{remedy}"
        )
    return nearest


def set_image_size(detected: DetectedModel, image_size: int | None) -> DetectedModel:
    """Checks the image size, which decides how fc6 reads pool5.

    If the window of fc6 is 1x1, two nets have the tensors: one for the smallest images, and one
    whose fc6 reads the mean of pool5 of larger images.

    Args:
        detected: The net with its smallest image size.
        image_size: Side of the images in pixels, or None for the smallest.

    Returns:
        The net for images of this size. Without fully connected layers, the same net.

    Raises:
        InputError: The window of fc6 is 1x1, and there is no image_size. Or it does not fit.
    """
    if not detected.top:
        return detected
    stride = 2 ** len(detected.config.stages)
    window = detected.image_size // stride
    if image_size is None:
        if window == 1:
            raise InputError(
                f"fc6 reads one position, of {stride}-pixel images or after global average (not "
                f"max) pooling: expected the size of the images, {stride} or such as 224; pass "
                "image_size=, or --image-size on the command line"
            )
        return detected
    mean_window = 1
    if window == 1 < image_size // stride <= _MAX_FC6_WINDOW:
        mean_window = image_size // stride
    elif image_size // stride != window:
        raise InputError(
            f"image_size is {image_size}: expected {window * stride}, "
            f"because fc6 reads {window}x{window} positions"
        )
    return detected._replace(image_size=image_size, mean_window=mean_window)


def _convolutions(candidate: DetectedModel) -> list[TensorMapping]:
    return [tensor for tensor in candidate.tensors if not tensor.path[1].startswith("fc")]


def _has_convolutions(shapes: Shapes, candidate: DetectedModel) -> bool:
    """True if all convolutions of the candidate are there."""
    return all(
        shapes.get(tensor.foreign_name) == tensor.foreign_shape
        for tensor in _convolutions(candidate)
    )


def _head(shapes: Shapes, candidate: DetectedModel) -> list[str]:
    """Names of the other tensors."""
    names = {tensor.foreign_name for tensor in _convolutions(candidate)}
    ignored = re.compile(candidate.layout.ignored)
    return [name for name in shapes if name not in names and not ignored.fullmatch(name)]


def _without_head(shapes: Shapes, candidate: DetectedModel, in_channels: int) -> DetectedModel:
    """The convolutions of a candidate, with the names that are left out."""
    layout, net, batch_norm = candidate.layout, candidate.net, candidate.batch_norm
    convolutions = {t.foreign_name: t.foreign_shape for t in _convolutions(candidate)}
    headless = _candidate(convolutions, layout, net, batch_norm, in_channels)
    return headless._replace(left_out=tuple(_head(shapes, candidate)))


def _has_other_head(shapes: Shapes, candidate: DetectedModel) -> bool:
    """True if the tensors beside the convolutions are no layers between them.

    A head of VGG's own that lost a layer is another head as well.
    """
    layout, head = candidate.layout, _head(shapes, candidate)
    series = {_series(tensor.foreign_name, layout) for tensor in _convolutions(candidate)}
    if any(_series(name, layout) in series for name in head):
        return False
    has_norms = _count_norms(shapes, head) >= len(candidate.config.stages)
    return layout.numbered or not has_norms


def _series(name: str, layout: WeightLayout) -> str:
    """The name of a tensor without the last number of its layer, which others between may have."""
    suffix = next((s for s in layout.param_names.values() if name.endswith(s)), "")
    layer = name.removesuffix(suffix)
    return re.sub(r"\d+(?=\D*$)", "", layer) + suffix


def _count_norms(shapes: Shapes, names: Iterable[str]) -> int:
    """Counts modules that have vectors only, as normalisations do."""
    modules: dict[str, int] = {}
    for name in names:
        module = re.split(r"[./]", name)[:-1]
        module = module[:-1] if module[-1:] == ["vars"] else module
        key = "/".join(module)
        modules[key] = max(modules.get(key, 0), len(shapes[name]))
    return sum(ndim == 1 for ndim in modules.values())


def differences(shapes: Shapes, candidate: DetectedModel) -> list[str]:
    """Lists the tensors that are missing, misshapen or unexpected.

    Args:
        shapes: Shape of each tensor by its name in the file.
        candidate: The net and the layout to compare with.

    Returns:
        A description of each such tensor, in a few words. Empty if the file matches.
    """
    expected = {tensor.foreign_name: tensor.foreign_shape for tensor in candidate.tensors}
    missing = [
        f"{name} {shape} is missing" for name, shape in expected.items() if name not in shapes
    ]
    misshapen = [
        f"{name} is {shapes[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    unexpected = [
        f"unexpected tensor {name}"
        for name in shapes
        if name not in expected and not re.fullmatch(candidate.layout.ignored, name)
    ]
    return missing + misshapen + unexpected


def _candidate(
    shapes: Shapes, layout: WeightLayout, net: str, batch_norm: bool, in_channels: int
) -> DetectedModel:
    """Builds a net whose fully connected layers have the sizes in the file."""
    config = CONFIGS[net]
    modules = layout.modules(layer_table(config, batch_norm=batch_norm))
    features = {"fc6": config.fc[0], "fc7": config.fc[1], "fc8": 1000}
    in_features = config.stages[-1][-1].features  # of fc6
    fc6_window = 7
    top = False
    for name in features:
        shape = shapes.get(modules[name] + layout.param_names["kernel"])
        top = top or shape is not None
        pattern = layout.patterns.get(name) or layout.patterns["fc"]
        window, out_features = infer_fc_sizes(pattern, shape or (), in_features)
        if 0 < out_features <= _MAX_FC_FEATURES and 0 < window <= _MAX_FC6_WINDOW:
            features[name] = out_features
            fc6_window = window if name == "fc6" else fc6_window
        in_features = features[name]
    config = VGGConfig(config.stages, (features["fc6"], features["fc7"]), config.lrn)
    image_size = fc6_window * 2 ** len(config.stages)
    num_classes = features["fc8"]
    tensors = tensor_table(layout, config, num_classes, batch_norm, image_size, top, in_channels)
    return DetectedModel(layout, net, config, num_classes, batch_norm, image_size, top, tensors)
