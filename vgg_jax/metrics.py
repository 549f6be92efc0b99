"""Sums of loss and correct predictions over examples: added over batches, divided once."""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array


@flax.struct.dataclass
class MetricSums:
    """Sums over the examples whose mask is true. The fields are arrays or Python numbers."""

    loss: Any = 0.0  # cross-entropy, in nats
    top1: Any = 0.0  # examples whose label is the first guess
    top5: Any = 0.0  # examples whose label is among the first five guesses
    count: Any = 0.0  # examples


def compute_sums(logits: Array, labels: Array, mask: Array) -> MetricSums:
    """Sums loss and correct predictions over the examples whose mask is true.

    Among equal logits, the lower class is the earlier guess, as in a stable sort. NaN is never
    correct.

    Args:
        logits: float (N, K).
        labels: int (N,).
        mask: bool (N,).

    Returns:
        Scalar sums in the dtype of the logits, at least float32.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    mask = mask.astype(logits.dtype)
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=1)
    classes = jnp.arange(logits.shape[1])[None]
    is_earlier_guess = ~(logits <= label_logits) | (
        (logits == label_logits) & (classes < labels[:, None])
    )
    rank = is_earlier_guess.sum(axis=1)
    loss = jax.nn.logsumexp(logits, axis=1) - label_logits[:, 0]
    # A padding example (mask False) may hold NaN, and 0 · NaN is NaN.
    return MetricSums(
        jnp.where(mask > 0, loss, 0).sum(), mask @ (rank < 1), mask @ (rank < 5), mask.sum()
    )


def merge(a: MetricSums, b: MetricSums) -> MetricSums:
    """Adds two sums."""
    return jax.tree.map(lambda x, y: x + y, a, b)


def finalize(sums: MetricSums) -> dict[str, float]:
    """Divides the sums by the number of examples.

    Args:
        sums: Sums over at least one example.

    Returns:
        "loss" in nats, "top1_error" and "top5_error" in [0, 1], and the "count" of examples.
    """
    n = float(sums.count)
    return {
        "loss": sums.loss / n,
        "top1_error": 1 - sums.top1 / n,
        "top5_error": 1 - sums.top5 / n,
        "count": int(n),
    }


def wilson_interval(error: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of an error rate.

    Args:
        error: Observed error rate, in [0, 1].
        count: Number of examples.

    Returns:
        Lower and upper bound, in [0, 1].
    """
    z = 1.959964
    centre = (error + z * z / (2 * count)) / (1 + z * z / count)
    radius = (
        z / (1 + z * z / count) * math.sqrt(error * (1 - error) / count + (z / (2 * count)) ** 2)
    )
    return max(0.0, centre - radius), min(1.0, centre + radius)
