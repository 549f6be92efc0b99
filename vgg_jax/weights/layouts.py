"""How others name and order the same tensors: one table of rows a layout, read in both directions.

A pattern says how a kernel lies there: letters O (outputs), I (inputs), H and W (the window), a word for each axis. PyTorch's fc6,
"O IHW", has the axes (4096, 512 · 7 · 7). Here convolutions are "H W I O" and fully connected layers "HWI O".
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from vgg_jax.configs.colours import IMAGENET
from vgg_jax.configs.models import Layer, VGGConfig, layer_table

UNIT_STD = (1.0, 1.0, 1.0)


class Preprocessing(NamedTuple):
    """What a net's images are: RGB on the 0-255 scale, less a mean, divided by a deviation; and how it is to be tested."""

    mean_rgb: tuple[float, float, float]
    std_rgb: tuple[float, float, float] = UNIT_STD
    scale: int | None = (
        None  # Q, the shorter side; None: 256 for a net of 224 pixels, and in proportion
    )
    flip: bool = True  # whether a mirror image is of the same class
    exif: bool = True  # whether photos are turned upright


# The authors' mean pixel, and what torchvision's nets were trained with, on the 0-255 scale.
AUTHORS = Preprocessing(IMAGENET.mean_rgb)
TORCHVISION = Preprocessing(
    (0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255)
)
FEATURES = Preprocessing(
    (0.48235 * 255, 0.45882 * 255, 0.40784 * 255)
)  # of torchvision's IMAGENET1K_FEATURES, whose deviation is 1


class WeightLayout(NamedTuple):
    """How one library names and orders the tensors of a VGG."""

    name: str
    modules: Callable[
        [Iterable[Layer]], Mapping[str, str]
    ]  # of a net's layers to their names there
    leaves: Mapping[
        str, str
    ]  # of "kernel", "bias" and, if there is any, batch normalisation's four to what follows a layer's name there
    patterns: Mapping[str, str]  # of a kernel, by the layer's name or else its kind
    preprocessing: Preprocessing
    bgr: bool = False  # whether conv1_1 reads blue first
    ignored: str = r"(?!)"  # names of tensors that are not parameters


class TensorMapping(NamedTuple):
    """One tensor, there and here."""

    foreign_name: str
    path: tuple[str, str, str]  # ("params", "conv1_1", "kernel")
    shape: tuple[int, ...]  # there
    split: tuple[int, ...]  # there, each letter an axis
    axes: tuple[int, ...]  # of `split`, in our order
    our_shape: tuple[int, ...]
    bgr: bool = False

    def from_foreign(self, array: np.ndarray) -> np.ndarray:
        array = array.reshape(self.split).transpose(self.axes)
        return np.ascontiguousarray(array[:, :, ::-1] if self.bgr else array).reshape(
            self.our_shape
        )

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        array = array.reshape([self.split[axis] for axis in self.axes])
        array = (array[:, :, ::-1] if self.bgr else array).transpose(np.argsort(self.axes))
        return np.ascontiguousarray(array).reshape(self.shape)


def tensor_table(
    layout: WeightLayout,
    config: VGGConfig,
    num_classes: int,
    batch_norm: bool,
    image_size: int,
    top: bool = True,
) -> list[TensorMapping]:
    """Every tensor of a net; without `top` the fully connected layers are left out."""
    table = [
        layer
        for layer in layer_table(config, num_classes, batch_norm, image_size)
        if layer.type in ("conv", "bn", "fc")
    ]
    modules = layout.modules(layer_table(config, num_classes, batch_norm, image_size))
    found, inputs = [], 3
    for name, kind, width, window in table:
        if kind == "fc" and not top:
            break
        if kind == "bn":
            for leaf in ("scale", "bias", "mean", "var"):
                group = "params" if leaf in ("scale", "bias") else "batch_stats"
                found.append(
                    _vector(modules[name] + layout.leaves[leaf], (group, name, leaf), inputs)
                )
            continue
        sizes = {"O": width, "I": inputs, "H": window, "W": window}
        pattern, ours = (
            layout.patterns.get(name) or layout.patterns[kind],
            {"conv": "H W I O", "fc": "HWI O"}[kind],
        )
        letters = pattern.replace(" ", "")
        found.append(
            TensorMapping(
                foreign_name=modules[name] + layout.leaves["kernel"],
                path=("params", name, "kernel"),
                shape=_shape(pattern, sizes),
                split=tuple(sizes[letter] for letter in letters),
                axes=tuple(letters.index(letter) for letter in "HWIO"),
                our_shape=_shape(ours, sizes),
                bgr=layout.bgr and inputs == 3,
            )
        )
        found.append(
            _vector(modules[name] + layout.leaves["bias"], ("params", name, "bias"), width)
        )
        inputs = width
    return found


