"""The weights of a net in memory, with its model, preprocessing and classes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from vgg_jax.configs.models import CONFIGS
from vgg_jax.errors import InputError
from vgg_jax.model import VGG, check_net
from vgg_jax.weights.layouts import Preprocessing

Params = Mapping[str, Mapping[str, Any]]  # layer -> parameter -> array


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """The tensors of a net in the names, axis order and preprocessing of vgg_jax.

    `dataclasses.replace(weights, params=…)` takes parameters of the same net, however trained.

    Attributes:
        net: Name of the net, a key of `CONFIGS`.
        layout: Name of the layout that they were read from.
        model: The network.
        params: Parameters for RGB images on the 0-255 scale of which the mean is subtracted. After
            `read` divided the kernel of conv1_1 by a std, it is float64, which loses no bit.
        batch_stats: Running mean and variance of the batch normalisations.
        top: True if there are fully connected layers.
        preprocessing: Images that `params` expects. Its std is 1.
        classes: Class names, in the order of the outputs.
        source_std: Standard deviation by which `read` divided the kernel of conv1_1; empty if it
            did not. It describes the file, and changes no value.
        source_bgr: True if `read` reversed the input channels of conv1_1. It describes the file.
        source_notes: What `read` took another library's file for: the size of its images, the
            images, the class names, and where each comes from.

    Raises:
        InputError: The preprocessing has a std, or has not one mean for each channel.
    """

    net: str
    layout: str
    model: VGG
    params: Params
    batch_stats: Params
    top: bool
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    source_std: tuple[float, ...] = ()
    source_bgr: bool = False
    source_notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        mean, std = self.preprocessing[:2]
        if any(value != 1 for value in std):
            raise InputError(
                f"the preprocessing's std_rgb is {std}: expected 1 for each channel; divide the "
                "kernel of conv1_1 by it instead"
            )
        if len(mean) != self.model.in_channels:
            raise InputError(
                f"mean_rgb has {len(mean)} values and the model's in_channels is "
                f"{self.model.in_channels}: expected a mean for each channel"
            )

    @property
    def variables(self) -> dict[str, Any]:
        """Variables for `model.apply`: `params` as float32, and the running statistics."""
        params = self.params
        if "conv1_1" in params and params["conv1_1"]["kernel"].dtype == np.float64:
            conv1 = params["conv1_1"]
            params = {**params, "conv1_1": {**conv1, "kernel": np.float32(conv1["kernel"])}}
        variables: dict[str, Any] = {"params": params}
        if self.model.batch_norm:
            variables["batch_stats"] = self.batch_stats
        return variables

    def __str__(self) -> str:
        suffix = " with batch normalisation" if self.model.batch_norm else ""
        parts = [f"{self.net}{suffix} in {self.layout}'s layout"]
        if not self.top:
            parts.append("without fully connected layers")
        if self.source_bgr:
            parts.append("conv1_1 reordered from BGR to RGB")
        if self.source_std:
            std = ", ".join(f"{value:.3f}" for value in self.source_std)
            parts.append(f"conv1_1 divided by the standard deviation ({std})")
        return "; ".join([", ".join(parts), *self.source_notes])


def from_loaded(model: VGG, variables: Mapping[str, Any], metadata: Mapping[str, Any]) -> Weights:
    """Collects what `vgg_jax.load` returns, perhaps with other variables.

    Args:
        model: The network.
        variables: Its variables.
        metadata: "net", "classes" and "preprocessing", as `vgg_jax.load` returns them. For a model
            with other channels, the mean of RGB images becomes one of its own images, as
            `vgg_jax.with_in_channels` describes.

    Returns:
        The weights.

    Raises:
        InputError: A key of the metadata is missing, or the net, the classes, the image size or
            the mean are not those of the model.
    """
    check_net(model, variables)
    missing = [name for name in ("net", "classes", "preprocessing") if name not in metadata]
    if missing or "params" not in variables:
        names = ", ".join(missing) or "params"
        raise InputError(
            f"{names} is missing: expected the variables of the model, and the metadata that "
            "vgg_jax.load returns"
        )
    net = metadata["net"]
    config = CONFIGS.get(net)
    if config is None or (config.stages, config.lrn) != (model.config.stages, model.config.lrn):
        raise InputError(
            f"the metadata's net is {net!r}, and the model has other convolutions or local "
            "response normalisations: expected the name of the model's column of Table 1, one of "
            f"{', '.join(CONFIGS)}"
        )
    if np.ndim(metadata["classes"]) == 0:  # a string, a number, a set
        raise InputError(
            f"the metadata's classes are {metadata['classes']!r}: expected a tuple of names"
        )
    params, classes = variables["params"], tuple(metadata["classes"])
    top = "fc8" in params
    if top and len(classes) != model.num_classes:
        raise InputError(
            f"the metadata has {len(classes)} classes and the model {model.num_classes}: expected "
            'a name for each; pass metadata | {"classes": names}'
        )
    preprocessing = metadata["preprocessing"]
    if "mean_rgb" not in preprocessing:
        raise InputError(
            "the metadata's preprocessing has no mean_rgb: expected the metadata that vgg_jax.load "
            "returns"
        )
    if np.ndim(preprocessing["mean_rgb"]) != 1:
        raise InputError(
            f"the preprocessing's mean_rgb is {preprocessing['mean_rgb']!r}: expected a tuple with "
            "a mean for each channel"
        )
    image_size = preprocessing.get("image_size", model.image_size)
    if image_size != model.image_size:
        raise InputError(
            f"the metadata's image_size is {image_size} and the model's {model.image_size}: "
            "expected the same; set image_size and scale, the shorter side before the crop, in "
            'metadata["preprocessing"]'
        )
    return Weights(
        net=net,
        layout="vgg_jax",
        model=model.clone(dtype=jnp.float32),  # in place of the run's dtype
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        top=top,
        preprocessing=Preprocessing(
            _mean_of_channels(tuple(preprocessing["mean_rgb"]), model.in_channels),
            (1.0,) * model.in_channels,
            preprocessing.get("scale"),
            metadata.get("flip", True),
            preprocessing.get("exif", True),
            preprocessing.get("rounding", "nearest"),
        ),
        classes=classes,
    )


def _mean_of_channels(mean_rgb: tuple[float, ...], in_channels: int) -> tuple[float, ...]:
    """The mean of an RGB net's images for the net that `with_in_channels` makes of it."""
    if len(mean_rgb) != 3 or in_channels == 3:
        return mean_rgb
    if in_channels == 1:
        return (sum(mean_rgb) / 3,)
    return tuple(mean_rgb[i % 3] for i in range(in_channels))


