"""The record and the log line of an epoch, and hints for a run that does not learn."""

import math
import time
from typing import Any

from vgg_jax.metrics import MetricSums, finalize, is_loss_of_guessing

# A run that waits for input longer than this share of its time is bound by the input. Filling
# the pipeline at the start of an epoch takes less.
INPUT_BOUND_SHARE = 0.2


def epoch_record(
    *,
    epoch: int,
    seconds: float,
    input_wait: float,
    validation_seconds: float,
    lr: float,
    train: MetricSums,
    validation: MetricSums,
    num_images: int,
) -> dict[str, Any]:
    """The record of an epoch, a line of metrics.jsonl.

    Args:
        epoch: Number of the epoch, from 1.
        seconds: Duration of its training.
        input_wait: Seconds of these in which the next batch was not ready.
        validation_seconds: Duration of its validation.
        lr: Learning rate of the last step.
        train: Sums over the steps, with dropout and augmentation on.
        validation: Sums over the validation images.
        num_images: Number of training images.

    Returns:
        A JSON object. "train" and "validation" hold loss, errors, accuracy and the `count` of
        images that these are over.
    """
    sums = {"train": train, "validation": validation}
    averages = {name: finalize(value) for name, value in sums.items()}
    return {
        "epoch": epoch,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "seconds": round(seconds, 3),
        "images_per_second": round(num_images / seconds, 1),
        "input_wait_seconds": round(input_wait, 3),
        "validation_seconds": round(validation_seconds, 3),
        "learning_rate": lr,
    } | {name: values | {"accuracy": 1 - values["top1_error"]} for name, values in averages.items()}


def format_epoch(record: dict[str, Any]) -> str:
    """Formats a record as the line that a run logs after each epoch."""
    train, validation = record["train"], record["validation"]
    return (
        f"{record['time'][11:]}  epoch {record['epoch']:3d}  "
        f"train loss {train['loss']:.4f} accuracy {train['accuracy']:.2%}  "
        f"validation loss {validation['loss']:.4f} accuracy {validation['accuracy']:.2%}  "
        f"learning rate {record['learning_rate']:g}  {record['seconds']:.1f} s  "
        f"{record['images_per_second']:.1f} images/s, "
        f"{bottleneck(record['input_wait_seconds'] / record['seconds'])}"
    )


def bottleneck(input_wait_share: float) -> str:
    """Names the part that limits the speed: the device, or the input.

    The host prepares a batch while the device computes another one. A slower device always finds
    the next batch ready.

    Args:
        input_wait_share: Share of the time in which the next batch was not ready.

    Returns:
        For example "bound by the device (waited 3% for images)".
    """
    slower = "input" if input_wait_share > INPUT_BOUND_SHARE else "device"
    return f"bound by the {slower} (waited {input_wait_share:.0%} for images)"


def is_at_chance(history: list[dict[str, Any]], num_classes: int) -> bool:
    """True after the second epoch in a row with the loss of guessing, and not after the third.

    Args:
        history: Records of the finished epochs.
        num_classes: Number of classes. The loss of guessing is its logarithm.

    Returns:
        True if it is time to show `at_chance_hint`, once in a run.
    """
    at_chance = [is_loss_of_guessing(record["train"]["loss"], num_classes) for record in history]
    return at_chance[-2:] == [True, True] and at_chance[-3:] != [True] * 3


def at_chance_hint(num_classes: int) -> str:
    """Explains a training loss that stays at chance, and names remedies."""
    return (
        f"the training loss stays at ln({num_classes}) = {math.log(num_classes):.3f}, the loss of "
        "guessing: the signal dies out on its way through the net; deeper nets need --init-from "
        "a trained A, --batch-norm or another --learning-rate, and --initializer glorot"
    )


def divergence_hint(lr: float) -> str:
    """Names remedies for a run that diverged at a learning rate."""
    return (
        "pass --on-nan halve to resume from the last save with half the learning rate, or "
        f"--learning-rate {lr / 10:g}, --initializer glorot or --batch-norm with a new --workdir "
        "if this one holds a checkpoint; --debug-nans names the layer"
    )
