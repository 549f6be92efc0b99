"""Compares the layers of a net with PyTorch's operations on the same values."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.configs.models import Layer
from vgg_jax.errors import InputError
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.weights.layouts import LAYOUTS, tensor_table
from vgg_jax.weights.weights import Weights, unfold_std

TOLERANCE = 1e-4


def compare_with_torch(weights: Weights, seed: int = 0) -> dict[str, float]:
    """Compares the activations of each layer with PyTorch's, on one random image.

    PyTorch gets the tensors of the file, and the image minus the mean, divided by the file's std.
    The model gets the variables of `load`, and the image minus the mean. So this checks the layers
    and the std in conv1_1; it does not check the axis order of a file.

    Args:
        weights: The net.
        seed: Seed of the image.

    Returns:
        For each layer the largest difference, relative to PyTorch's largest value. It is
        infinite if an activation is not finite.

    Raises:
        InputError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"the check against PyTorch needs torch ({error}): pip install torch"
        ) from error
    model = weights.model
    table = _compared_layers(weights)
    rng = np.random.default_rng(seed)
    shape = (1, model.image_size, model.image_size, model.in_channels)
    image = rng.integers(0, 256, shape).astype(np.float32)
    mean = np.array(weights.preprocessing.mean_rgb, np.float32)
    std = np.array(weights.source_std or 1, np.float32)
    features = jax.jit(
        model.apply, static_argnames=("layers", "method"), compiler_options=compiler_options()
    )
    activations = features(
        weights.variables,
        jnp.asarray(image - mean),
        layers=tuple(layer.name for layer in table),
        method="features",
    )
    differences = {}
    with torch.inference_mode():
        for name, expected in _torch_activations(weights, table, (image - mean) / std):
            scale = max(np.abs(expected).max(), 1e-30)
            difference = float(np.abs(np.asarray(activations[name]) - expected).max() / scale)
            differences[name] = difference if math.isfinite(difference) else math.inf
    return differences


def _compared_layers(weights: Weights) -> tuple[Layer, ...]:
    """The layers of inference that the weights have parameters for."""
    table = weights.model.layers()
    if not weights.top:
        end = next(i for i, layer in enumerate(table) if layer.type == "fc")
        table = table[:end]
    return tuple(layer for layer in table if layer.type != "drop")


def _torch_activations(
    weights: Weights, table: tuple[Layer, ...], image: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields each layer's name and PyTorch's activation (1, h, w, C)."""
    import torch

    tensors = _torch_tensors(weights)
    x = torch.from_numpy(image).permute(0, 3, 1, 2)
    for layer in table:
        x = _apply_torch(layer, tensors, x, weights.model.pool)
        array = x.numpy()
        yield layer.name, array.transpose(0, 2, 3, 1) if x.ndim == 4 else array[:, None, None]


def _torch_tensors(weights: Weights) -> dict[tuple[str, str], Any]:
    """The tensors in torchvision's axis order, by layer and parameter."""
    import torch

    model = weights.model
    params = weights.params
    if weights.source_std:
        params = unfold_std(params, weights.source_std)
    trees = {"params": params, "batch_stats": weights.batch_stats}
    table = tensor_table(
        LAYOUTS["torchvision"],
        model.config,
        model.num_classes,
        model.batch_norm,
        model.image_size,
        weights.top,
        model.in_channels,
    )
    tensors = {}
    for tensor in table:
        collection, layer, param = tensor.path
        array = tensor.to_foreign(np.asarray(trees[collection][layer][param], np.float32))
        tensors[layer, param] = torch.from_numpy(array)
    return tensors


def _apply_torch(layer: Layer, tensors: dict[tuple[str, str], Any], x: Any, pool: str) -> Any:
    """Applies PyTorch's operation for one layer."""
    from torch.nn import functional

    def params(*names: str) -> list[Any]:
        return [tensors[layer.name, name] for name in names]

    match layer.type:
        case "conv":
            kernel, bias = params("kernel", "bias")
            return functional.conv2d(x, kernel, bias, padding=layer.kernel_size // 2)
        case "bn":
            return functional.batch_norm(x, *params("mean", "var", "scale", "bias"))
        case "relu":
            return functional.relu(x)
        case "lrn":
            return functional.local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2.0)
        case "pool":
            return functional.avg_pool2d(x, 2) if pool == "avg" else functional.max_pool2d(x, 2)
        case _:
            return functional.linear(x.flatten(1), *params("kernel", "bias"))
