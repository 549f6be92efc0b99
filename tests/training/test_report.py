"""What a run says of itself."""

import math

from vgg_jax.metrics import Sums
from vgg_jax.training.report import advice, epoch_record, line, stuck


def test_the_line_of_an_epoch_says_it_all():
    record = epoch_record(
        7, 2.0, 0.25, 1e-3, Sums(30.0, 8.0, 9.0, 10.0), Sums(2.0, 3.0, 4.0, 4.0), 10
    )
    text = line(record | {"time": "2020-01-02T03:04:05"})
    for words in (
        "03:04:05",
        "epoch   7",
        "train loss 3.0000 accuracy 80.00%",
        "validation loss 0.5000 accuracy 75.00%",
        "rate 0.001",
    ):
        assert words in text
    assert text.endswith("2.0 s  5.0 images/s, bound by the device (waited 12% for images)")
    assert "bound by the input (waited 60% for images)" in line(
        record | {"input_wait_seconds": 1.2}
    )


def test_loss_at_chance_is_named_once():
    def history(*losses):
        return [{"train": {"loss": loss}} for loss in losses]

    chance = math.log(10)
    assert not stuck(history(chance), 10)
    assert stuck(history(chance, 1.001 * chance), 10)
    assert not stuck(history(chance, chance, chance), 10)
    assert not stuck(history(chance, 0.9 * chance), 10)
    assert "ln(10) = 2.303" in advice(10)
    assert "--init-from" in advice(10)
