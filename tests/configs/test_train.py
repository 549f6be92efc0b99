"""The configuration of a training run."""

import dataclasses
import re

import pytest

from vgg_jax import InputError, TrainConfig
from vgg_jax.cli.parser import TRAIN_GROUPS
from vgg_jax.configs.presets import resolve_learning_rate
from vgg_jax.model import INITIALIZERS

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def test_defaults_are_the_papers():
    config = TrainConfig()
    assert (config.batch_size, config.momentum, config.weight_decay) == (256, 0.9, 5e-4)
    assert config.dropout_rate == 0.5
    assert resolve_learning_rate(config, 1000).learning_rate == 1e-2
    assert (config.drops, config.epochs, config.scale, config.image_size) == (3, 74, (256,), 224)


def test_fields_have_help_and_group():
    for name, field in FIELDS.items():
        if name != "data":  # a positional argument, which other commands have as well
            assert field.metadata["group"] in TRAIN_GROUPS
            assert field.metadata["help"]


def test_initializer_choices_exist():
    assert set(FIELDS["initializer"].metadata["choices"]) == INITIALIZERS.keys()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("net", "F"),
        ("dtype", "float16"),
        ("scale", (512, 256)),
        ("scale", (256, 300, 384)),
        ("scale", (200,)),
        ("image_size", 31),
        ("batch_size", 0),
        ("microbatch", 100),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", -0.1),
        ("weight_decay", -1.0),
        ("dropout_rate", 1.0),
        ("validation_fraction", 1.5),
        ("validation_fraction", 0.0),
        ("fc", (0, 10)),
        ("fc", (512,)),
        ("fc", (1, 2, 3)),
        ("schedule", "step"),
        ("drop_epochs", (3,)),
        ("drop_epochs", (3, 2)),
        ("drop_epochs", (0, 2)),
        ("freeze", ("conv9_9",)),
        ("freeze", ("conv", "fc")),
        ("optimizer", "adam"),
        ("label_smoothing", 1.0),
        ("label_smoothing", -0.1),
        ("warmup_epochs", -1),
        ("warmup_epochs", 1),  # without a cosine
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_invalid_value_is_named(field, value):
    with pytest.raises(InputError, match=f"(?s){field}.* is .*expected"):
        dataclasses.replace(TrainConfig(), **{field: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8': expected one of float32, bfloat16"),
        ({"batch_size": 0}, "batch_size is 0: expected more than 0"),
        ({"drops": -1}, "drops is -1: expected at least 0"),
        ({"momentum": 1.0}, "momentum is 1.0: expected at least 0 and less than 1"),
        (
            {"optimizer": "adamw", "momentum": 0.5},
            "momentum is 0.5 and optimizer is 'adamw': expected momentum with optimizer 'sgd' only",
        ),
        (
            {"schedule": "cosine", "epochs": 5, "warmup_epochs": 5},
            "warmup_epochs is 5: expected less than the epochs, 5",
        ),
        (
            {"validation_fraction": 0.0},
            "validation_fraction is 0.0: expected more than 0 and less than 1",
        ),
        ({"microbatch": 100}, "microbatch is 100: expected a divisor of the batch size, 256"),
        (
            {"schedule": "step", "drop_epochs": (3, 2)},
            "drop_epochs is (3, 2): expected increasing numbers from 1 on",
        ),
    ],
)
def test_invalid_value_message(values, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        TrainConfig(**values)


def test_bounds_are_inclusive_or_exclusive():
    config = TrainConfig(seed=2**32 - 1, drops=0, weight_decay=0.0, momentum=0.0, epochs=1)
    assert config.seed == 2**32 - 1


def test_frozen_includes_batch_norm():
    config = TrainConfig(net="A", batch_norm=True, freeze=("conv1_1", "fc"))
    assert config.frozen == ("conv1_1", "fc6", "fc7", "fc8", "bn1_1")
    assert TrainConfig(net="A", freeze=("conv1_1",)).frozen == ("conv1_1",)


def test_test_scale_is_middle_of_jitter():
    assert TrainConfig().test_scale == 256
    # The paper's ratio, 256 to 224.
    assert [TrainConfig(image_size=size).scale for size in (112, 64)] == [(128,), (73,)]
    assert TrainConfig(scale=(256, 512)).test_scale == 384
