"""Sums over examples of loss and right answers: added over batches, divided once."""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array


@flax.struct.dataclass
class MetricSums:
    """Over the examples that count: their loss (nats), how many were right among the first 1 and 5 guesses, their number."""

    loss: Any = 0.0
    top1: Any = 0.0
    top5: Any = 0.0
    count: Any = 0.0


def compute_sums(logits: Array, labels: Array, mask: Array) -> MetricSums:
    """Sums over the rows of logits (N, K) with labels (N,) where mask (N,) is true.

    Of equal logits the lower class is the earlier guess, as in a stable sort, and NaN is never right.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    mask = mask.astype(logits.dtype)
    of_label = jnp.take_along_axis(logits, labels[:, None], axis=1)
    classes = jnp.arange(logits.shape[1])[None]
    earlier = ~(logits <= of_label) | ((logits == of_label) & (classes < labels[:, None]))
    rank = earlier.sum(axis=1)
    loss = jax.nn.logsumexp(logits, axis=1) - of_label[:, 0]
    # An example that does not count may hold anything, NaN included.
    return MetricSums(
        jnp.where(mask > 0, loss, 0).sum(), mask @ (rank < 1), mask @ (rank < 5), mask.sum()
    )


def merge(a: MetricSums, b: MetricSums) -> MetricSums:
    return jax.tree.map(lambda x, y: x + y, a, b)


def finalize(sums: MetricSums) -> dict[str, float]:
    """Loss in nats, errors in [0, 1] and the number of examples that they are over."""
    n = float(sums.count)
    return {
        "loss": sums.loss / n,
        "top1_error": 1 - sums.top1 / n,
        "top5_error": 1 - sums.top5 / n,
        "count": int(n),
    }


def wilson_interval(error: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % confidence interval of an error rate that was observed on `count` examples."""
    z = 1.959964
    middle = (error + z * z / (2 * count)) / (1 + z * z / count)
    reach = (
        z / (1 + z * z / count) * math.sqrt(error * (1 - error) / count + (z / (2 * count)) ** 2)
    )
    return max(0.0, middle - reach), min(1.0, middle + reach)
