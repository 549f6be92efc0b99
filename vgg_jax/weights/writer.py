"""Writes weights to a .safetensors file, in the names and axis order of a library."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from vgg_jax.configs.export import SAVE_LAYOUTS
from vgg_jax.errors import InputError
from vgg_jax.paths import require_local
from vgg_jax.runs.files import replace_atomically
from vgg_jax.weights.layouts import LAYOUTS, tensor_table
from vgg_jax.weights.weights import Weights, fold_std_into_conv1, to_metadata

# The configurations of which torchvision and timm have a net.
_SHARED_NETS = ("A", "B", "D", "E")


def save(
    path: str | os.PathLike,
    weights: Weights,
    layout: str = "vgg_jax",
    dtype: Any = np.float32,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes a .safetensors file; it is complete, or the target stays as it was.

    The layout "vgg_jax" has all that `read` needs in its metadata. Other layouts assume the
    preprocessing of their library: RGB images minus a mean, divided by the library's std. The mean
    is in the metadata. If the net used another std, conv1_1 is rescaled to match.

    Args:
        path: The file, on this machine.
        weights: The net.
        layout: One of `SAVE_LAYOUTS`.
        dtype: Data type of the tensors.
        more: JSON values to add to the metadata.

    Raises:
        InputError: The library has no such net, or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if layout not in SAVE_LAYOUTS:
        raise InputError(f"layout is {layout!r}: expected one of {', '.join(SAVE_LAYOUTS)}")
    if layout != "vgg_jax" and weights.net not in _SHARED_NETS:
        raise InputError(
            f"the net is {weights.net}, which {layout} does not have: "
            "expected A, B, D or E; pass the layout vgg_jax"
        )
    source_std = weights.preprocessing.std_rgb
    std = source_std if layout == "vgg_jax" else LAYOUTS[layout].preprocessing.std_rgb
    preprocessing = weights.preprocessing._replace(
        std_rgb=std, scale=to_metadata(weights)["preprocessing"]["scale"]
    )
    metadata = {
        "net": weights.net,
        "image_size": weights.model.image_size,
        "classes": weights.classes,
        **preprocessing._asdict(),
        **(more or {}),
    }
    tensors = _foreign_tensors(weights, layout, std, dtype)
    file = require_local(path, is_output=True)
    if file.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; expected the name of a file")
    try:
        with replace_atomically(file) as temporary:
            # safetensors would create a file that only its owner can read.
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(
                tensors, temporary, metadata={"format": "pt", "vgg_jax": json.dumps(metadata)}
            )
            temporary.chmod(mode)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"cannot write {path} ({error}): "
            "expected a folder that can be written to, with room for the file"
        ) from error


def _foreign_tensors(
    weights: Weights, layout: str, std: tuple[float, ...], dtype: Any
) -> dict[str, np.ndarray]:
    """The tensors by their names in a layout, for images that are divided by `std`."""
    params = weights.params
    source_std = weights.preprocessing.std_rgb
    if std != source_std:
        ratio = tuple(source / target for source, target in zip(source_std, std, strict=True))
        params = fold_std_into_conv1(params, ratio)
    trees = {"params": params, "batch_stats": weights.batch_stats}
    model = weights.model
    table = tensor_table(
        LAYOUTS[layout],
        model.config,
        model.num_classes,
        model.batch_norm,
        model.image_size,
        weights.top,
    )
    tensors = {}
    for tensor in table:
        collection, layer, param = tensor.path
        array = tensor.to_foreign(np.asarray(trees[collection][layer][param]))
        tensors[tensor.foreign_name] = array.astype(dtype)
    return tensors
