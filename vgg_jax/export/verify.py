"""Checks an exported file: runs its golden image with the library of its format."""

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vgg_jax.errors import InputError, install_hint, single_line
from vgg_jax.export.spec import (
    REQUIRED_EXTRA,
    SAVEDMODEL_METADATA,
    array_from_json,
    format_of,
    prepare_images,
)
from vgg_jax.paths import require_local

TOLERANCE = 1e-4  # relative to the largest value
# Runtimes round float16 at different places, which changes the last of its 11 bits in each layer.
FLOAT16_TOLERANCE = 2e-2


class Verification(NamedTuple):
    """What `verify` found about a file.

    Attributes:
        summary: The net, its classes, its output and its images.
        difference: Largest difference from the output at export, relative to its largest value.
        tolerance: A `difference` below it is fine.
        distance: The same difference of the file's output from that of the float32 net; None if
            the file is not rounded, or does not tell.
    """

    summary: str
    difference: float
    tolerance: float
    distance: float | None


def verify(path: str | os.PathLike) -> Verification:
    """Compares the output of a file with its golden output.

    It runs the program in the file, so verify only files that you trust.

    Args:
        path: A file or folder that `vgg-jax export` wrote.

    Returns:
        A summary of the file, and its differences from the outputs at export.

    Raises:
        InputError: The file is missing or damaged, was not written by `vgg-jax export`, or needs a
            library that is not installed.
    """
    path, file_format = require_local(path), format_of(path)
    if not path.exists():
        raise InputError(f"there is no {path}: expected what `vgg-jax export` wrote")
    try:
        metadata, forward = _OPENERS[file_format](path)
        image = array_from_json(metadata["golden_image"])
        expected = array_from_json(metadata["golden_answer"])
        exact = metadata.get("float32_answer")
        exact = None if exact is None else array_from_json(exact)
        output = forward(
            prepare_images(image, metadata["input"].startswith("uint8"), metadata["mean_rgb"])
        )
        summary = (
            f"{metadata['net']}, {len(metadata['classes'])} classes, {metadata['output']}, "
            f"images {metadata['input']}"
        )
    except InputError:
        raise
    except ImportError as error:
        extra = REQUIRED_EXTRA[file_format]  # none for safetensors, a core dependency
        hint = install_hint(extra) if extra else "pip install safetensors"
        raise InputError(f"running {path} needs {error.name}: {hint}") from error
    except Exception as error:  # each library has errors of its own for a damaged file
        raise InputError(
            f"{path} cannot be run ({type(error).__name__}: {single_line(error)}): "
            "expected a whole file that `vgg-jax export` wrote"
        ) from error
    if output.shape != expected.shape:
        raise InputError(
            f"{path} has an output of {output.shape}: expected {expected.shape}, as at its export"
        )
    return Verification(
        summary,
        _relative_difference(output, expected),
        FLOAT16_TOLERANCE if metadata.get("float16") else TOLERANCE,
        None if exact is None else _relative_difference(output, exact),
    )


def _relative_difference(output: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(output - expected).max() / max(np.abs(expected).max(), 1e-30))


# The metadata of a file, and a function from images to the output.
OpenedFile = tuple[Mapping[str, Any], Callable[[np.ndarray], np.ndarray]]


def _open_onnx(path: Path) -> OpenedFile:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["vgg_jax"])
    return metadata, lambda images: session.run(None, {"images": images})[0]


def _open_stablehlo(path: Path) -> OpenedFile:
    import flatbuffers  # noqa: F401 - jax.export imports it too late for a clear error
    from jax import export
    from safetensors.numpy import load

    with zipfile.ZipFile(path) as file:
        metadata = json.loads(file.read("metadata.json"))
        program = export.deserialize(bytearray(file.read("program")))
        weights = load(file.read("weights.safetensors"))
    return metadata, lambda images: np.asarray(program.call(weights, images))


def _open_savedmodel(path: Path) -> OpenedFile:
    from vgg_jax.data import tf  # configured to use no GPU

    metadata = json.loads((path / SAVEDMODEL_METADATA).read_text())
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    output = metadata["output"]
    return metadata, lambda images: signature(images=tf.constant(images))[output].numpy()


def _open_safetensors(path: Path) -> OpenedFile:
    import jax
    from safetensors import safe_open

    from vgg_jax.inference import quick_model
    from vgg_jax.weights import load_file

    with safe_open(path, framework="numpy") as file:
        metadata = json.loads(file.metadata()["vgg_jax"])
    model, variables, weights_metadata = load_file(path)
    mean = np.array(weights_metadata["preprocessing"]["mean_rgb"], np.float32)

    apply = jax.jit(quick_model(model).apply)
    return metadata, lambda images: np.asarray(apply(variables, images.astype(np.float32) - mean))


_OPENERS: dict[str, Callable[[Path], OpenedFile]] = {
    "onnx": _open_onnx,
    "stablehlo": _open_stablehlo,
    "savedmodel": _open_savedmodel,
    "safetensors": _open_safetensors,
}
