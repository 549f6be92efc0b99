"""The net of a file, layer by layer, beside PyTorch's operations on the same numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.configs.models import layer_table
from vgg_jax.errors import InputError
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.weights import Weights
from vgg_jax.weights.layouts import LAYOUTS, tensor_table

TOLERANCE = 1e-4


def compare_with_torch(weights: Weights, seed: int = 0) -> dict[str, float]:
    """Of each layer's activations the largest difference, relative to the largest value, on one random image.

    PyTorch gets the tensors as `read` gives them and the image less the mean divided by the deviation; ours the variables of `load`, so
    this checks the layers and the deviation in conv1_1, not the order of a file's axes. What is not a number is infinitely far. Raises
    InputError where torch is not installed.
    """
    try:
        import torch
        from torch.nn import functional
    except ImportError as error:
        raise InputError(
            f"the check against PyTorch needs torch ({error}): pip install torch"
        ) from error
    model = weights.model
    table = layer_table(model.config, model.num_classes, model.batch_norm, model.image_size)
    end = (
        len(table)
        if weights.top
        else next(i for i, layer in enumerate(table) if layer.type == "fc")
    )
    table = tuple(layer for layer in table[:end] if layer.type != "drop")
    pixels = (
        np.random.default_rng(seed)
        .integers(0, 256, (1, model.image_size, model.image_size, 3))
        .astype(np.float32)
    )
    mean, std = (np.array(values, np.float32) for values in weights.preprocessing[:2])
    features = jax.jit(
        model.apply, static_argnames=("layers", "method"), compiler_options=compiler_options()
    )
    ours = features(
        weights.variables,
        jnp.asarray(pixels - mean),
        layers=tuple(layer.name for layer in table),
        method="features",
    )

    layout = next(each for each in LAYOUTS if each.name == "torchvision")
    trees = {"params": weights.params, "batch_stats": weights.batch_stats}
    tensors: dict[tuple[str, str], torch.Tensor] = {}
    for row in tensor_table(
        layout, model.config, model.num_classes, model.batch_norm, model.image_size, weights.top
    ):
        group, layer, leaf = row.path
        tensors[layer, leaf] = torch.from_numpy(row.to_foreign(trees[group][layer][leaf]))
    x = torch.from_numpy((pixels - mean) / std).permute(0, 3, 1, 2)
    differences = {}
    with torch.inference_mode():
        for name, kind, _, kernel in table:
            if kind == "conv":
                x = functional.conv2d(
                    x, tensors[name, "kernel"], tensors[name, "bias"], padding=kernel // 2
                )
            elif kind == "bn":
                mean_, var, scale, bias = (
                    tensors[name, leaf] for leaf in ("mean", "var", "scale", "bias")
                )
                x = functional.batch_norm(x, mean_, var, scale, bias)
            elif kind == "relu":
                x = functional.relu(x)
            elif kind == "lrn":
                x = functional.local_response_norm(x, 5, alpha=5e-4, beta=0.75, k=2.0)
            elif kind == "pool":
                x = functional.max_pool2d(x, 2)
            else:
                x = functional.linear(x.flatten(1), tensors[name, "kernel"], tensors[name, "bias"])
            theirs = x.numpy().transpose(0, 2, 3, 1) if x.ndim == 4 else x.numpy()[:, None, None]
            difference = float(
                np.abs(np.asarray(ours[name]) - theirs).max() / max(np.abs(theirs).max(), 1e-30)
            )
            differences[name] = difference if math.isfinite(difference) else math.inf
    return differences
