"""A net as a file that others run: safetensors, ONNX, StableHLO or a TensorFlow SavedModel.

Every file carries the net's configuration, class names and preprocessing, and a golden image with the answer that the net gave to it
here, so that `verify` can ask the file again anywhere.
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
from vgg_jax.configs.models import Layer, layer_table
from vgg_jax.errors import InputError
from vgg_jax.layers import BatchNorm
from vgg_jax.preprocessing import preprocess
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.weights import Weights
from vgg_jax.weights.io import to_metadata

SAVEDMODEL_METADATA = "assets.extra/vgg_jax.json"  # TF Serving and TensorFlow leave it alone
REQUIRED_EXTRA = {
    "onnx": "onnx",
    "stablehlo": "stablehlo",
    "savedmodel": "train",
    "safetensors": "",
}  # what is to be installed, by kind


@dataclasses.dataclass(frozen=True, eq=False)
class ExportSpec:
    """What is written: a net, and how it is to be asked.

    Images are (N, H, W, 3) RGB on the 0-255 scale: uint8, or float32 less `mean_rgb` if not `uint8`. The outputs: "logits", (N, K) of
    images of image_size; "posteriors", (N, K) of images of any size from there on, the dense evaluation without the mirror image (§3.2),
    which for image_size is the soft-max of the logits; "score_map", (N, h, w, K) of any size.
    """

    weights: Weights
    output: str = "logits"
    uint8: bool = True
    bfloat16: bool = False  # the weights as they are stored; what is computed is float32

    def __post_init__(self) -> None:
        if self.output not in EXPORT_OUTPUTS:
            raise InputError(
                f"output is {self.output!r}: expected one of {', '.join(EXPORT_OUTPUTS)}"
            )
        if not self.weights.top:
            raise InputError(
                "the fully connected layers are not there: expected a whole net; import a file with the top"
            )

    @property
    def table(self) -> tuple[Layer, ...]:
        """The layers that run in inference."""
        model = self.weights.model
        table = layer_table(model.config, model.num_classes, model.batch_norm, model.image_size)
        return tuple(layer for layer in table if layer.type != "drop")

    @property
    def mean_rgb(self) -> tuple[float, float, float]:
        return self.weights.preprocessing.mean_rgb

    @property
    def dtype(self) -> Any:
        return ml_dtypes.bfloat16 if self.bfloat16 else np.float32

    def __call__(self, variables: Any, images: jax.Array) -> jax.Array:
        """What the file computes."""
        variables = jax.tree.map(lambda x: x.astype(jnp.float32), variables)
        x = preprocess(images, self.mean_rgb) if self.uint8 else images
        method = None if self.output == "logits" else "score_map"
        scores: Any = self.weights.model.apply(variables, x, method=method)
        return jax.nn.softmax(scores.mean((1, 2))) if self.output == "posteriors" else scores

    def metadata(self) -> dict[str, Any]:
        """All that is to be known of the file, as JSON, with the golden image and its answer."""
        model, metadata = self.weights.model, to_metadata(self.weights)
        size = model.image_size
        image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3)).astype(np.uint8)
        ask = jax.jit(self, compiler_options=compiler_options())
        stored = jax.tree.map(lambda x: np.asarray(x).astype(self.dtype), self.weights.variables)
        answer = np.asarray(
            ask(stored, prepare_images(image, self.uint8, self.mean_rgb)), np.float32
        )
        return {
            "net": self.weights.net,
            "batch_norm": model.batch_norm,
            "image_size": size,
            "fc": model.config.fc,
            "classes": self.weights.classes,
            "mean_rgb": self.mean_rgb,
            "channels": "RGB",
            "input": "uint8, 0-255" if self.uint8 else "float32, 0-255 less mean_rgb",
            "output": self.output,
            "bfloat16": self.bfloat16,
            "scale": metadata["preprocessing"]["scale"],
            "flip": metadata["flip"],
            "golden_image": array_to_json(image),
            "golden_answer": array_to_json(answer),
        }


def prepare_images(image: np.ndarray, uint8: bool, mean_rgb: tuple[float, ...]) -> np.ndarray:
    """A uint8 image as a file takes it."""
    return image if uint8 else image.astype(np.float32) - np.array(mean_rgb, np.float32)


def array_to_json(array: np.ndarray) -> dict[str, Any]:
    return {
        "dtype": str(array.dtype),
        "shape": array.shape,
        "base64": base64.b64encode(array.tobytes()).decode(),
    }


def array_from_json(entry: Mapping[str, Any]) -> np.ndarray:
    """Raises ValueError, KeyError or TypeError for what `array_to_json` does not give."""
    return np.frombuffer(base64.b64decode(entry["base64"]), np.dtype(entry["dtype"])).reshape(
        entry["shape"]
    )


def fold_batch_norm(weights: Weights) -> Weights:
    """The net without batch normalisation whose convolutions do what both did: scale · (k ∗ x + b - mean) / √(var + ε) + bias."""
    params: dict[str, Mapping[str, Any]] = {}
    for name, layer in weights.params.items():
        norm = name.replace("conv", "bn")
        if norm != name and norm in weights.params:
            scale, bias = (np.float64(weights.params[norm][leaf]) for leaf in ("scale", "bias"))
            mean, var = (np.float64(weights.batch_stats[norm][leaf]) for leaf in ("mean", "var"))
            factor = scale / np.sqrt(var + BatchNorm.epsilon)
            kernel, offset = (
                np.asarray(layer["kernel"]) * factor,
                (np.asarray(layer["bias"]) - mean) * factor + bias,
            )
            params[name] = {"kernel": kernel.astype(np.float32), "bias": offset.astype(np.float32)}
        elif not name.startswith("bn"):
            params[name] = layer
    return dataclasses.replace(
        weights, model=weights.model.clone(batch_norm=False), params=params, batch_stats={}
    )


def format_of(out: str | os.PathLike) -> str:
    """By the name: .safetensors, .onnx, .stablehlo, or .savedmodel for a folder. Raises InputError for another."""
    kind = Path(out).suffix[1:]
    if kind not in REQUIRED_EXTRA:
        raise InputError(
            f"{out} ends in {Path(out).suffix!r}: expected .safetensors, .onnx, .stablehlo, or .savedmodel for a folder"
        )
    return kind
