"""The net as a StableHLO program of `jax.export`, for CPU, CUDA and TPU at once, with its weights beside it in one zip file."""

import json
import zipfile
from pathlib import Path
from typing import Any

import flatbuffers  # noqa: F401 - jax.export writes with it, and says so late
import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from safetensors.numpy import save

from vgg_jax.export import ExportSpec

PLATFORMS = ("cpu", "cuda", "tpu")


def write(path: Path, artefact: ExportSpec) -> None:
    """A zip file: `program` (of weights {name: array} and images), `weights.safetensors`, `metadata.json`.

    bfloat16 weights lie there as uint16, which every reader of safetensors has a type for.
    """
    flat = {
        f"{group}/{layer}/{leaf}": array.astype(artefact.dtype)
        for group, layer, leaf, array in _leaves(artefact.weights.variables)
    }
    flat = {
        name: array.view(np.uint16) if artefact.bfloat16 else array for name, array in flat.items()
    }

    def function(weights: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        variables: dict[str, Any] = {}
        for name, array in weights.items():
            group, layer, leaf = name.split("/")
            array = (
                jax.lax.bitcast_convert_type(array, jnp.bfloat16) if artefact.bfloat16 else array
            )
            variables.setdefault(group, {}).setdefault(layer, {})[leaf] = array
        return artefact(variables, images)

    size = artefact.weights.model.image_size
    if artefact.output == "logits":
        shape = export.symbolic_shape(f"n, {size}, {size}, 3")
    else:
        shape = export.symbolic_shape("n, h, w, 3", constraints=(f"h >= {size}", f"w >= {size}"))
    images = jax.ShapeDtypeStruct(shape, jnp.uint8 if artefact.uint8 else jnp.float32)
    weights = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in flat.items()}
    program = export.export(jax.jit(function), platforms=PLATFORMS)(weights, images).serialize()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("metadata.json", json.dumps(artefact.metadata()))
        file.writestr("program", bytes(program))
        file.writestr("weights.safetensors", save(flat))


def _leaves(variables: Any) -> list[tuple[str, str, str, np.ndarray]]:
    return [
        (group, layer, leaf, np.asarray(array))
        for group, layers in variables.items()
        for layer, leaves in layers.items()
        for leaf, array in leaves.items()
    ]
