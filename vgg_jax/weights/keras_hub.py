"""Finds the preprocessing of KerasHub's VGGs, which their weights' names do not tell."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vgg_jax.weights.layouts import Preprocessing

_CONVERTER = "VGGImageConverter"
_MAX_BYTES = 2**24  # of a description
# Files of a preset that describe its images.
_PRESET_FILES = ("image_converter.json", "preprocessor.json", "task.json")
# Files of its weights: without a head, and with one. Others in the folder are of other nets.
_WEIGHTS_FILES = ("model.weights.h5", "task.weights.h5")


def find_preprocessing(path: Path, has_head: bool) -> Preprocessing | None:
    """Reads the preprocessing from a .keras file, or from the files beside a preset's weights.

    Args:
        path: The file with the weights.
        has_head: It has layers after the convolutions.

    Returns:
        The preprocessing of RGB images, or None if the files do not tell.

    Raises:
        OSError: A file cannot be read.
        zipfile.BadZipFile: The .keras file is damaged.
    """
    for text in _descriptions(path, has_head):
        try:
            converters = list(_converters(json.loads(text)))
        except (ValueError, RecursionError):
            continue
        for converter in converters:
            try:
                return _to_preprocessing(**converter)
            except (TypeError, ValueError):
                continue
    return None


def _descriptions(path: Path, has_head: bool) -> Iterator[bytes]:
    """JSON texts that may describe the images."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            names = [info.filename for info in file.infolist() if info.file_size <= _MAX_BYTES]
            if "config.json" in names:
                yield file.read("config.json")
        return
    if path.name != _WEIGHTS_FILES[has_head]:
        return
    for name in _PRESET_FILES:
        description = path.parent / name
        if description.is_file() and description.stat().st_size <= _MAX_BYTES:
            yield description.read_bytes()


def _converters(value: Any) -> Iterator[dict[str, Any]]:
    """The scales and offsets of all image converters in a JSON value."""
    if isinstance(value, dict):
        config = value.get("config")
        if value.get("class_name") == _CONVERTER and isinstance(config, dict):
            yield {name: config.get(name) for name in ("scale", "offset")}
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _converters(item)


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
