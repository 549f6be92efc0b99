"""Sums of losses and correct guesses, against a loop."""

import jax.numpy as jnp
import numpy as np
import pytest

from vgg_jax.metrics import MetricSums, compute_sums, finalize, label_ranks, merge


def test_compute_sums_equals_loop():
    rng = np.random.default_rng(0)
    logits, labels, mask = (
        rng.normal(size=(50, 12)),
        rng.integers(12, size=50),
        rng.random(50) < 0.7,
    )
    loss = top1 = top5 = 0
    for row, label, counts in zip(logits, labels, mask, strict=True):
        if counts:
            guesses = np.argsort(-row)
            loss -= np.log(np.exp(row[label]) / np.exp(row).sum())
            top1 += label == guesses[0]
            top5 += label in guesses[:5]
    sums = compute_sums(jnp.float32(logits), jnp.int32(labels), jnp.array(mask))
    assert float(sums.loss) == pytest.approx(loss, rel=1e-5)
    assert (sums.top1, sums.top5, sums.count) == (top1, top5, mask.sum())


def test_compute_sums_ranks_equal_logits_by_class():
    sums = compute_sums(jnp.zeros((10, 10)), jnp.arange(10), jnp.ones(10, bool))
    assert (sums.top1, sums.top5) == (1, 5)


def test_compute_sums_of_nan():
    logits = jnp.array([[jnp.nan, 0.0], [0.0, 1.0]])
    assert compute_sums(logits, jnp.array([0, 1]), jnp.ones(2, bool)).top1 == 1
    masked = compute_sums(logits, jnp.array([0, 1]), jnp.array([False, True]))
    assert (masked.count, masked.top1) == (1, 1)
    assert jnp.isfinite(masked.loss)


@pytest.mark.parametrize("num_classes", [1, 2, 5, 12])
def test_row_of_nan_is_never_correct(num_classes):
    logits = jnp.full((num_classes, num_classes), jnp.nan)
    sums = compute_sums(logits, jnp.arange(num_classes), jnp.ones(num_classes, bool))
    assert (sums.top1, sums.top5) == (0, 0)


def test_label_ranks_equal_stable_sort():
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 4, (40, 9)).astype(np.float32), rng.integers(0, 9, 40)
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = [list(row).index(label) for row, label in zip(order, labels, strict=True)]
    assert label_ranks(jnp.array(scores), jnp.array(labels)).tolist() == expected


def test_finalize_divides_merged_sums():
    a, b = (
        MetricSums(loss=10.0, top1=1, top5=3, count=4),
        MetricSums(loss=2.0, top1=5, top5=5, count=6),
    )
    assert finalize(merge(a, b)) == {
        "loss": 1.2,
        "top1_error": 0.4,
        "top5_error": pytest.approx(0.2),
        "count": 10,
    }
