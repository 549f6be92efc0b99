"""Where a net looks: its dense score map (§3.2) and Grad-CAM (Selvaraju et al., 1610.02391)."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vgg_jax.errors import InputError
from vgg_jax.inference import MAX_QUICK_IMAGES, quick_model
from vgg_jax.model import VGG
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.runtime.compiler import compiler_options

# Grad-CAM reads the last ReLU whose output has at least this many positions along a side of the
# net's own images: relu5_3 for net D and 224 pixels. Fewer show no shape.
SMALLEST_MAP = 7


class Explanation(NamedTuple):
    """Where a net looks in an image, for one class.

    Attributes:
        posterior: Class posteriors, the soft-max of the mean scores, float32 (K,).
        class_index: The class that the maps are for.
        score_map: Scores of the class, the logits of each window, float32 (h, w).
        posterior_map: Posterior of the class in each window, float32 (h, w).
        grad_cam: Grad-CAM, at least 0, float32 (h', w').
        layer: Name of the layer whose output Grad-CAM weights.
        window: Side of the windows in pixels, which is that of the net's images.
        stride: Distance of two windows in pixels.
        cam_stride: Distance of two positions of Grad-CAM in pixels.
    """

    posterior: np.ndarray
    class_index: int
    score_map: np.ndarray
    posterior_map: np.ndarray
    grad_cam: np.ndarray
    layer: str
    window: int
    stride: int
    cam_stride: int


def explain(
    model: VGG,
    variables: Mapping[str, Any],
    images: np.ndarray,
    *,
    mean_rgb: tuple[float, ...],
    classes: Sequence[int] | None = None,
    layer: str | None = None,
) -> list[Explanation]:
    """Computes the score map and Grad-CAM of images.

    The score of a class is its mean over the score map, as in the dense evaluation (§3.2). Mirror
    images do not count. A is the output (h', w', C) of the layer. The weight a_c is the mean over
    the positions of the score's gradient with respect to A_c. Grad-CAM is relu(sum_c a_c A_c).

    Args:
        model: The net.
        variables: Its variables.
        images: uint8 (N, H, W, C), at the test scale, not smaller than the net's images.
        mean_rgb: Mean of each channel, which is subtracted.
        classes: The class to explain for each image, N of them; None for the most probable one.
        layer: Name of the layer; None for the one that `grad_cam_layer` returns.

    Returns:
        An explanation for each image.

    Raises:
        InputError: The layer is unknown or not convolutional, a class does not exist, or the images
            are no uint8 batch, or too small.
    """
    layer = grad_cam_layer(model) if layer is None else check_layer(model, layer)
    _check_images(model, images)
    chosen = _check_classes(model, classes, len(images))
    compute = _jitted(model, tuple(mean_rgb), layer)
    posteriors, indices, scores, posterior_maps, cams = map(
        np.asarray, compute(variables, images, chosen)
    )
    return [
        Explanation(
            posterior=posteriors[i],
            class_index=int(index),
            score_map=scores[i],
            posterior_map=posterior_maps[i],
            grad_cam=cams[i],
            layer=layer,
            window=model.image_size,
            stride=2 ** len(model.config.stages),
            cam_stride=_stride(model, layer),
        )
        for i, index in enumerate(indices)
    ]


def _check_images(model: VGG, images: np.ndarray) -> None:
    """Raises InputError for images that are prepared already, or too small."""
    is_batch = getattr(images, "ndim", 0) == 4 and len(images) > 0
    if not is_batch or images.dtype != np.uint8:
        description = f"{images.dtype} {images.shape}" if hasattr(images, "shape") else "no array"
        raise InputError(
            f"the images are {description}: expected uint8 (N, H, W, C), resized, the mean not "
            "subtracted"
        )
    height, width = images.shape[1:3]
    if min(height, width) < model.image_size:
        raise InputError(
            f"the images are {height}x{width}: expected both sides to be at least the net's, "
            f"{model.image_size}; pass a larger test scale"
        )


def _check_classes(model: VGG, classes: Sequence[int] | None, count: int) -> np.ndarray:
    """The class of each image, int (N,). -1 is the most probable one."""
    if classes is None:
        return np.full(count, -1)
    indices = np.asarray(classes)
    if indices.shape != (count,) or indices.dtype.kind not in "iu":
        raise InputError(f"classes is {classes!r}: expected {count} numbers, one for each image")
    if indices.min() < 0 or indices.max() >= model.num_classes:
        raise InputError(
            f"classes is {classes!r}: expected numbers from 0 to {model.num_classes - 1}, the "
            "positions among the net's classes"
        )
    return indices


@functools.lru_cache(maxsize=4)
def _jitted(model: VGG, mean_rgb: tuple[float, ...], layer: str) -> jax.stages.Wrapped:
    compute = functools.partial(_explain, model=model, mean_rgb=mean_rgb, layer=layer)
    return jax.jit(compute, compiler_options=compiler_options(dtype=model.dtype))


def _explain(
    variables: Mapping[str, Any],
    images: Array,
    chosen: Array,
    *,
    model: VGG,
    mean_rgb: tuple[float, ...],
    layer: str,
) -> tuple[Array, ...]:
    """The arrays of `Explanation` for N images. A negative class means the most probable one."""
    inputs = subtract_mean(images, mean_rgb)
    forward_model = quick_model(model) if len(images) <= MAX_QUICK_IMAGES else model
    features: Any = forward_model.apply(variables, inputs, (layer,), method="features")
    activations = features[layer].astype(jnp.float32)

    def scores_of(activations: Array) -> Array:
        scores: Any = model.apply(variables, activations, layer, method="score_map_after")
        return scores.astype(jnp.float32)

    scores, backward = jax.vjp(scores_of, activations)
    means = scores.mean((1, 2))
    indices = jnp.where(chosen < 0, means.argmax(-1), chosen)
    # The gradient of each image's mean score of its class.
    one_hot = jax.nn.one_hot(indices, model.num_classes)[:, None, None]
    num_positions = scores.shape[1] * scores.shape[2]
    (gradients,) = backward(jnp.broadcast_to(one_hot / num_positions, scores.shape))
    weights = gradients.mean((1, 2), keepdims=True)
    grad_cam = jax.nn.relu((weights * activations).sum(-1))

    def of_class(maps: Array) -> Array:
        return jnp.take_along_axis(maps, indices[:, None, None, None], axis=-1)[..., 0]

    posteriors = jax.nn.softmax(means)
    return posteriors, indices, of_class(scores), of_class(jax.nn.softmax(scores)), grad_cam


def grad_cam_layer(model: VGG) -> str:
    """Names the layer for Grad-CAM: the last ReLU of a stage with at least 7x7 positions.

    Args:
        model: The net.

    Returns:
        The layer, "relu5_3" for net D and images of 224 pixels. For nets of small images it is the
        last ReLU of an earlier stage.
    """
    stage = len(model.config.stages)
    while stage > 1 and model.image_size // 2 ** (stage - 1) < SMALLEST_MAP:
        stage -= 1
    names = [layer.name for layer in model.layers()]
    return names[names.index(f"pool{stage}") - 1]


def _stride(model: VGG, layer: str) -> int:
    """The distance of two positions of a layer's output, in pixels of the image."""
    layers = model.layers()
    names = [layer.name for layer in layers]
    pools = [other for other in layers[: names.index(layer) + 1] if other.type == "pool"]
    return 2 ** len(pools)


def check_layer(model: VGG, name: str) -> str:
    """Checks that a layer has a map of activations, and returns its name."""
    names = [layer.name for layer in model.layers()]
    maps = names[: names.index(f"pool{len(model.config.stages)}") + 1]
    if name not in maps:
        raise InputError(f"the layer is {name!r}: expected one of {', '.join(maps)}")
    return name
