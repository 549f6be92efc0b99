"""What a data set and the number of its classes decide."""

import pytest

from vgg_jax import InputError, TrainConfig, preset
from vgg_jax.configs.presets import resolve_learning_rate


def test_presets_give_way_to_what_is_given():
    assert preset("digits").image_size == 32
    assert preset("digits", image_size=64, scale=(64,)).image_size == 64
    assert preset("cifar10:3.0.2").fc == (512, 512)
    assert preset("digits", schedule="plateau").drop_epochs == ()
    assert preset("some/folder") == TrainConfig(data="some/folder")


def test_few_classes_get_a_lower_rate_unless_one_is_given():
    assert [
        resolve_learning_rate(TrainConfig(), classes).learning_rate for classes in (2, 99, 100)
    ] == [1e-3, 1e-3, 1e-2]
    assert resolve_learning_rate(TrainConfig(learning_rate=0.5), 2).learning_rate == 0.5
    assert (
        preset("cifar10").learning_rate == preset("digits").learning_rate == 1e-2
    )  # small images, smaller nets: measured to train


def test_a_schedule_of_ones_own_ends_when_it_says():
    assert (
        preset("digits", schedule="plateau").epochs
        == preset("digits", schedule="constant").epochs
        == 74
    )
    assert preset("digits", schedule="constant", epochs=7).epochs == 7


@pytest.mark.parametrize(
    ("data", "given", "words"),
    [
        ("digits", {"patience": 3}, "patience is 3, and schedule is 'step': expected 'plateau'"),
        ("cifar10", {"drop_epochs": [3]}, "drop_epochs"),
        (
            "cifar10",
            {"initializer_std": 0.1},
            "initializer_std is 0.1, and initializer is 'glorot': expected 'paper'",
        ),
    ],
)
def test_a_value_without_effect_is_refused(data, given, words):
    with pytest.raises(InputError, match=words):
        preset(data, **given)
