"""Losses on a VGG's activations: content and style (Johnson et al., arXiv 1603.08155), and the LPIPS distance (Zhang et al., 1801.03924).

They take what `model.apply(variables, images, layers=…, method="features")` gives, {name: (N, h, w, C)}, and are differentiable.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from vgg_jax.errors import InputError
from vgg_jax.model import VGG

LPIPS_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")


def content_loss(features: Mapping[str, Array], wanted: Mapping[str, Array]) -> Array:
    """(N,): the mean squared difference of the activations, summed over the layers."""
    return sum(
        (jnp.mean((features[name] - wanted[name]) ** 2, (1, 2, 3)) for name in features),
        jnp.float32(0),
    )


def gram_matrix(features: Array) -> Array:
    """(N, h, w, C) -> (N, C, C): how the channels go together, divided by h · w · C."""
    n, h, w, c = features.shape
    positions = features.reshape(n, h * w, c)
    return jnp.einsum("npc,npd->ncd", positions, positions) / (h * w * c)


def style_loss(features: Mapping[str, Array], wanted: Mapping[str, Array]) -> Array:
    """(N,): the squared Frobenius norm of the difference of the Gram matrices, summed over the layers. The sizes may differ."""
    return sum(
        (
            jnp.sum((gram_matrix(features[name]) - gram_matrix(wanted[name])) ** 2, (1, 2))
            for name in features
        ),
        jnp.float32(0),
    )


def lpips(
    model: VGG, variables: Any, heads: Mapping[str, Array], images: Array, others: Array
) -> Array:
    """(N,): the LPIPS distance, version 0.1, of images (N, H, W, 3) that are prepared for the net, as in `model.apply(variables, images)`.

    The net is D; the published heads go with torchvision's weights, whose mean and deviation are LPIPS' own.
    """
    layers = tuple(heads)
    found: Any = [
        model.apply(variables, each, layers=layers, method="features") for each in (images, others)
    ]
    ours, theirs = found
    differences = ((_unit(ours[name]) - _unit(theirs[name])) ** 2 @ heads[name] for name in layers)
    return sum((jnp.mean(difference, (1, 2)) for difference in differences), jnp.float32(0))


def _unit(x: Array) -> Array:
    """Each position's channels as a vector of length 1, or 0: at 0 the gradient is 0, where that of a norm is not a number."""
    squares = jnp.sum(x * x, -1, keepdims=True)
    return jnp.where(squares > 0, x / (jnp.sqrt(jnp.where(squares > 0, squares, 1)) + 1e-10), 0)


def load_lpips_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The published heads, {layer: (C,)}, from `lpips/weights/v0.1/vgg.pth` of the package lpips.

    Raises InputError for another file, and where torch, which reads it, is not installed.
    """
    from vgg_jax.weights.formats import open_file

    tensors = open_file(Path(path)).tensors
    heads = {}
    for i, (name, channels) in enumerate(zip(LPIPS_LAYERS, (64, 128, 256, 512, 512), strict=True)):
        tensor = tensors.get(f"lin{i}.model.1.weight")
        if tensor is None or tensor.shape != (1, channels, 1, 1):
            raise InputError(
                f"{path} has no lin{i}.model.1.weight of the shape (1, {channels}, 1, 1): expected lpips' heads for VGG"
            )
        heads[name] = tensor.read().reshape(channels)
    return heads