def channels_name(in_channels: int) -> str:
    """Names the channels of the images, for metadata.

    Args:
        in_channels: Number of channels.

    Returns:
        "grey", "RGB", or such as "4 channels".
    """
    return {1: "grey", 3: "RGB"}.get(in_channels, f"{in_channels} channels")


def to_metadata(weights: Weights) -> dict[str, Any]:
    """Describes a net without its tensors, in the form that `load_best` returns.

    Args:
        weights: The net.

    Returns:
        JSON values: "net", "flip", "top", "source" (the layout, the changes made, and
        what was assumed), "classes", and "preprocessing", a dict.
    """
    image_size = weights.model.image_size
    preprocessing = weights.preprocessing
    return {
        "net": weights.net,
        "flip": preprocessing.flip,
        "top": weights.top,
        "source": str(weights),
        "classes": weights.classes,
        "preprocessing": {
            "mean_rgb": preprocessing.mean_rgb,
            "range": (0, 255),
            "channels": channels_name(weights.model.in_channels),
            "image_size": image_size,
            # Q, the shorter side; the net reads the centre crop.
            "scale": preprocessing.scale or round(image_size * 256 / 224),
            "interpolation": "bilinear, antialiased",
            "exif": preprocessing.exif,
            "rounding": preprocessing.rounding,
        },
    }


def fold_std_into_conv1(params: Params, std_rgb: tuple[float, ...]) -> Params:
    """Divides the kernel of conv1_1 by a std, so that images need not be divided.

    Zero padding keeps its meaning: it is the mean colour.

    Args:
        params: Parameters for images that are divided by `std_rgb`.
        std_rgb: Standard deviation of each channel.

    Returns:
        Parameters for images that are not divided. The kernel is float64: `unfold_std` gives the
        float32 kernel back, bit-equal.
    """
    conv1 = params["conv1_1"]
    kernel = np.asarray(conv1["kernel"], np.float64) / np.array(std_rgb)[None, None, :, None]
    return {**params, "conv1_1": {**conv1, "kernel": kernel}}


def unfold_std(params: Params, std_rgb: tuple[float, ...]) -> Params:
    """Multiplies the kernel of conv1_1 by a std, the inverse of `fold_std_into_conv1`.

    Args:
        params: Parameters for images that are not divided.
        std_rgb: Standard deviation of each channel.

    Returns:
        Parameters for images that are divided by `std_rgb`. The kernel is float64.
    """
    conv1 = params["conv1_1"]
    kernel = np.asarray(conv1["kernel"], np.float64) * np.array(std_rgb)[None, None, :, None]
    return {**params, "conv1_1": {**conv1, "kernel": kernel}}
