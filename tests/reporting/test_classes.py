"""Confusion matrix and figures of each class equal scikit-learn's."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import precision_recall_fscore_support

from vgg_jax.evaluation.evaluate import Evaluation
from vgg_jax.reporting.classes import (
    class_figures,
    confident_mistakes,
    confusion_matrix,
    most_confused,
    unsure_hits,
)


def random_evaluation(count, num_classes, seed=0):
    """Posteriors and labels. The last class has no image, and the one before no prediction."""
    rng = np.random.default_rng(seed)
    posteriors = rng.dirichlet(np.ones(num_classes), count).astype(np.float32)
    posteriors[:, -2] = 0
    labels = rng.integers(0, num_classes - 1, count).astype(np.int32)
    files = np.array([f"{i}.jpg" for i in range(count)])
    return Evaluation(
        posteriors, labels, files, np.array([f"class {i}" for i in range(num_classes)])
    )


@pytest.mark.parametrize(("count", "num_classes"), [(300, 5), (50, 20), (3000, 1000)])
def test_equals_scikit_learn(count, num_classes):
    evaluation = random_evaluation(count, num_classes)
    predictions, names = evaluation.posteriors.argmax(1), range(num_classes)
    expected = sklearn_confusion(evaluation.labels, predictions, labels=names)
    np.testing.assert_array_equal(confusion_matrix(evaluation), expected)
    columns = precision_recall_fscore_support(
        evaluation.labels, predictions, labels=names, zero_division=np.nan
    )
    figures = class_figures(evaluation)
    for name, column in zip(("precision", "recall", "f1", "count"), columns, strict=True):
        np.testing.assert_allclose([getattr(row, name) for row in figures], column)
    assert [row.name for row in figures] == evaluation.classes.tolist()


def test_most_confused_pairs_come_first():
    posteriors = np.eye(3, dtype=np.float32)[[1, 1, 2, 0, 0]]
    evaluation = Evaluation(
        posteriors, np.array([0, 0, 0, 0, 2]), np.array(list("vwxyz")), np.array(["a", "b", "c"])
    )
    assert most_confused(evaluation) == [("a", "b", 2), ("a", "c", 1), ("c", "a", 1)]
    assert most_confused(evaluation, 1) == [("a", "b", 2)]


def test_examples_are_ordered_by_confidence():
    confidences = [0.9, 0.6, 0.8, 0.7, 0.55]
    posteriors = np.float32([[value, 1 - value] for value in confidences])
    labels = np.array([1, 1, 0, 1, 0])  # the first class is predicted for all
    evaluation = Evaluation(posteriors, labels, np.array(list("abcde")), np.array(["x", "y"]))
    assert confident_mistakes(evaluation, 2) == [0, 3]
    assert unsure_hits(evaluation, 12) == [4, 2]
