"""An exported file, asked again for its golden answer by the library that runs such files."""

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vgg_jax.errors import InputError
from vgg_jax.export.spec import (
    REQUIRED_EXTRA,
    SAVEDMODEL_METADATA,
    array_from_json,
    format_of,
    prepare_images,
)
from vgg_jax.paths import require_local

TOLERANCE = 1e-4  # of the largest value


def verify(path: str | os.PathLike) -> tuple[str, float]:
    """What the file says of itself, and how far its answer is from the golden one, relative to the largest value; `TOLERANCE` is allowed.

    Runs the file's program: ask only files that you trust. Raises InputError for a file that is damaged, not exported by `vgg-jax export`,
    or that needs a library that is not installed.
    """
    path, kind = require_local(path), format_of(path)
    try:
        described, ask = _OPEN[kind](path)
        image, answer = (
            array_from_json(described["golden_image"]),
            array_from_json(described["golden_answer"]),
        )
        images = prepare_images(
            image, described["input"].startswith("uint8"), described["mean_rgb"]
        )
        found = ask(images)
        said = f"{described['net']}, {len(described['classes'])} classes, {described['output']}, images {described['input']}"
    except InputError:
        raise
    except ImportError as error:
        raise InputError(
            f"asking {path} needs {error.name}: pip install 'vgg-jax[{REQUIRED_EXTRA[kind]}]'"
        ) from error
    except Exception as error:  # each library has its own ways to say that a file is damaged
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"{path} cannot be asked ({reason}): expected a whole file that `vgg-jax export` wrote"
        ) from error
    if found.shape != answer.shape:
        raise InputError(f"{path} answers {found.shape}: expected {answer.shape}, as at its export")
    return said, float(np.abs(found - answer).max() / max(np.abs(answer).max(), 1e-30))


Opened = tuple[Mapping[str, Any], Callable[[np.ndarray], np.ndarray]]


def _onnx(path: Path) -> Opened:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    described = json.loads(session.get_modelmeta().custom_metadata_map["vgg_jax"])
    return described, lambda images: session.run(None, {"images": images})[0]


def _stablehlo(path: Path) -> Opened:
    import flatbuffers  # noqa: F401 - jax.export reads with it
    from jax import export
    from safetensors.numpy import load

    with zipfile.ZipFile(path) as file:
        described = json.loads(file.read("metadata.json"))
        program, weights = (
            export.deserialize(bytearray(file.read("program"))),
            load(file.read("weights.safetensors")),
        )
    return described, lambda images: np.asarray(program.call(weights, images))


def _savedmodel(path: Path) -> Opened:
    from vgg_jax.data import tf  # which sees no GPU

    described = json.loads((path / SAVEDMODEL_METADATA).read_text())
    answer = tf.saved_model.load(str(path)).signatures["serving_default"]
    return described, lambda images: answer(images=tf.constant(images))[described["output"]].numpy()


def _safetensors(path: Path) -> Opened:
    import jax
    from safetensors import safe_open

    from vgg_jax.weights import load_file

    with safe_open(path, framework="numpy") as file:
        described = json.loads(file.metadata()["vgg_jax"])
    model, variables, metadata = load_file(path)

    def ask(images: np.ndarray) -> np.ndarray:
        x = images.astype(np.float32) - np.array(metadata["preprocessing"]["mean_rgb"], np.float32)
        return np.asarray(jax.jit(model.apply)(variables, x))

    return described, ask


_OPEN: dict[str, Callable[[Path], Opened]] = {
    "onnx": _onnx,
    "stablehlo": _stablehlo,
    "savedmodel": _savedmodel,
    "safetensors": _safetensors,
}
