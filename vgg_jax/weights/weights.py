"""The weights of a net in memory, with its model, preprocessing and classes."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from vgg_jax.configs.models import CONFIGS
from vgg_jax.errors import InputError
from vgg_jax.model import VGG
from vgg_jax.weights.layouts import LAYOUTS, UNIT_STD, Preprocessing

Params = Mapping[str, Mapping[str, Any]]  # layer -> parameter -> array


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """The tensors of a net in the names and axis order of vgg_jax, with the file's values.

    Attributes:
        net: Name of the net, a key of `CONFIGS`.
        layout: Name of the layout that they were read from.
        model: The network.
        params: Parameters, before the std of the preprocessing is folded into conv1_1.
        batch_stats: Running mean and variance of the batch normalisations.
        top: True if there are fully connected layers.
        preprocessing: Images that `params` expects.
        classes: Class names, in the order of the outputs.
    """

    net: str
    layout: str
    model: VGG
    params: Params
    batch_stats: Params
    top: bool
    preprocessing: Preprocessing
    classes: tuple[str, ...]

    @property
    def variables(self) -> dict[str, Any]:
        """Variables for `model.apply`, for images from which only the mean was subtracted.

        The std is folded into conv1_1.
        """
        variables: dict[str, Any] = {
            "params": fold_std_into_conv1(self.params, self.preprocessing.std_rgb)
        }
        if self.model.batch_norm:
            variables["batch_stats"] = self.batch_stats
        return variables

    def __str__(self) -> str:
        suffix = " with batch normalisation" if self.model.batch_norm else ""
        parts = [f"{self.net}{suffix} in {self.layout}'s layout"]
        if not self.top:
            parts.append("without fully connected layers")
        if self.layout in LAYOUTS and LAYOUTS[self.layout].bgr:
            parts.append("conv1_1 reordered from BGR to RGB")
        if self.preprocessing.std_rgb != UNIT_STD:
            std = ", ".join(f"{value:.3f}" for value in self.preprocessing.std_rgb)
            parts.append(f"conv1_1 divided by the standard deviation ({std})")
        return ", ".join(parts)


def from_loaded(model: VGG, variables: Mapping[str, Any], metadata: Mapping[str, Any]) -> Weights:
    """Collects what `vgg_jax.load` returns, perhaps with other variables.

    Args:
        model: The network.
        variables: Its variables.
        metadata: "net", "classes" and "preprocessing", as `vgg_jax.load` returns them.

    Returns:
        The weights, for images of which the mean is subtracted only.

    Raises:
        InputError: A key of the metadata is missing, or the net or the classes are not those of the
            model.
    """
    missing = [name for name in ("net", "classes", "preprocessing") if name not in metadata]
    if missing or "params" not in variables:
        names = ", ".join(missing) or "params"
        raise InputError(
            f"{names} is missing: expected the variables of the model, and the metadata that "
            "vgg_jax.load returns"
        )
    net = metadata["net"]
    if net not in CONFIGS or CONFIGS[net].stages != model.config.stages:
        raise InputError(
            f"the metadata's net is {net!r}, and the model has other convolutions: expected the "
            f"name of the model's column of Table 1, one of {', '.join(CONFIGS)}"
        )
    params, classes = variables["params"], tuple(metadata["classes"])
    top = "fc8" in params
    if top and len(classes) != model.num_classes:
        raise InputError(
            f"the metadata has {len(classes)} classes and the model {model.num_classes}: expected "
            'a name for each; pass metadata | {"classes": names}'
        )
    preprocessing = metadata["preprocessing"]
    return Weights(
        net=net,
        layout="vgg_jax",
        model=model.clone(dtype=jnp.float32),  # in place of the run's dtype
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        top=top,
        preprocessing=Preprocessing(
            tuple(preprocessing["mean_rgb"]),
            UNIT_STD,
            preprocessing.get("scale"),
            metadata.get("flip", True),
            preprocessing.get("exif", True),
        ),
        classes=classes,
    )


def to_metadata(weights: Weights) -> dict[str, Any]:
    """Describes a net without its tensors, in the form that `load_best` returns.

    Args:
        weights: The net.

    Returns:
        JSON values: "net", "flip", "top", "source" (the layout and the changes made),
        "classes", and "preprocessing", a dict.
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
            "channels": "RGB",
            "image_size": image_size,
            # Q, the shorter side; the net reads the centre crop.
            "scale": preprocessing.scale or round(image_size * 256 / 224),
            "interpolation": "bilinear, antialiased",
            "exif": preprocessing.exif,
        },
    }


def fold_std_into_conv1(params: Params, std_rgb: tuple[float, ...]) -> Params:
    """Divides the kernel of conv1_1 by a std, so that images need not be divided.

    Zero padding keeps its meaning: it is the mean colour.

    Args:
        params: Parameters for images that are divided by `std_rgb`.
        std_rgb: Standard deviation of each channel.

    Returns:
        Parameters for images that are not divided. The float32 kernel is rounded once.
    """
    if std_rgb == UNIT_STD:
        return params
    conv1 = params["conv1_1"]
    kernel = np.asarray(conv1["kernel"], np.float64) / np.array(std_rgb)[None, None, :, None]
    return {**params, "conv1_1": {**conv1, "kernel": kernel.astype(np.float32)}}