def _shape(pattern: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in word) for word in pattern.split())


def _vector(theirs: str, ours: tuple[str, str, str], width: int) -> TensorMapping:
    return TensorMapping(theirs, ours, (width,), (width,), (0,), (width,))


def window_and_width(pattern: str, shape: tuple[int, ...], inputs: int) -> tuple[int, int]:
    """The side of fc6's window and its outputs, from its kernel's shape there; (0, 0) for a shape that does not fit."""
    words = pattern.split()
    if len(words) != len(shape):
        return 0, 0
    area = math.prod(shape) // max(1, inputs * shape[words.index("O")])
    return math.isqrt(area), shape[words.index("O")]


def _same_names(table: Iterable[Layer]) -> dict[str, str]:
    return {layer.name: layer.name for layer in table}


def _torchvision(table: Iterable[Layer]) -> dict[str, str]:
    in_features = [
        layer
        for layer in table
        if re.match(r"(conv|bn|relu|pool)\d(_|$)", layer.name)
        and layer.name not in ("relu6", "relu7")
    ]
    return {layer.name: f"features.{i}" for i, layer in enumerate(in_features)} | {
        "fc6": "classifier.0",
        "fc7": "classifier.3",
        "fc8": "classifier.6",
    }


def _timm(table: Iterable[Layer]) -> dict[str, str]:
    return _torchvision(table) | {
        "fc6": "pre_logits.fc1",
        "fc7": "pre_logits.fc2",
        "fc8": "head.fc",
    }


def _keras(table: Iterable[Layer]) -> dict[str, str]:
    return {
        layer.name: re.sub(r"conv(\d)_(\d)", r"block\1_conv\2", layer.name) for layer in table
    } | {
        "fc6": "fc1",
        "fc7": "fc2",
        "fc8": "predictions",
    }


def _keras3(table: Iterable[Layer]) -> dict[str, str]:
    """By class and number, in the order in which the layers were made."""
    names = {}
    for kind, theirs in (("conv", "conv2d"), ("fc", "dense")):
        for i, layer in enumerate(layer for layer in table if layer.type == kind):
            names[layer.name] = f"layers/{theirs}_{i}" if i else f"layers/{theirs}"
    return names | {
        layer.name: "layers/batch_normalization" for layer in table if layer.type == "bn"
    }


_TORCH = {
    "kernel": ".weight",
    "bias": ".bias",
    "scale": ".weight",
    "mean": ".running_mean",
    "var": ".running_var",
}
_BLOBS = {"kernel": "/0", "bias": "/1"}  # no batch normalisation was published
_VARS = {"kernel": "/vars/0", "bias": "/vars/1"}
_OURS = {leaf: f"/{leaf}" for leaf in ("kernel", "bias", "scale", "mean", "var")}

_KERAS_STATE = r"(optimizer|optimizer_weights|top_level_model_weights|metrics|vars)\b.*"  # of a model that was trained

LAYOUTS = (
    WeightLayout("vgg_jax", _same_names, _OURS, {"conv": "H W I O", "fc": "HWI O"}, AUTHORS),
    WeightLayout(
        "torchvision",
        _torchvision,
        _TORCH,
        {"conv": "O I H W", "fc": "O IHW"},
        TORCHVISION,
        ignored=r".*\.num_batches_tracked",
    ),
    WeightLayout(
        "timm",
        _timm,
        _TORCH,
        {"conv": "O I H W", "fc": "O I H W", "fc8": "O IHW"},
        TORCHVISION,
        ignored=r".*\.num_batches_tracked",
    ),
    WeightLayout(
        "keras",
        _keras,
        _BLOBS,
        {"conv": "H W I O", "fc": "HWI O"},
        AUTHORS,
        bgr=True,
        ignored=_KERAS_STATE,
    ),
    WeightLayout(
        "keras 3",
        _keras3,
        _VARS,
        {"conv": "H W I O", "fc": "HWI O"},
        AUTHORS,
        bgr=True,
        ignored=_KERAS_STATE,
    ),
    WeightLayout(
        "caffe", _same_names, _BLOBS, {"conv": "O I H W", "fc": "O IHW"}, AUTHORS, bgr=True
    ),
    WeightLayout(
        "matconvnet",
        _same_names,
        {"kernel": "/filters", "bias": "/biases"},
        {"conv": "H W I O", "fc": "H W I O"},
        AUTHORS,
    ),
    WeightLayout(
        "flaxmodels",
        _same_names,
        {"kernel": "/weight", "bias": "/bias"},
        {"conv": "H W I O", "fc": "IHW O"},
        TORCHVISION,
    ),
)
