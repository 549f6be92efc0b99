"""The line of an epoch, and the hint for a net that does not learn."""

import math

from vgg_jax.metrics import MetricSums
from vgg_jax.training.report import at_chance_hint, epoch_record, format_epoch, is_at_chance


def test_format_epoch():
    record = epoch_record(
        epoch=7,
        seconds=2.0,
        input_wait=0.25,
        validation_seconds=0.5,
        lr=1e-3,
        train=MetricSums(30.0, 8.0, 9.0, 10.0),
        validation=MetricSums(2.0, 3.0, 4.0, 4.0),
        num_images=10,
    )
    text = format_epoch(record | {"time": "2020-01-02T03:04:05"})
    for words in (
        "03:04:05",
        "epoch   7",
        "train loss 3.0000 accuracy 80.00%",
        "validation loss 0.5000 accuracy 75.00%",
        "learning rate 0.001",
    ):
        assert words in text
    assert text.endswith("2.0 s  5.0 images/s, bound by the device (waited 12% for images)")
    assert "bound by the input (waited 60% for images)" in format_epoch(
        record | {"input_wait_seconds": 1.2}
    )


def test_is_at_chance_is_true_once():
    def history(*losses):
        return [{"train": {"loss": loss}} for loss in losses]

    chance = math.log(10)
    assert not is_at_chance(history(chance), 10)
    assert is_at_chance(history(chance, 1.001 * chance), 10)
    assert not is_at_chance(history(chance, chance, chance), 10)
    assert not is_at_chance(history(chance, 0.9 * chance), 10)
    assert "ln(10) = 2.303" in at_chance_hint(10)
    assert "--init-from" in at_chance_hint(10)
