"""Writes weights to a .safetensors file, in the names and axis order of a library."""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from vgg_jax.configs.export import SAVE_LAYOUTS
from vgg_jax.errors import InputError
from vgg_jax.model import check_layers
from vgg_jax.paths import require_local
from vgg_jax.runs.files import replace_atomically, usual_permissions
from vgg_jax.weights.layouts import CONV1_KERNEL, LAYOUTS, TensorMapping, tensor_table
from vgg_jax.weights.weights import Weights, to_metadata, unfold_std

# The configurations of which torchvision and timm have a net.
SHARED_NETS = ("A", "B", "D", "E")


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
    is in the metadata. The kernel of conv1_1 is multiplied by the std to match.

    Args:
        path: The file, on this machine, ending in .safetensors.
        weights: The net.
        layout: One of `SAVE_LAYOUTS`.
        dtype: Data type of the tensors. A float64 kernel of conv1_1, which comes from a division by
            a std, stays so in the layout "vgg_jax" instead of float32: no bit of the weights that
            were read is lost.
        more: JSON values to add to the metadata.

    Raises:
        InputError: The path has another ending, the library has no such net, the parameters are
            not those of the model, or the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    file = require_local(path, is_output=True)
    if layout not in SAVE_LAYOUTS:
        raise InputError(f"layout is {layout!r}: expected one of {', '.join(SAVE_LAYOUTS)}")
    if layout != "vgg_jax" and weights.net not in SHARED_NETS:
        raise InputError(
            f"the net is {weights.net}, which {layout} does not have: "
            "expected A, B, D or E; pass the layout vgg_jax"
        )
    in_channels = weights.model.in_channels
    if layout != "vgg_jax" and in_channels != 3:
        raise InputError(
            f"the net's in_channels is {in_channels}, and {layout}'s preprocessing is for RGB: "
            "expected 3; pass the layout vgg_jax"
        )
    if layout != "vgg_jax" and weights.model.pool != "max":
        raise InputError(
            f"the net's pool is {weights.model.pool!r}, and {layout}'s nets pool by maxima: "
            "expected 'max'; pass the layout vgg_jax"
        )
    scale = to_metadata(weights)["preprocessing"]["scale"]
    preprocessing = weights.preprocessing._replace(scale=scale)
    if layout != "vgg_jax":
        preprocessing = preprocessing._replace(std_rgb=LAYOUTS[layout].preprocessing.std_rgb)
    metadata = {
        "net": weights.net,
        "image_size": weights.model.image_size,
        "in_channels": in_channels,
        "pool": weights.model.pool,
        "classes": weights.classes,
        **preprocessing._asdict(),
        **(more or {}),
    }
    tensors = _foreign_tensors(weights, layout, dtype)
    if file.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; expected the name of a file")
    if not file.name.endswith(".safetensors"):
        raise InputError(f"cannot write {path}: expected a name that ends in .safetensors")
    try:
        header = {"format": "pt", "vgg_jax": json.dumps(metadata)}
        with replace_atomically(file) as temporary, usual_permissions(temporary):
            save_file(tensors, temporary, metadata=header)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"cannot write {path} ({error}): "
            "expected a folder that can be written to, with room for the file"
        ) from error


def _foreign_tensors(weights: Weights, layout: str, dtype: Any) -> dict[str, np.ndarray]:
    """The tensors by their names in a layout, for images with the layout's preprocessing."""
    model = weights.model
    table = tensor_table(
        LAYOUTS[layout],
        model.config,
        model.num_classes,
        model.batch_norm,
        model.image_size,
        weights.top,
        model.in_channels,
    )
    trees = {"params": weights.params, "batch_stats": weights.batch_stats}
    _check_trees(trees, table)
    if layout != "vgg_jax":
        std = LAYOUTS[layout].preprocessing.std_rgb
        trees["params"] = unfold_std(weights.params, std)
    tensors = {}
    for tensor in table:
        collection, layer, param = tensor.path
        array = tensor.to_foreign(np.asarray(trees[collection][layer][param]))
        is_exact = array.dtype == np.float64 and tensor.path == CONV1_KERNEL
        if not (is_exact and layout == "vgg_jax" and dtype == np.float32):
            # By float32, so that a file of another type has the rounded values of `variables`.
            array = array.astype(np.float32).astype(dtype)
        tensors[tensor.foreign_name] = array
    return tensors


def _check_trees(trees: Mapping[str, Mapping[str, Any]], table: list[TensorMapping]) -> None:
    """Raises InputError if the layers are not those of the table, or have other shapes."""
    expected: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {name: {} for name in trees}
    for tensor in table:
        collection, layer, param = tensor.path
        expected[collection].setdefault(layer, {})[param] = tensor.shape
    for collection, layers in trees.items():
        check_layers(collection, layers, expected[collection])
        unexpected = [name for name in layers if name not in expected[collection]]
        if unexpected:
            raise InputError(
                f"{collection} has {', '.join(unexpected)}, and the file would not: expected the "
                "layers of the model; set top=True if it has fully connected layers"
            )
