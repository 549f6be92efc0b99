"""What a run says of itself: a record and a line an epoch, and the remedies when it does not learn."""

import math
import time
from typing import Any

from vgg_jax.metrics import MetricSums, finalize

INPUT_BOUND_SHARE = 0.2  # of the time; less is the start of the stream and chance


def epoch_record(
    epoch: int,
    seconds: float,
    waited: float,
    rate: float,
    sums: MetricSums,
    validated: MetricSums,
    size: int,
) -> dict[str, Any]:
    """What metrics.jsonl says of an epoch. Training loss and errors are those of the steps, dropout and distortions on.

    `waited` are the seconds of `seconds` in which the next batch was not there yet. Each part has the `count` of images that it is over.
    """
    parts = {"train": finalize(sums), "validation": finalize(validated)}
    parts = {
        name: values | {"accuracy": 1 - values["top1_error"]} for name, values in parts.items()
    }
    return {
        "epoch": epoch,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "seconds": round(seconds, 3),
        "images_per_second": round(size / seconds, 1),
        "input_wait_seconds": round(waited, 3),
        "learning_rate": rate,
    } | parts


def format_epoch(record: dict[str, Any]) -> str:
    train, validation = record["train"], record["validation"]
    return (
        f"{record['time'][11:]}  epoch {record['epoch']:3d}  train loss {train['loss']:.4f} accuracy {train['accuracy']:.2%}  "
        f"validation loss {validation['loss']:.4f} accuracy {validation['accuracy']:.2%}  "
        f"rate {record['learning_rate']:g}  {record['seconds']:.1f} s  {record['images_per_second']:.1f} images/s, "
        f"{bottleneck(record['input_wait_seconds'] / record['seconds'])}"
    )


def bottleneck(share: float) -> str:
    """Whether the device or the input bounds the rate, from the share of the time in which the next batch was not there yet.

    The host prepares a batch while the device computes one. Where the device is slower the batch is there when it is asked for.
    """
    return f"bound by the {'input' if share > INPUT_BOUND_SHARE else 'device'} (waited {share:.0%} for images)"


def is_at_chance(history: list[dict[str, Any]], classes: int) -> bool:
    """Whether the second epoch in a row, but not the third, ends at the loss of guessing."""
    at_chance = [
        abs(record["train"]["loss"] - math.log(classes)) < 0.01 * math.log(classes)
        for record in history
    ]
    return classes > 1 and at_chance[-2:] == [True, True] and at_chance[-3:] != [True] * 3


def at_chance_hint(classes: int) -> str:
    return (
        f"the training loss stays at ln({classes}) = {math.log(classes):.3f}, the loss of guessing: the signal dies out on its way through "
        f"the net; deeper nets need --init-from a trained A, --batch-norm or another --learning-rate, and --initializer glorot"
    )


def divergence_hint(rate: float) -> str:
    return (
        f"pass --on-nan halve to go on from what was saved last, or --learning-rate {rate / 10:g}, --initializer glorot or --batch-norm "
        "with a new --workdir if this one holds a checkpoint; --debug-nans names the layer"
    )
