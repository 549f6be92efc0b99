"""Presets of data sets, and the default learning rate."""

import pytest

from vgg_jax import InputError, TrainConfig, preset
from vgg_jax.configs.presets import resolve_learning_rate


def test_preset_overrides_take_precedence():
    assert preset("digits").image_size == 32
    assert preset("digits", image_size=64, scale=(64,)).image_size == 64
    assert preset("cifar10", image_size=64).scale == (73,)  # the preset's are for 32 pixels
    assert preset("cifar10:3.0.2").fc == (512, 512)
    assert preset("digits", schedule="plateau").drop_epochs == ()
    assert preset("some/folder") == TrainConfig(data="some/folder")


def test_preset_epochs_belong_to_its_schedule():
    assert preset("digits").epochs == 4
    assert preset("digits", schedule="plateau").epochs == 74
    assert preset("digits", schedule="constant").epochs == 74
    assert preset("digits", schedule="constant", epochs=7).epochs == 7


def test_learning_rate_by_number_of_classes():
    rates = [resolve_learning_rate(TrainConfig(), n).learning_rate for n in (2, 99, 100)]
    assert rates == [1e-3, 1e-3, 1e-2]
    assert resolve_learning_rate(TrainConfig(learning_rate=0.5), 2).learning_rate == 0.5
    # Small images and nets train at the higher rate (docs/performance.md).
    assert preset("cifar10").learning_rate == preset("digits").learning_rate == 1e-2


def test_learning_rate_of_adamw():
    """The rate of a preset is SGD's. A new fc6 divides by the activations, not by their square."""
    for config in (TrainConfig(optimizer="adamw"), preset("digits", optimizer="adamw")):
        assert config.learning_rate is None
        rates = [resolve_learning_rate(config, n).learning_rate for n in (2, 1000)]
        assert rates == [1e-4, 1e-4]
        assert resolve_learning_rate(config, 2, activation_rms=10.0).learning_rate == 1e-5
    assert preset("digits", optimizer="sgd") == preset("digits")
    assert preset("digits", optimizer="adamw", learning_rate=1e-3).learning_rate == 1e-3


@pytest.mark.parametrize(
    ("data", "overrides", "message"),
    [
        (
            "digits",
            {"patience": 3},
            "patience is 3, which has no effect with schedule 'step': expected schedule 'plateau'",
        ),
        ("cifar10", {"drop_epochs": [3]}, "drop_epochs"),
        ("cifar10", {"warmup_epochs": 0}, "with schedule 'plateau': expected schedule 'cosine'"),
        (
            "cifar10",
            {"optimizer": "adamw", "momentum": 0.9},
            "with optimizer 'adamw': expected optimizer 'sgd', or no momentum",
        ),
        (
            "cifar10",
            {"initializer_std": 0.1},
            "with initializer 'glorot': expected initializer 'paper', or no initializer_std",
        ),
    ],
)
def test_preset_rejects_override_without_effect(data, overrides, message):
    with pytest.raises(InputError, match=message):
        preset(data, **overrides)
