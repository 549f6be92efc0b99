"""Perceptual losses on the activations of a VGG.

- Content and style losses of Johnson et al. (arXiv 1603.08155).
- The LPIPS distance of Zhang et al. (arXiv 1801.03924).

The losses are differentiable. Content and style take the activations that
`model.apply(variables, images, layers=…, method="features")` returns: {name: (N, h, w, C)}.
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
LPIPS_CHANNELS = (64, 128, 256, 512, 512)


def content_loss(features: Mapping[str, Array], target: Mapping[str, Array]) -> Array:
    """Mean squared difference of activations, summed over layers.

    Args:
        features: Activations (N, h, w, C) by layer.
        target: Activations of the content images, of the same shapes.

    Returns:
        Loss (N,).
    """
    differences = (_widen(features[name]) - _widen(target[name]) for name in features)
    return sum((jnp.mean(d**2, (1, 2, 3)) for d in differences), jnp.float32(0))


def gram_matrix(features: Array) -> Array:
    """Computes the Gram matrix of the channels, divided by h · w · C.

    Args:
        features: Activations (N, h, w, C).

    Returns:
        Matrices (N, C, C), at least float32: the sums of float16 activations overflow.
    """
    n, h, w, c = features.shape
    positions = _widen(features).reshape(n, h * w, c)
    return jnp.einsum("npc,npd->ncd", positions, positions) / (h * w * c)


def _widen(features: Array) -> Array:
    return features.astype(jnp.promote_types(features.dtype, jnp.float32))


def style_loss(features: Mapping[str, Array], target: Mapping[str, Array]) -> Array:
    """Squared Frobenius distance of Gram matrices, summed over layers.

    Args:
        features: Activations (N, h, w, C) by layer.
        target: Activations of the style images; h and w may differ.

    Returns:
        Loss (N,).
    """
    differences = (gram_matrix(features[name]) - gram_matrix(target[name]) for name in features)
    losses = (jnp.sum(difference**2, (1, 2)) for difference in differences)
    return sum(losses, jnp.float32(0))


def lpips(
    model: VGG,
    variables: Any,
    lpips_weights: Mapping[str, Array],
    images: Array,
    other_images: Array,
) -> Array:
    """LPIPS distance, version 0.1, between pairs of images.

    The published weights belong to net D with torchvision's weights. LPIPS uses the mean and the
    standard deviation of torchvision.

    Args:
        model: Net D.
        variables: Its variables.
        lpips_weights: Weight (C,) of each channel, by layer (`load_lpips_weights`).
        images: (N, H, W, 3), prepared as for `model.apply(variables, images)`.
        other_images: The same shape.

    Returns:
        Distances (N,).
    """
    layers = tuple(lpips_weights)
    a: Any = model.apply(variables, images, layers=layers, method="features")
    b: Any = model.apply(variables, other_images, layers=layers, method="features")
    differences = (
        (_normalize_channels(a[name]) - _normalize_channels(b[name])) ** 2 @ lpips_weights[name]
        for name in layers
    )
    return sum((jnp.mean(difference, (1, 2)) for difference in differences), jnp.float32(0))


def _normalize_channels(x: Array) -> Array:
    """Scales the channels of each position to length 1; zeros stay zeros.

    The gradient at zeros is 0, where the gradient of a norm is NaN.
    """
    squares = jnp.sum(x * x, -1, keepdims=True)
    return jnp.where(squares > 0, x / (jnp.sqrt(jnp.where(squares > 0, squares, 1)) + 1e-10), 0)


def load_lpips_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads the published weights of LPIPS for VGG.

    Args:
        path: `lpips/weights/v0.1/vgg.pth` of the package lpips.

    Returns:
        Weights (C,) by layer.

    Raises:
        InputError: If it is another file, or torch, which reads it, is not installed.
    """
    from vgg_jax.weights.formats import open_file

    tensors = open_file(Path(path)).tensors
    weights = {}
    for i, (layer, channels) in enumerate(zip(LPIPS_LAYERS, LPIPS_CHANNELS, strict=True)):
        name, shape = f"lin{i}.model.1.weight", (1, channels, 1, 1)
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape:
            raise InputError(
                f"{path} has no {name} of the shape {shape}: expected the weights of lpips for VGG"
            )
        weights[layer] = tensor.read().reshape(channels)
    return weights
