"""Exports a net as a StableHLO program of `jax.export`, for CPU, CUDA and TPU at once."""

import json
import zipfile
from pathlib import Path
from typing import Any

import flatbuffers  # noqa: F401 - jax.export imports it too late for a clear error
import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import save

from vgg_jax.export.spec import ExportSpec

PLATFORMS = ("cpu", "cuda", "tpu")


def write(path: Path, spec: ExportSpec) -> None:
    """Writes a zip file with the program and its weights.

    The member `program` is a function of weights {name: array} and images. The others are
    `weights.safetensors` and `metadata.json`. bfloat16 weights are stored as uint16, because every
    reader of safetensors has that type.

    Args:
        path: The file.
        spec: The net, with its inputs and outputs.
    """
    flat = {
        f"{collection}/{layer}/{param}": _to_stored(np.asarray(array), spec)
        for collection, layers in spec.weights.variables.items()
        for layer, params in layers.items()
        for param, array in params.items()
    }

    def forward(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        variables: dict[str, Any] = {}
        for name, array in weights.items():
            collection, layer, param = name.split("/")
            if spec.bfloat16:
                array = jax.lax.bitcast_convert_type(array, jnp.bfloat16)
            variables.setdefault(collection, {}).setdefault(layer, {})[param] = array
        return spec(variables, images)

    size, channels = spec.weights.model.image_size, spec.weights.model.in_channels
    if spec.output == "logits":
        shape = export.symbolic_shape(f"n, {size}, {size}, {channels}")
    else:
        constraints = (f"h >= {size}", f"w >= {size}")
        shape = export.symbolic_shape(f"n, h, w, {channels}", constraints=constraints)
    images = jax.ShapeDtypeStruct(shape, jnp.uint8 if spec.uint8 else jnp.float32)
    weights = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in flat.items()}
    program = export.export(jax.jit(forward), platforms=PLATFORMS)(weights, images).serialize()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("metadata.json", json.dumps(spec.metadata()))
        file.writestr("program", bytes(program))
        file.writestr("weights.safetensors", save(flat))


def _to_stored(array: np.ndarray, spec: ExportSpec) -> np.ndarray:
    array = array.astype(spec.dtype)
    return array.view(np.uint16) if spec.bfloat16 else array
