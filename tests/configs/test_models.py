"""Table 1 and the checks of a run's configuration."""

import dataclasses

import pytest

from vgg_jax import CONFIGS, InputError, TrainConfig
from vgg_jax.configs.models import layer_table
from vgg_jax.configs.presets import resolve_learning_rate
from vgg_jax.configs.train import CHOICES
from vgg_jax.model import INITIALIZERS

CONV_LAYERS = {"A": 8, "A-LRN": 8, "B": 10, "C": 13, "D": 13, "E": 16, "B-5x5": 5}


def test_convolutions_of_table_1():
    assert CONFIGS.keys() == CONV_LAYERS.keys()
    for net, count in CONV_LAYERS.items():
        assert sum(layer.type == "conv" for layer in layer_table(CONFIGS[net])) == count


def test_layers_are_named_as_in_the_released_models():
    names = [layer.name for layer in layer_table(CONFIGS["A-LRN"], batch_norm=True)]
    assert names[:6] == ["conv1_1", "bn1_1", "relu1_1", "lrn1_1", "pool1", "conv2_1"]
    assert names[-8:] == ["pool5", "fc6", "relu6", "drop6", "fc7", "relu7", "drop7", "fc8"]


def test_only_c_has_1x1_convolutions_and_they_end_its_last_stages():
    ones = {
        net: [
            layer.name
            for layer in layer_table(config)
            if layer.type == "conv" and layer.kernel_size == 1
        ]
        for net, config in CONFIGS.items()
    }
    assert ones == {net: ["conv3_3", "conv4_3", "conv5_3"] if net == "C" else [] for net in CONFIGS}


def test_defaults_are_the_papers():
    config = TrainConfig()
    assert (config.batch_size, config.momentum, config.weight_decay, config.dropout_rate) == (
        256,
        0.9,
        5e-4,
        0.5,
    )
    assert resolve_learning_rate(config, 1000).learning_rate == 1e-2
    assert (config.drops, config.epochs, config.scale, config.image_size) == (3, 74, (256,), 224)


def test_every_initializer_can_be_chosen():
    assert set(CHOICES["initializer"]) == INITIALIZERS.keys()


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
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(InputError, match=f"(?s){field}.* is .*expected"):
        dataclasses.replace(TrainConfig(), **{field: value})
