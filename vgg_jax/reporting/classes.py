"""Confusion matrix, figures of each class, and the examples worth a look."""

import dataclasses

import numpy as np

from vgg_jax.evaluation.evaluate import Evaluation


@dataclasses.dataclass(frozen=True)
class ClassFigures:
    """The figures of a class. A ratio whose divisor is 0 is NaN."""

    name: str
    count: int  # images of the class
    precision: float
    recall: float
    f1: float


def predicted_classes(evaluation: Evaluation) -> np.ndarray:
    """The most probable class of each image, int (N,). Among equal ones, the first."""
    return evaluation.posteriors.argmax(1)


def confusion_matrix(evaluation: Evaluation) -> np.ndarray:
    """Counts the images of each pair of classes.

    Args:
        evaluation: Posteriors and labels.

    Returns:
        int (K, K). Row i and column j: images of class i that are taken for class j.
    """
    num_classes = evaluation.posteriors.shape[1]
    pairs = evaluation.labels.astype(np.int64) * num_classes + predicted_classes(evaluation)
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_figures(evaluation: Evaluation) -> list[ClassFigures]:
    """Computes precision, recall and F1 of each class.

    Args:
        evaluation: Posteriors and labels.

    Returns:
        The figures, in the order of the classes.
    """
    matrix = confusion_matrix(evaluation)
    hits, counts, predictions = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        precision, recall = hits / predictions, hits / counts
        f1 = 2 * hits / (counts + predictions)
    names = evaluation.classes.tolist()
    columns = (names, counts.tolist(), precision.tolist(), recall.tolist(), f1.tolist())
    return [ClassFigures(*row) for row in zip(*columns, strict=True)]


def most_confused(evaluation: Evaluation, number: int = 10) -> list[tuple[str, str, int]]:
    """Lists the pairs of classes that are confused most often.

    Args:
        evaluation: Posteriors and labels.
        number: Most pairs to list.

    Returns:
        The true class, the predicted class and the number of images, most images first.
    """
    matrix = confusion_matrix(evaluation)
    np.fill_diagonal(matrix, 0)
    order = np.argsort(-matrix, axis=None, kind="stable")[:number]
    names = evaluation.classes.tolist()
    pairs = [divmod(int(place), len(names)) for place in order]
    return [(names[i], names[j], int(matrix[i, j])) for i, j in pairs if matrix[i, j]]


def confident_mistakes(evaluation: Evaluation, number: int) -> list[int]:
    """Positions of the wrong predictions with the largest posterior, largest first."""
    return _ordered(evaluation, number, is_hit=False)


def unsure_hits(evaluation: Evaluation, number: int) -> list[int]:
    """Positions of the correct predictions with the smallest posterior, smallest first."""
    return _ordered(evaluation, number, is_hit=True)


def _ordered(evaluation: Evaluation, number: int, is_hit: bool) -> list[int]:
    confidence = evaluation.posteriors.max(1)
    positions = np.flatnonzero((predicted_classes(evaluation) == evaluation.labels) == is_hit)
    order = np.argsort(confidence[positions] if is_hit else -confidence[positions], kind="stable")
    return positions[order][:number].tolist()
