"""Describes an exported file: the net, its inputs and outputs, and its metadata.

Every file has the configuration, the class names and the preprocessing of its net. It also has a
golden image and the output for it, so that `verify` can check the file on any machine.
"""

import base64
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from vgg_jax.configs.export import EXPORT_OUTPUTS
from vgg_jax.configs.models import Layer
from vgg_jax.errors import InputError
from vgg_jax.layers import BatchNorm
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.weights import Weights
from vgg_jax.weights.weights import channels_name, to_metadata

# The place of the metadata in a SavedModel; TensorFlow and TF Serving do not touch this folder.
SAVEDMODEL_METADATA = "assets.extra/vgg_jax.json"
# Format: extra of vgg-jax to install.
REQUIRED_EXTRA = {
    "onnx": "onnx",
    "stablehlo": "stablehlo",
    "savedmodel": "train",
    "safetensors": "",
}


@dataclasses.dataclass(frozen=True, eq=False)
class ExportSpec:
    """The net in an exported file, with its inputs and outputs.

    Images are RGB on the 0-255 scale, with the shape (N, H, W, 3), or have the channels of the net.

    Attributes:
        weights: The net.
        output: One of three outputs. "logits": (N, K), for images of image_size. "posteriors":
            (N, K), for images of image_size or larger. They are those of the dense evaluation
            (§3.2) without the mirror image; at image_size, the softmax of the logits.
            "score_map": (N, h, w, K), for images of image_size or larger.
        uint8: True for uint8 images, False for float32 images minus `mean_rgb`.
        bfloat16: Store the weights as bfloat16. The computation is in float32.
        float16: Store the weights and compute in float16. The input and the output stay as they
            are. Only an .onnx file can do so.

    Raises:
        InputError: `output` is unknown, the net has no fully connected layers, or float16 is not
            possible for it.
    """

    weights: Weights
    output: str = "logits"
    uint8: bool = True
    bfloat16: bool = False
    float16: bool = False

    def __post_init__(self) -> None:
        if self.output not in EXPORT_OUTPUTS:
            raise InputError(
                f"output is {self.output!r}: expected one of {', '.join(EXPORT_OUTPUTS)}"
            )
        if not self.weights.top:
            raise InputError(
                "the net has no fully connected layers: "
                "expected a whole net; import a file with the top"
            )
        if self.float16:
            self._check_float16()

    def _check_float16(self) -> None:
        model = self.weights.model
        if self.bfloat16:
            raise InputError("float16 and bfloat16 are both set: expected one of them")
        if model.batch_norm:  # variances of activations overflow
            raise InputError(
                "the net has batch normalisation, whose variances exceed the range of float16: "
                "expected it to be folded into the convolutions; pass --fold-batch-norm"
            )
        if model.config.lrn:  # it squares activations
            raise InputError(
                f"the net is {self.weights.net}, whose squared activations exceed the range of "
                "float16: expected a net without local response normalisation; leave float16 out"
            )

    @property
    def table(self) -> tuple[Layer, ...]:
        """The layers that run in inference."""
        return tuple(layer for layer in self.weights.model.layers() if layer.type != "drop")

    @property
    def mean_rgb(self) -> tuple[float, ...]:
        """Mean of each channel that is subtracted from images, on the 0-255 scale."""
        return self.weights.preprocessing.mean_rgb

    @property
    def dtype(self) -> Any:
        """NumPy dtype of the stored weights."""
        if self.bfloat16:
            return ml_dtypes.bfloat16
        return np.float16 if self.float16 else np.float32

    def __call__(self, variables: Any, images: jax.Array) -> jax.Array:
        """Computes the output of the file.

        Args:
            variables: Variables of the model, as `weights.variables` has them, of any dtype.
            images: (N, H, W, C), uint8 or float32 as the spec says.

        Returns:
            The output, float32.
        """
        dtype = jnp.float16 if self.float16 else jnp.float32
        variables = jax.tree.map(lambda x: x.astype(dtype), variables)
        x = subtract_mean(images, self.mean_rgb) if self.uint8 else images
        method = None if self.output == "logits" else "score_map"
        model = self.weights.model.clone(dtype=dtype)
        scores: Any = model.apply(variables, x, method=method)
        scores = scores.astype(jnp.float32)
        return jax.nn.softmax(scores.mean((1, 2))) if self.output == "posteriors" else scores

    def metadata(self) -> dict[str, Any]:
        """Describes the file.

        Returns:
            JSON values, with the golden image and its output (`array_from_json`).

        Raises:
            InputError: The output overflows in float16.
        """
        model, metadata = self.weights.model, to_metadata(self.weights)
        preprocessing = metadata["preprocessing"]
        size = model.image_size
        shape = (1, size, size, model.in_channels)
        image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        images = prepare_images(image, self.uint8, self.mean_rgb)
        forward = jax.jit(self, compiler_options=compiler_options())
        with np.errstate(over="ignore"):  # an overflow is an error below
            stored = jax.tree.map(
                lambda x: np.asarray(x).astype(self.dtype), self.weights.variables
            )
        golden = {"golden_answer": np.asarray(forward(stored, images), np.float32)}
        if not np.isfinite(golden["golden_answer"]).all() and self.float16:
            raise InputError(
                "activations exceed 65504, the largest number of float16: "
                "expected a net with smaller ones; leave float16 out"
            )
        if self.dtype != np.float32:
            exact = dataclasses.replace(self, bfloat16=False, float16=False)
            forward = jax.jit(exact, compiler_options=compiler_options())
            golden["float32_answer"] = np.asarray(forward(self.weights.variables, images))
        return {
            "net": self.weights.net,
            "batch_norm": model.batch_norm,
            "image_size": size,
            "fc": model.config.fc,
            "classes": self.weights.classes,
            "mean_rgb": self.mean_rgb,
            "channels": channels_name(model.in_channels),
            "input": "uint8, 0-255" if self.uint8 else "float32, 0-255 less mean_rgb",
            "output": self.output,
            "bfloat16": self.bfloat16,
            "float16": self.float16,
            "scale": preprocessing["scale"],
            "rounding": preprocessing["rounding"],
            "flip": metadata["flip"],
            "exif": preprocessing["exif"],
            "golden_image": array_to_json(image),
            **{name: array_to_json(array) for name, array in golden.items()},
        }


