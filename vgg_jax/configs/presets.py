"""Presets for data sets of small images, and the default learning rate."""

import dataclasses
from typing import Any

from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError

_CIFAR = {
    "image_size": 32,
    "scale": (32, 40),
    "fc": (512, 512),
    "batch_size": 128,
    "learning_rate": 1e-2,
}

# The values of TrainConfig that differ from the paper's, by data set.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
        "net": "A",
        # The plain net needs more epochs (docs/performance.md#digits).
        "batch_norm": True,
        "dropout_rate": 0.2,
        "image_size": 32,
        "scale": (32,),
        "fc": (512, 512),
        "batch_size": 32,
        "learning_rate": 1e-2,
        "flip": False,
        "colour_shift": 0.0,
        "schedule": "step",
        "drop_epochs": (3,),
        "epochs": 4,
    },
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
}

# A field has no effect unless another field has this value.
_REQUIRES = {
    "patience": ("schedule", "plateau"),
    "drops": ("schedule", "plateau"),
    "drop_epochs": ("schedule", "step"),
    "warmup_epochs": ("schedule", "cosine"),
    "momentum": ("optimizer", "sgd"),
    "initializer_std": ("initializer", "paper"),
}


def preset(data: str, **overrides: Any) -> TrainConfig:
    """Builds the configuration for a data set.

    Args:
        data: A name such as "digits" or "cifar10:3.0.2", or an image folder.
        **overrides: Fields of TrainConfig. They take precedence over the preset of the data set,
            and that over the paper's values. Lists become tuples.

    Returns:
        The configuration.

    Raises:
        InputError: If a value is invalid, or if an override would have no effect.
    """
    overrides = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in overrides.items()
    }
    defaults = PRESETS.get(data.split(":")[0], {})
    if overrides.get("schedule", "step") != "step":
        # The preset's epochs belong to its own schedule.
        schedule_fields = ("drop_epochs", "epochs")
        defaults = {name: value for name, value in defaults.items() if name not in schedule_fields}
    if overrides.get("optimizer", "sgd") != "sgd":
        # The preset's learning rate is for SGD.
        defaults = {name: value for name, value in defaults.items() if name != "learning_rate"}
    if "image_size" in overrides:
        # The preset's scales belong to its own image size.
        defaults = {name: value for name, value in defaults.items() if name != "scale"}
    config = TrainConfig(**{"data": data} | defaults | overrides)
    for name, (other, required) in _REQUIRES.items():
        actual = getattr(config, other)
        if name in overrides and actual != required:
            raise InputError(
                f"{name} is {overrides[name]}, which has no effect with {other} {actual!r}: "
                f"expected {other} {required!r}, or no {name}"
            )
    return config


def resolve_learning_rate(
    config: TrainConfig, num_classes: int, activation_rms: float | None = None
) -> TrainConfig:
    """Fills in the default learning rate.

    SGD has the paper's 1e-2, or 1e-3 for fewer than 100 classes.

    Few classes mean that many images pull at the same logit. A net then diverges at 1e-2
    (docs/performance.md#learning-rate-and-classes).

    The gradient of a new fc6 grows with the activations that it reads, and so does the change of
    its outputs by a step. So the default is divided by the square of activations above 1
    (docs/performance.md#new-head-on-pretrained-convolutions).

    AdamW has 1e-4 for any number of classes, because its steps do not grow with the gradient. For
    the same reason the activations themselves divide it, not their square.

    Args:
        config: A configuration.
        num_classes: Number of classes of its data.
        activation_rms: Root mean square of the pretrained activations that a new fc6 reads. None
            if fc6 is not new, or reads no pretrained activations.

    Returns:
        The configuration itself if it has a learning rate, else a copy with the default, which has
        one significant digit.
    """
    if config.learning_rate is not None:
        return config
    is_sgd = config.optimizer == "sgd"
    default = (1e-2 if num_classes >= 100 else 1e-3) if is_sgd else 1e-4
    if activation_rms is not None and activation_rms > 1:
        default = float(f"{default / activation_rms ** (2 if is_sgd else 1):.0e}")
    return dataclasses.replace(config, learning_rate=default)
