"""Figures and reports of runs and of data, which need the extra `report`.

The functions return matplotlib figures, which a notebook shows and `figure.savefig` writes.
"""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vgg_jax.evaluation.evaluate import Evaluation

__all__ = ["confusion", "curves"]


def curves(runs: str | os.PathLike | Sequence[str | os.PathLike]) -> "Figure":
    """Draws loss and errors of runs over their epochs.

    Args:
        runs: The folder of a run, or several.

    Returns:
        The figure. Validation is a solid line, training a dashed one. A star marks the epoch with
        the best validation accuracy, and a dotted line each change of the learning rate.

    Raises:
        InputError: There is no run in a folder, or matplotlib is not installed.
    """
    from vgg_jax.reporting.history import read_run
    from vgg_jax.reporting.run_figures import plot_curves, shown_quantities

    paths = [runs] if isinstance(runs, (str, os.PathLike)) else runs
    histories = [read_run(path) for path in paths]
    return plot_curves(histories, shown_quantities(histories))


def confusion(evaluation: "str | os.PathLike | Evaluation") -> "Figure":
    """Draws the confusion matrix of an evaluation.

    Args:
        evaluation: The posteriors.npz that `vgg-jax evaluate` wrote, its folder, the folder of a
            run with one evaluation, or an `Evaluation`.

    Returns:
        The figure. The colour of a cell is its share of the images of its true class.

    Raises:
        InputError: There is no evaluation, or matplotlib is not installed.
    """
    from vgg_jax.evaluation.evaluate import Evaluation, load_evaluation
    from vgg_jax.reporting.classes import confusion_matrix
    from vgg_jax.reporting.run_figures import plot_confusion

    if not isinstance(evaluation, Evaluation):
        evaluation = load_evaluation(evaluation)
    return plot_confusion(confusion_matrix(evaluation), evaluation.classes.tolist())
