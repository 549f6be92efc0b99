"""Names and axis orders of other libraries for the tensors of a VGG.

Each library has a `WeightLayout`. `tensor_table` lists the tensors of a net in a layout as
`TensorMapping`s. A mapping converts in both directions.

A pattern describes the axes of a kernel, one word per axis. O is outputs, I is inputs, H and W
are the window. PyTorch's fc6 is "O IHW": two axes, (4096, 512 · 7 · 7). In vgg_jax,
convolutions are "H W I O" and fully connected layers are "HWI O".
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from vgg_jax.configs.colours import IMAGENET
from vgg_jax.configs.models import Layer, VGGConfig, layer_table

UNIT_STD = (1.0, 1.0, 1.0)
# The path of the one tensor that depends on the preprocessing.
CONV1_KERNEL = ("params", "conv1_1", "kernel")


class Preprocessing(NamedTuple):
    """Preprocessing that a net expects. Colours are RGB on the 0-255 scale.

    A net for images with other channels has one mean and one std for each.
    """

    mean_rgb: tuple[float, ...]  # subtracted from the image
    std_rgb: tuple[float, ...] = UNIT_STD  # the image is then divided by it
    scale: int | None = None  # Q, the shorter side; None: image_size * 256 / 224
    flip: bool = True  # a mirror image has the same class
    exif: bool = True  # photos are turned upright by their EXIF orientation
    rounding: str = "nearest"  # of the centre crop, one of `ROUNDINGS`


# The mean pixel of the paper's authors, who released Caffe models.
CAFFE_PREPROCESSING = Preprocessing(IMAGENET.mean_rgb)
# torchvision's training, on the 0-255 scale. timm evaluates with torchvision's `Resize` and
# `CenterCrop`.
TORCHVISION = Preprocessing(
    (0.485 * 255, 0.456 * 255, 0.406 * 255),
    (0.229 * 255, 0.224 * 255, 0.225 * 255),
    rounding="torchvision",
)
# torchvision's IMAGENET1K_FEATURES, whose std is 1.
TORCHVISION_FEATURES = Preprocessing(
    (0.48235 * 255, 0.45882 * 255, 0.40784 * 255), rounding="torchvision"
)
# What `read` takes as `preprocessing`, and True if conv1_1 reads BGR.
PREPROCESSINGS = {"caffe": (CAFFE_PREPROCESSING, True), "torchvision": (TORCHVISION, False)}


class WeightLayout(NamedTuple):
    """Names, axis order and preprocessing that one library uses for a VGG.

    Attributes:
        name: Name of the layout, the key in `LAYOUTS`.
        modules: Maps the layers of a net to {layer name: name in the file}.
        param_names: Suffix in the file of "kernel" and "bias" and, if the library has batch
            normalisation, of "scale", "mean" and "var".
        patterns: Axes of a kernel, by layer name or else by layer type ("conv", "fc").
        preprocessing: Images that the library's nets were trained with.
        bgr: True if conv1_1 reads the channels as blue, green, red.
        shared: Who use the names, if their nets have different preprocessing.
        numbered: True if the numbers in the names count normalisations and activations as well.
        ignored: Regular expression for names of tensors that are not parameters.
    """

    name: str
    modules: Callable[[Iterable[Layer]], Mapping[str, str]]
    param_names: Mapping[str, str]
    patterns: Mapping[str, str]
    preprocessing: Preprocessing
    bgr: bool = False
    shared: str = ""
    numbered: bool = False
    ignored: str = r"(?!)"


class TensorMapping(NamedTuple):
    """One tensor: its name and shape in a foreign file, and its place in vgg_jax.

    Attributes:
        foreign_name: Name in the file, for example "features.0.weight".
        path: Collection, layer and parameter, for example ("params", "conv1_1", "kernel").
        foreign_shape: Shape in the file.
        split_shape: `foreign_shape` with one axis for each letter of the pattern.
        axes: The axes of `split_shape` in the order of vgg_jax: H, W, I, O.
        shape: Shape in vgg_jax.
        bgr: True if the file has the input channels in the order blue, green, red.
    """

    foreign_name: str
    path: tuple[str, str, str]
    foreign_shape: tuple[int, ...]
    split_shape: tuple[int, ...]
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    bgr: bool = False

    def from_foreign(
        self, array: np.ndarray, copy: Callable[[np.ndarray], np.ndarray] = np.ascontiguousarray
    ) -> np.ndarray:
        """Reorders the axes of an array from the file's layout to vgg_jax's.

        Args:
            array: Array of `foreign_shape`.
            copy: Makes a contiguous array of a view.

        Returns:
            Array of `shape`.
        """
        array = array.reshape(self.split_shape).transpose(self.axes)
        return copy(array[:, :, ::-1] if self.bgr else array).reshape(self.shape)

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        """Reorders the axes of an array from vgg_jax's layout to the file's.

        Args:
            array: Array of `shape`.

        Returns:
            Array of `foreign_shape`.
        """
        array = array.reshape([self.split_shape[axis] for axis in self.axes])
        array = (array[:, :, ::-1] if self.bgr else array).transpose(np.argsort(self.axes))
        return np.ascontiguousarray(array).reshape(self.foreign_shape)


_OWN_PATTERNS = {"conv": "H W I O", "fc": "HWI O"}


def tensor_table(
    layout: WeightLayout,
    config: VGGConfig,
    num_classes: int,
    batch_norm: bool,
    image_size: int,
    top: bool = True,
    in_channels: int = 3,
) -> list[TensorMapping]:
    """Lists every tensor of a net in a layout.

    Args:
        layout: Layout of the file.
        config: Column of Table 1.
        num_classes: Outputs of fc8.
        batch_norm: True if a batch normalisation follows each convolution.
        image_size: Side of the images in pixels; it decides the window of fc6.
        top: Include the fully connected layers.
        in_channels: Channels of the images.

    Returns:
        The mappings, in the order of the layers.
    """
    table = layer_table(config, num_classes, batch_norm, image_size)
    modules = layout.modules(table)
    mappings, in_features = [], in_channels
    for layer in table:
        if layer.type == "bn":
            for param in ("scale", "bias", "mean", "var"):
                collection = "params" if param in ("scale", "bias") else "batch_stats"
                foreign_name = modules[layer.name] + layout.param_names[param]
                mappings.append(_vector(foreign_name, (collection, layer.name, param), in_features))
        elif layer.type == "conv" or (layer.type == "fc" and top):
            foreign_name = modules[layer.name] + layout.param_names["bias"]
            mappings += [
                _kernel(layout, layer, modules[layer.name], in_features),
                _vector(foreign_name, ("params", layer.name, "bias"), layer.features),
            ]
            in_features = layer.features
    return mappings


def _kernel(layout: WeightLayout, layer: Layer, module: str, in_features: int) -> TensorMapping:
    window = layer.kernel_size
    sizes = {"O": layer.features, "I": in_features, "H": window, "W": window}
    pattern = layout.patterns.get(layer.name) or layout.patterns[layer.type]
    letters = pattern.replace(" ", "")
    return TensorMapping(
        foreign_name=module + layout.param_names["kernel"],
        path=("params", layer.name, "kernel"),
        foreign_shape=_shape(pattern, sizes),
        split_shape=tuple(sizes[letter] for letter in letters),
        axes=tuple(letters.index(letter) for letter in "HWIO"),
        shape=_shape(_OWN_PATTERNS[layer.type], sizes),
        bgr=layout.bgr and in_features == 3,
    )


def _shape(pattern: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(math.prod(sizes[letter] for letter in word) for word in pattern.split())


def _vector(foreign_name: str, path: tuple[str, str, str], size: int) -> TensorMapping:
    return TensorMapping(foreign_name, path, (size,), (size,), (0,), (size,))


def infer_fc_sizes(pattern: str, shape: tuple[int, ...], in_features: int) -> tuple[int, int]:
    """Infers the window and the outputs of a fully connected layer from its kernel.

    Args:
        pattern: Axes of the kernel.
        shape: Shape of the kernel in the file.
        in_features: Channels that the layer reads.

    Returns:
        Side of the window and number of outputs, or (0, 0) if the shape has other axes.
    """
    words = pattern.split()
    if len(words) != len(shape):
        return 0, 0
    features = shape[words.index("O")]
    area = math.prod(shape) // max(1, in_features * features)
    return math.isqrt(area), features


def _same_names(table: Iterable[Layer]) -> dict[str, str]:
    return {layer.name: layer.name for layer in table}


def _torchvision_names(table: Iterable[Layer]) -> dict[str, str]:
    """Numbers the layers of `features`, as nn.Sequential does."""
    numbered = [
        layer.name
        for layer in table
        if re.match(r"(conv|bn|relu|pool)\d(_|$)", layer.name)
        and layer.name not in ("relu6", "relu7")
    ]
    names = {name: f"features.{i}" for i, name in enumerate(numbered)}
    return names | {"fc6": "classifier.0", "fc7": "classifier.3", "fc8": "classifier.6"}


def _timm_names(table: Iterable[Layer]) -> dict[str, str]:
    names = {"fc6": "pre_logits.fc1", "fc7": "pre_logits.fc2", "fc8": "head.fc"}
    return _torchvision_names(table) | names


def _keras_names(table: Iterable[Layer]) -> dict[str, str]:
    names = {layer.name: re.sub(r"conv(\d)_(\d)", r"block\1_conv\2", layer.name) for layer in table}
    return names | {"fc6": "fc1", "fc7": "fc2", "fc8": "predictions"}


def _keras3_names(table: Iterable[Layer]) -> dict[str, str]:
    """Numbers the layers of each class in the order of their creation."""
    names = {}
    for layer_type, keras_class in (("conv", "conv2d"), ("fc", "dense")):
        for i, layer in enumerate(layer for layer in table if layer.type == layer_type):
            names[layer.name] = f"layers/{keras_class}_{i}" if i else f"layers/{keras_class}"
    # No VGG with batch normalisation was published; `LAYOUTS` has no names for its parameters.
    return names | {
        layer.name: "layers/batch_normalization" for layer in table if layer.type == "bn"
    }


_TORCH_PARAMS = {
    "kernel": ".weight",
    "bias": ".bias",
    "scale": ".weight",
    "mean": ".running_mean",
    "var": ".running_var",
}
_TORCH_IGNORED = r".*\.num_batches_tracked"
# "/0" and "/1" number the blobs of a Caffe layer; `formats` gives Keras' tensors the same names.
_BLOBS = {"kernel": "/0", "bias": "/1"}
# State of a Keras model that was trained.
KERAS_IGNORED = r"(optimizer|optimizer_weights|top_level_model_weights|metrics|vars)\b.*"

_LAYOUTS = (
    WeightLayout(
        "vgg_jax",
        modules=_same_names,
        param_names={param: f"/{param}" for param in ("kernel", "bias", "scale", "mean", "var")},
        patterns=_OWN_PATTERNS,
        preprocessing=CAFFE_PREPROCESSING,
    ),
    WeightLayout(
        "torchvision",
        modules=_torchvision_names,
        param_names=_TORCH_PARAMS,
        patterns={"conv": "O I H W", "fc": "O IHW"},
        preprocessing=TORCHVISION,
        numbered=True,
        ignored=_TORCH_IGNORED,
    ),
    WeightLayout(
        "timm",
        modules=_timm_names,
        param_names=_TORCH_PARAMS,
        patterns={"conv": "O I H W", "fc": "O I H W", "fc8": "O IHW"},
        preprocessing=TORCHVISION,
        numbered=True,
        ignored=_TORCH_IGNORED,
    ),
    WeightLayout(
        "keras",
        modules=_keras_names,
        param_names=_BLOBS,
        patterns={"conv": "H W I O", "fc": "HWI O"},
        preprocessing=CAFFE_PREPROCESSING,
        bgr=True,
        ignored=KERAS_IGNORED,
    ),
    WeightLayout(
        "keras 3",
        modules=_keras3_names,
        param_names={"kernel": "/vars/0", "bias": "/vars/1"},
        patterns={"conv": "H W I O", "fc": "HWI O"},
        preprocessing=CAFFE_PREPROCESSING,
        bgr=True,
        shared="Keras Applications (preprocessing caffe) and KerasHub (torchvision)",
        ignored=KERAS_IGNORED,
    ),
    WeightLayout(
        "caffe",
        modules=_same_names,
        param_names=_BLOBS,
        patterns={"conv": "O I H W", "fc": "O IHW"},
        preprocessing=CAFFE_PREPROCESSING,
        bgr=True,
    ),
    WeightLayout(
        "caffe-pytorch",  # the authors' names in a state_dict
        modules=_same_names,
        param_names=_TORCH_PARAMS,
        patterns={"conv": "O I H W", "fc": "O IHW"},
        preprocessing=CAFFE_PREPROCESSING,
        bgr=True,
        shared="copies of the authors' nets (preprocessing caffe) and PyTorch's (torchvision)",
        ignored=_TORCH_IGNORED,
    ),
    WeightLayout(
        "matconvnet",
        modules=_same_names,
        param_names={"kernel": "/filters", "bias": "/biases"},
        patterns={"conv": "H W I O", "fc": "H W I O"},
        preprocessing=CAFFE_PREPROCESSING,
    ),
    WeightLayout(
        "flaxmodels",
        modules=_same_names,
        param_names={"kernel": "/weight", "bias": "/bias"},
        patterns={"conv": "H W I O", "fc": "IHW O"},
        preprocessing=TORCHVISION._replace(rounding="nearest"),
    ),
)
# The first layout wins if several fit a file equally well (`detect`).
LAYOUTS: dict[str, WeightLayout] = {layout.name: layout for layout in _LAYOUTS}
