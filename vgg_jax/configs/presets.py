"""The configuration of a run from the flags that were given: by data set where images are small, by the number of classes the rate."""

import dataclasses

from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError

# What differs from the paper where the images are small: a name is a data set, the values are TrainConfig's.
_CIFAR = {
    "image_size": 32,
    "scale": (32, 40),
    "fc": (512, 512),
    "batch_size": 128,
    "learning_rate": 1e-2,
}
PRESETS: dict[str, dict] = {
    "digits": {
        "net": "A",
        "batch_norm": True,  # the plain net needs twice the epochs
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


# Flags that do nothing but where another one has this value.
_REQUIRES = {
    "patience": ("schedule", "plateau"),
    "drops": ("schedule", "plateau"),
    "drop_epochs": ("schedule", "step"),
    "initializer_std": ("initializer", "paper"),
}


def preset(data: str, **given) -> TrainConfig:
    """The configuration for a data set: the values `given` (lists become tuples), else the data set's preset, else the paper's.

    Raises InputError for a value that no run can have, and for one that would have no effect.
    """
    given = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }
    chosen = PRESETS.get(data.split(":")[0], {})
    if given.get("schedule", "step") != "step":  # the epochs go with the preset's own schedule
        chosen = {
            name: value for name, value in chosen.items() if name not in ("drop_epochs", "epochs")
        }
    config = TrainConfig(**{"data": data} | chosen | given)
    for name, (other, value) in _REQUIRES.items():
        if name in given and getattr(config, other) != value:
            raise InputError(
                f"{name} is {given[name]}, and {other} is {getattr(config, other)!r}: expected {value!r} with it"
            )
    return config


def resolve_learning_rate(config: TrainConfig, classes: int) -> TrainConfig:
    """The configuration with its learning rate filled in, if it has none: the paper's 1e-2, or 1e-3 for fewer than 100 classes.

    The fewer classes, the more of the images pull at the same logit. Net A from Glorot's initialisation at 224 pixels, batch 16, rate 1e-2:
    with 2 and 10 classes the loss is NaN after three and five steps, with 100 and 1,000 it stays near ln(K); with 2 classes 1e-3 trains.
    """
    if config.learning_rate is not None:
        return config
    return dataclasses.replace(config, learning_rate=1e-2 if classes >= 100 else 1e-3)
