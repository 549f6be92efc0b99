"""Figures of runs: curves, the use of time, and the confusion matrix."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vgg_jax.evaluation.evaluate import Evaluation, load_evaluation
from vgg_jax.reporting.classes import confusion_matrix
from vgg_jax.reporting.history import RunHistory, read_run, time_shares
from vgg_jax.reporting.style import COLOURS, GRID, INK, figure_style, new_figure
from vgg_jax.reporting.text import shorten_to_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (3.7, 2.7)  # inches: as wide as a phone
MAX_ANNOTATED, MAX_NAMED = 10, 40  # classes of a confusion matrix with counts, and with names
MAX_CELLS = 250  # along a side of a drawn confusion matrix
MAX_NAME = 16  # characters of a class name beside an axis


class Quantity(NamedTuple):
    """A quantity of metrics.jsonl that has a curve."""

    key: str
    title: str
    is_share: bool


QUANTITIES = (
    Quantity("loss", "loss (cross-entropy)", False),
    Quantity("top1_error", "top-1 error", True),
    Quantity("top5_error", "top-5 error", True),
)


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
    paths = [runs] if isinstance(runs, (str, os.PathLike)) else runs
    histories = [read_run(path) for path in paths]
    return plot_curves(histories, shown_quantities(histories))


def confusion(evaluation: str | os.PathLike | Evaluation) -> "Figure":
    """Draws the confusion matrix of an evaluation.

    Args:
        evaluation: The posteriors.npz that `vgg-jax evaluate` wrote, its folder, the folder of a
            run with one evaluation, or an `Evaluation`.

    Returns:
        The figure. The colour of a cell is its share of the images of its true class.

    Raises:
        InputError: There is no evaluation, or matplotlib is not installed.
    """
    if not isinstance(evaluation, Evaluation):
        evaluation = load_evaluation(evaluation)
    return plot_confusion(confusion_matrix(evaluation), evaluation.classes.tolist())


def shown_quantities(runs: Sequence[RunHistory]) -> list[Quantity]:
    """The quantities that have a curve. With five classes or fewer, the top-5 error is 0."""
    has_top5 = any(len(run.run.classes) > 5 for run in runs)
    return [quantity for quantity in QUANTITIES if has_top5 or quantity.key != "top5_error"]


def plot_curves(runs: Sequence[RunHistory], quantities: Sequence[Quantity]) -> "Figure":
    """Draws quantities of runs over their epochs, a panel for each.

    Args:
        runs: The runs. Those without a finished epoch have no line.
        quantities: What to draw.

    Returns:
        The figure. Validation is a solid line, training a dashed one. A star marks the epoch with
        the best validation accuracy, and a dotted line each change of the learning rate.
    """
    with figure_style():
        figure = new_figure(PANEL[0] * len(quantities), PANEL[1])
        panels = figure.subplots(1, len(quantities), squeeze=False)[0]
        for axes, quantity in zip(panels, quantities, strict=True):
            _plot_quantity(axes, runs, quantity)
    return figure


def _plot_quantity(axes: "Axes", runs: Sequence[RunHistory], quantity: Quantity) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for number, run in enumerate(run for run in runs if run.records):
        colour = COLOURS[number % len(COLOURS)]
        epochs = [record["epoch"] for record in run.records]
        marker = "o" if len(epochs) <= 12 else ""
        for split, line in (("validation", "-"), ("train", "--")):
            values = [record[split][quantity.key] for record in run.records]
            label = {"validation": run.name, "train": ""}[split]
            if len(runs) == 1:
                label = {"validation": "validation", "train": "training"}[split]
            axes.plot(
                epochs,
                values,
                line,
                color=colour,
                label=label or "_",
                marker=marker,
                markersize=3,
                linewidth=1.6 if split == "validation" else 1.1,
            )
        best = run.best
        axes.plot(best["epoch"], best["validation"][quantity.key], "*", color=colour, markersize=9)
        for epoch, rate in run.drops:
            axes.axvline(epoch + 0.5, color=INK if len(runs) == 1 else colour, ls=":", lw=0.8)
            if len(runs) == 1:
                axes.annotate(
                    f"{rate:.0e}".replace("e-0", "e-"),
                    (epoch + 0.5, 1),
                    xycoords=("data", "axes fraction"),
                    fontsize=6.5,
                    rotation=90,
                    ha="right",
                    va="top",
                )
    axes.set_title(quantity.title)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    if quantity.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no finished epoch", transform=axes.transAxes, ha="center")


def plot_time(runs: Sequence[RunHistory]) -> "Figure":
    """Draws the parts of each run's time as a bar.

    Args:
        runs: The runs.

    Returns:
        The figure.
    """
    with_epochs = [run for run in runs if run.records]
    with figure_style():
        figure = new_figure(PANEL[0], 1.3 + 0.45 * len(with_epochs))
        axes = figure.subplots()
        colours = (COLOURS[0], COLOURS[1], COLOURS[5])
        for row, run in enumerate(with_epochs):
            shares = time_shares(run.records)
            total, left = max(sum(shares.values()), 1e-9), 0.0
            for (part, seconds), colour in zip(shares.items(), colours, strict=True):
                share = seconds / total
                axes.barh(row, share, left=left, color=colour, label=part if not row else "_")
                if share > 0.08:
                    axes.text(left + share / 2, row, f"{share:.0%}", ha="center", va="center")
                left += share
        axes.set_yticks(
            range(len(with_epochs)), [shorten_to_width(run.name, MAX_NAME) for run in with_epochs]
        )
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.grid(False)
        axes.spines[:].set_visible(False)
        figure.legend(loc="outside lower center", ncols=1)
    return figure


def plot_confusion(matrix: np.ndarray, classes: Sequence[str]) -> "Figure":
    """Draws a confusion matrix.

    Args:
        matrix: Images of each true class (rows) and predicted class (columns), int (K, K).
        classes: Names of the K classes.

    Returns:
        The figure. The colour of a cell is its share of the images of its row.
    """
    num_classes = len(classes)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    with figure_style():
        side = float(np.clip(1.3 + 0.24 * num_classes, PANEL[0], 5.6))
        figure = new_figure(side, side * 0.92)
        axes = figure.subplots()
        extent = (-0.5, num_classes - 0.5, num_classes - 0.5, -0.5)
        image = axes.imshow(
            _pool(shares, MAX_CELLS), cmap="Blues", vmin=0, vmax=1, extent=extent, aspect="equal"
        )
        axes.grid(False)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        if num_classes <= MAX_NAMED:
            names = [shorten_to_width(str(name), MAX_NAME) for name in classes]
            is_short = max(map(len, names)) <= 2
            axes.set_xticks(range(num_classes), names, rotation=0 if is_short else 90)
            axes.set_yticks(range(num_classes), names)
        if num_classes <= MAX_ANNOTATED:
            for i, j in np.ndindex(matrix.shape):
                if matrix[i, j]:
                    colour = "white" if shares[i, j] > 0.55 else "#10243c"
                    axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", color=colour)
        else:
            bar = figure.colorbar(image, shrink=0.7, label="share of the true class")
            bar.outline.set_edgecolor(GRID)
    return figure


def _pool(values: np.ndarray, max_side: int) -> np.ndarray:
    """The maxima of square blocks, so that no cell is lost where there are more than pixels."""
    size = -(-len(values) // max_side)
    pad = -len(values) % size
    side = (len(values) + pad) // size
    padded = np.pad(values, ((0, pad), (0, pad)))
    return padded.reshape(side, size, side, size).max((1, 3))
