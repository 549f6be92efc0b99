"""Statistics of each layer in a training step: norms, and ReLUs that no image activates."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from vgg_jax.model import VGG


def layer_statistics(model: VGG, gradients: Any, params: Any, count: Array) -> dict[str, Array]:
    """Measures the layers of a net.

    A ReLU is a channel of a convolution, or a unit of a fully connected layer. It is dead if the
    gradient of its bias is exactly 0: no image of the batch activates it. It also counts as dead if
    nothing after it passes a gradient on, as when dropout hides it, or when all ReLUs of the next
    layer are dead. After batch normalisation the bias is that of the normalisation, because that of
    the convolution has no effect.

    Args:
        model: The net.
        gradients: Gradients of the loss, summed over the examples, without weight decay.
        params: The parameters.
        count: float (), number of examples.

    Returns:
        float32 arrays (L,), with the layers of `measured_layers`: "gradient_norm", the L2 norm of
        the gradient of the mean loss; "weight_norm", the L2 norm of the parameters; "dead_relus",
        the share of dead ReLUs. Both norms are over the kernel, or the scale, and the bias.
    """
    layers, biases = measured_layers(model), _relu_biases(model)
    values = {
        "gradient_norm": [
            _norm(gradients[name]) / jnp.maximum(count, 1) for name in layers["gradient_norm"]
        ],
        "weight_norm": [_norm(params[name]) for name in layers["weight_norm"]],
        "dead_relus": [
            jnp.mean(gradients[biases[name]]["bias"] == 0) for name in layers["dead_relus"]
        ],
    }
    return {name: jnp.array(column, jnp.float32) for name, column in values.items()}


def measured_layers(model: VGG) -> dict[str, tuple[str, ...]]:
    """Names the layers that `layer_statistics` measures, in the order of computation.

    Args:
        model: The net.

    Returns:
        The names by statistic. All layers with parameters have a "weight_norm", those that are not
        frozen a "gradient_norm", and those before a ReLU "dead_relus".
    """
    learned = tuple(layer.name for layer in model.layers() if layer.type in ("conv", "fc", "bn"))
    return {
        "gradient_norm": tuple(name for name in learned if name not in model.frozen),
        "weight_norm": learned,
        "dead_relus": tuple(_relu_biases(model)),
    }


def name_statistics(model: VGG, statistics: Mapping[str, Any]) -> dict[str, float]:
    """Names each value by its statistic and its layer.

    Args:
        model: The net.
        statistics: What `layer_statistics` returns.

    Returns:
        Numbers by names such as "gradient_norm/conv1_1".
    """
    return {
        f"{name}/{layer}": float(value)
        for name, layers in measured_layers(model).items()
        for layer, value in zip(layers, np.asarray(statistics[name]), strict=True)
    }


def _relu_biases(model: VGG) -> dict[str, str]:
    """Maps each layer before a ReLU to the layer of its last bias, unless that is frozen."""
    biases, name = {}, ""
    for layer, following in pairwise(model.layers()):
        if layer.type in ("conv", "fc"):
            name = layer.name
        if following.type == "relu" and layer.name not in model.frozen:
            biases[name] = layer.name
    return biases


def _norm(arrays: Mapping[str, Array]) -> Array:
    """The L2 norm over all values of a layer."""
    return jnp.sqrt(sum(map(_sum_of_squares, arrays.values())))


def _sum_of_squares(array: Array) -> Array:
    # XLA's CPU backend stores all squares before it adds them. Row by row, it stores few.
    return lax.platform_dependent(
        array.astype(jnp.float32), cpu=_sum_rows, default=lambda x: jnp.square(x).sum()
    )


def _sum_rows(array: Array) -> Array:
    if array.ndim == 1:
        return jnp.square(array).sum()

    def add(total: Array, row: Array) -> tuple[Array, None]:
        return total + jnp.square(row).sum(), None

    return lax.scan(add, jnp.float32(0), array)[0]