def prepare_images(images: np.ndarray, uint8: bool, mean_rgb: tuple[float, ...]) -> np.ndarray:
    """Converts uint8 images to the input of a file.

    Args:
        images: uint8 (N, H, W, C).
        uint8: True if the file reads uint8.
        mean_rgb: Mean of each channel to subtract otherwise.

    Returns:
        The same images, or float32 minus the mean.
    """
    return images if uint8 else images.astype(np.float32) - np.array(mean_rgb, np.float32)


def array_to_json(array: np.ndarray) -> dict[str, Any]:
    """Encodes an array as JSON values: its dtype, its shape and its bytes in base64."""
    return {
        "dtype": str(array.dtype),
        "shape": array.shape,
        "base64": base64.b64encode(array.tobytes()).decode(),
    }


def array_from_json(entry: Mapping[str, Any]) -> np.ndarray:
    """Decodes an array of `array_to_json`.

    Args:
        entry: The JSON values.

    Returns:
        The array.

    Raises:
        ValueError, KeyError, TypeError: `entry` is not from `array_to_json`.
    """
    content = base64.b64decode(entry["base64"])
    return np.frombuffer(content, np.dtype(entry["dtype"])).reshape(entry["shape"])


def fold_batch_norm(weights: Weights) -> Weights:
    """Folds each batch normalisation into the convolution before it.

    The convolution computes scale · (k ∗ x + b - mean) / √(var + ε) + bias.

    Args:
        weights: A net, with or without batch normalisation.

    Returns:
        A net without batch normalisation and with the same outputs.
    """
    params: dict[str, Mapping[str, Any]] = {}
    for name, layer in weights.params.items():
        norm = name.replace("conv", "bn")
        if norm != name and norm in weights.params:
            params[name] = _fold(layer, weights.params[norm], weights.batch_stats[norm])
        elif not name.startswith("bn"):
            params[name] = layer
    return dataclasses.replace(
        weights, model=weights.model.clone(batch_norm=False), params=params, batch_stats={}
    )


def _fold(
    conv: Mapping[str, Any], norm: Mapping[str, Any], stats: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Computes in float64, so that the result is rounded once."""
    scale, bias = np.float64(norm["scale"]), np.float64(norm["bias"])
    mean, var = np.float64(stats["mean"]), np.float64(stats["var"])
    factor = scale / np.sqrt(var + BatchNorm.epsilon)
    kernel = np.asarray(conv["kernel"]) * factor
    offset = (np.asarray(conv["bias"]) - mean) * factor + bias
    return {"kernel": kernel.astype(np.float32), "bias": offset.astype(np.float32)}


def format_of(out: str | os.PathLike) -> str:
    """Tells the format of an export from its name.

    Args:
        out: Path that ends in .safetensors, .onnx, .stablehlo, or .savedmodel (a folder).

    Returns:
        A key of `REQUIRED_EXTRA`.

    Raises:
        InputError: The path ends in something else.
    """
    suffix = Path(out).suffix
    if suffix[1:] not in REQUIRED_EXTRA:
        raise InputError(
            f"{out} ends in {suffix!r}: "
            "expected .safetensors, .onnx, .stablehlo, or .savedmodel for a folder"
        )
    return suffix[1:]
