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

    `label_ranks` says which guesses are correct. NaN never is.

    Args:
        logits: float (N, K).
        labels: int (N,).
        mask: bool (N,).

    Returns:
        Scalar sums in the dtype of the logits, at least float32.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    mask = mask.astype(logits.dtype)
    loss = cross_entropies(logits, labels)
    rank = label_ranks(logits, labels)
    # A padding example (mask False) may hold NaN, and 0 · NaN is NaN.
    return MetricSums(
        jnp.where(mask > 0, loss, 0).sum(), mask @ (rank < 1), mask @ (rank < 5), mask.sum()
    )


def cross_entropies(logits: Array, labels: Array) -> Array:
    """Computes the cross-entropy of each example, in nats.

    Args:
        logits: float (N, K).
        labels: int (N,).

    Returns:
        float (N,), in the dtype of the logits, at least float32.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return jax.nn.logsumexp(logits, axis=1) - _of_labels(logits, labels)


def is_loss_of_guessing(loss: float, num_classes: int) -> bool:
    """Tells if a cross-entropy is within 1 % of that of guessing, the logarithm of the classes.

    Args:
        loss: Cross-entropy, in nats.
        num_classes: Number of classes. With one class, there is nothing to guess.

    Returns:
        True if the loss is that of guessing.
    """
    guessing = math.log(num_classes)
    return abs(loss - guessing) < 0.01 * guessing


def label_ranks(scores: Array, labels: Array) -> Array:
    """Computes the rank of each example's label among its classes, 0 for the first guess.

    Among equal scores, the lower class is the earlier guess, as in a stable sort.

    Args:
        scores: float (N, K), such as logits or posteriors.
        labels: int (N,).

    Returns:
        int (N,). The rank of a label whose score is NaN is a large number, for any K.
    """
    label_scores = _of_labels(scores, labels)[:, None]
    classes = jnp.arange(scores.shape[1])[None]
    is_earlier_guess = ~(scores <= label_scores) | (
        (scores == label_scores) & (classes < labels[:, None])
    )
    is_nan = jnp.isnan(label_scores[:, 0])
    return jnp.where(is_nan, jnp.iinfo(jnp.int32).max, is_earlier_guess.sum(axis=1))


def _of_labels(scores: Array, labels: Array) -> Array:
    return jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0]


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
