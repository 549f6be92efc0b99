"""Perceptual losses on the activations of a VGG.

- Content and style losses of Johnson et al. (arXiv 1603.08155).
- The LPIPS distance of Zhang et al. (arXiv 1801.03924).

The losses are differentiable. Content and style take the activations that
`model.apply(variables, images, layers=…, method="features")` returns: {name: (N, h, w, C)}.
"""

import functools
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vgg_jax.configs.models import CONFIGS
from vgg_jax.errors import InputError
from vgg_jax.model import VGG, check_net
from vgg_jax.preprocessing import subtract_mean


def content_loss(features: Mapping[str, Array], target: Mapping[str, Array]) -> Array:
    """Mean squared difference of activations, summed over layers.

    Args:
        features: Activations (N, h, w, C) by layer.
        target: Activations of the content images, of the same layers and shapes.

    Returns:
        Loss (N,).

    Raises:
        InputError: If the layers or the shapes differ.
    """
    _check_same_layers(features, target)
    for name, activations in features.items():
        if activations.shape != target[name].shape:
            raise InputError(
                f"{name} has the shape {activations.shape} in features and {target[name].shape} in "
                "target: expected the same shape; resize or crop the images to one size"
            )
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


def style_loss(features: Mapping[str, Array], target: Mapping[str, Array]) -> Array:
    """Squared Frobenius distance of Gram matrices, summed over layers.

    Args:
        features: Activations (N, h, w, C) by layer.
        target: Activations of the style images, of the same layers. There are N images, or one
            for all; h and w may differ.

    Returns:
        Loss (N,).

    Raises:
        InputError: If the layers or the numbers of channels or images differ.
    """
    _check_same_layers(features, target)
    for name, activations in features.items():
        (n, *_, channels), (target_n, *_, target_channels) = activations.shape, target[name].shape
        if target_n not in (1, n) or target_channels != channels:
            raise InputError(
                f"{name} has the shape {activations.shape} in features and {target[name].shape} in "
                "target: expected the same number of channels, and as many target images, or one"
            )
    differences = (gram_matrix(features[name]) - gram_matrix(target[name]) for name in features)
    losses = (jnp.sum(difference**2, (1, 2)) for difference in differences)
    return sum(losses, jnp.float32(0))


def lpips(
    model: VGG,
    variables: Any,
    images: Array,
    other_images: Array,
    *,
    mean_rgb: tuple[float, float, float],
    linear_weights: Mapping[str, Array | np.ndarray] | None = None,
    spatial: bool = False,
) -> Array:
    """LPIPS distance, version 0.1, between pairs of images.

    The published linear weights were trained on net D with torchvision's weights.

    Args:
        model: Net D.
        variables: Its variables. The fully connected layers are not needed.
        images: RGB (N, H, W, 3) in 0-255, uint8 or float. The mean is not subtracted yet. All
            types are converted to float32.
        other_images: The same shape.
        mean_rgb: Mean of the net's training images, `metadata["preprocessing"]["mean_rgb"]` of
            `vgg_jax.load`. It is subtracted from the images.
        linear_weights: Weight (C,) of each channel, by layer. None means the published weights.
        spatial: Return a distance for each pixel instead of their mean over each layer.

    Returns:
        Distances (N,), or (N, H, W) if `spatial`.

    Raises:
        InputError: If the images are not two arrays (N, H, W, 3) of one shape, or the linear
            weights do not fit the net. Or the arguments are not a net and its variables.
    """
    check_net(model, variables)
    if linear_weights is None:
        _check_published_net(model)
        linear_weights = _published_linear_weights()
    if images.shape != other_images.shape or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(
            f"the images have the shapes {images.shape} and {other_images.shape}: "
            "expected (N, H, W, 3), the same for both"
        )
    a, b = (
        _unit_features(model, variables, subtract_mean(x, mean_rgb), tuple(linear_weights))
        for x in (images, other_images)
    )
    total = jnp.float32(0)
    for name, weights in linear_weights.items():
        if weights.shape != a[name].shape[3:]:
            raise InputError(
                f"the linear weights of {name} have the shape {weights.shape}: expected "
                f"{a[name].shape[3:]}, one for each channel of the net"
            )
        distances = (a[name] - b[name]) ** 2 @ weights
        total += _resize(distances, *images.shape[1:3]) if spatial else distances.mean((1, 2))
    return total


def _check_published_net(model: VGG) -> None:
    is_net_d = model.config.stages == CONFIGS["D"].stages
    if not is_net_d or model.batch_norm or model.pool != "max":
        raise InputError(
            "the published LPIPS weights belong to net D with max pooling, without batch "
            "normalisation: use this net, or pass linear_weights for yours"
        )


@functools.cache
def _published_linear_weights() -> dict[str, np.ndarray]:
    """Reads the weights that come with the package."""
    from safetensors.numpy import load

    file = resources.files("vgg_jax.weights") / "lpips_vgg.safetensors"
    return dict(sorted(load(file.read_bytes()).items()))


def _unit_features(
    model: VGG, variables: Any, images: Array, layers: tuple[str, ...]
) -> dict[str, Array]:
    """Activations whose channels have length 1 at each position."""
    features: Any = model.apply(variables, images, layers=layers, method="features")
    return {name: _normalize_channels(_widen(features[name])) for name in layers}


def _normalize_channels(x: Array) -> Array:
    """Scales the channels of each position to length 1; zeros stay zeros.

    The gradient at zeros is 0, where the gradient of a norm is NaN.
    """
    squares = jnp.sum(x * x, -1, keepdims=True)
    return jnp.where(squares > 0, x / (jnp.sqrt(jnp.where(squares > 0, squares, 1)) + 1e-10), 0)


def _resize(maps: Array, height: int, width: int) -> Array:
    """Enlarges maps (N, h, w) bilinearly, with half-pixel centres (align_corners=False)."""
    return jax.image.resize(maps, (len(maps), height, width), "bilinear", antialias=False)


def _widen(features: Array) -> Array:
    return features.astype(jnp.promote_types(features.dtype, jnp.float32))


def _check_same_layers(features: Mapping[str, Array], target: Mapping[str, Array]) -> None:
    if features.keys() != target.keys() or not features:
        raise InputError(
            f"features has the layers {', '.join(features) or 'none'}, and target has "
            f"{', '.join(target) or 'none'}: expected the same layers in both, and at least one"
        )
