"""Reads descriptions of Keras' models, such as the preprocessing of KerasHub's VGGs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vgg_jax.weights.layouts import Preprocessing
from vgg_jax.weights.tensor_file import MAX_CONFIG_BYTES

# Files of a preset that describe its images.
_PRESET_FILES = ("image_converter.json", "preprocessor.json", "task.json")
# Files of its weights: without a head, and with one. Others in the folder are of other nets.
_WEIGHTS_FILES = ("model.weights.h5", "task.weights.h5")


def find_preprocessing(path: Path, config: str | bytes, has_head: bool) -> Preprocessing | None:
    """Reads the preprocessing from a model's description, or from the files beside a preset.

    Args:
        path: The file with the weights.
        config: JSON that describes the model, or "" if the file has none.
        has_head: It has layers after the convolutions.

    Returns:
        The preprocessing of RGB images, or None if the files do not tell.

    Raises:
        OSError: A file cannot be read.
    """
    for text in (config, *_descriptions(path, has_head)):
        for converter in _find_configs(text, "VGGImageConverter"):
            try:
                return _to_preprocessing(converter.get("scale"), converter.get("offset"))
            except (TypeError, ValueError):
                continue
    return None


def has_layer(config: str | bytes, class_name: str) -> bool:
    """True if a description of a Keras model has a layer of a class.

    Args:
        config: JSON that describes the model, or "".
        class_name: Name of the class, such as "GlobalMaxPooling2D".
    """
    return any(True for _ in _find_configs(config, class_name))


def _descriptions(path: Path, has_head: bool) -> Iterator[bytes]:
    """JSON texts that may describe the images."""
    if path.name != _WEIGHTS_FILES[has_head]:
        return
    for name in _PRESET_FILES:
        description = path.parent / name
        if description.is_file() and description.stat().st_size <= MAX_CONFIG_BYTES:
            yield description.read_bytes()


def _find_configs(text: str | bytes, class_name: str) -> Iterator[dict[str, Any]]:
    """The configurations of all objects of a class in a JSON text."""
    try:
        values = [json.loads(text)]
    except (ValueError, RecursionError):
        return
    while values:
        value = values.pop()
        if isinstance(value, dict):
            config = value.get("config")
            if value.get("class_name") == class_name and isinstance(config, dict):
                yield config
            value = list(value.values())
        if isinstance(value, list):
            values += value


def _to_preprocessing(scale: Any, offset: Any) -> Preprocessing:
    """Images are multiplied by a scale, and an offset is added."""
    scales, offsets = (
        np.broadcast_to(np.asarray(default if value is None else value, np.float64), 3)
        for value, default in ((scale, 1), (offset, 0))
    )
    with np.errstate(all="ignore"):
        mean, std = -offsets / scales, 1 / scales
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
        raise ValueError("no such images")
    return Preprocessing(tuple(mean.tolist()), tuple(std.tolist()))
