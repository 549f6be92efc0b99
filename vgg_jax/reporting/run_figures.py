"""Figures of runs: curves, the use of time, and the confusion matrix."""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vgg_jax.errors import InputError
from vgg_jax.evaluation.evaluate import Evaluation, load_evaluation
from vgg_jax.reporting.classes import confusion_matrix
from vgg_jax.reporting.history import RunHistory, read_run, time_shares
from vgg_jax.reporting.output import displayable
from vgg_jax.reporting.style import COLOURS, GRID, INK, figure_style, new_figure
from vgg_jax.reporting.text import drawable, shorten_to_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = (3.7, 2.7)  # inches: as wide as a phone
MAX_ANNOTATED, MAX_NAMED = 10, 40  # classes of a confusion matrix with counts, and with names
MAX_CELLS = 250  # along a side of a drawn confusion matrix
MAX_NAME = 16  # width of a name beside an axis
CUT_OFF = 3  # a loss is drawn up to so many times that of guessing, the logarithm of the classes
TIME_COLOURS = (COLOURS[0], COLOURS[1], COLOURS[5])


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
    if not paths:
        raise InputError("there is no run: expected the folder of one, or several")
    histories = [read_run(path) for path in paths]
    return displayable(plot_curves(histories, shown_quantities(histories)))


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
    matrix = confusion_matrix(evaluation)
    return displayable(plot_confusion(matrix, evaluation.classes.tolist()))


def shown_quantities(runs: Sequence[RunHistory]) -> list[Quantity]:
    """The quantities that have a curve. With five classes or fewer, the top-5 error is 0."""
    has_top5 = any(len(run.run.classes) > 5 for run in runs)
    return [quantity for quantity in QUANTITIES if has_top5 or quantity.key != "top5_error"]


def run_colours(count: int) -> list[str]:
    """A colour for each run. With more than eight runs, they repeat."""
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


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

    lines, labels = [], []
    for run, colour in zip(runs, run_colours(len(runs)), strict=True):
        if not run.records or (quantity.key == "top5_error" and len(run.run.classes) <= 5):
            continue
        epochs = [record["epoch"] for record in run.records]
        style: Any = {"color": colour, "marker": "o" if len(epochs) <= 12 else "", "markersize": 3}
        values = {
            split: [record[split][quantity.key] for record in run.records]
            for split in ("validation", "train")
        }
        lines += axes.plot(epochs, values["validation"], "-", linewidth=1.6, **style)
        training = axes.plot(epochs, values["train"], "--", linewidth=1.1, **style)
        labels.append("validation" if len(runs) == 1 else shorten_to_width(run.name, MAX_NAME))
        if len(runs) == 1:
            lines, labels = lines + training, [*labels, "training"]
        best = run.best
        axes.plot(best["epoch"], best["validation"][quantity.key], "*", color=colour, markersize=9)
        _mark_changes(axes, run, None if len(runs) == 1 else colour)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if quantity.is_share:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_title(quantity.title + _limit_y(axes, runs, quantity))
    if lines:
        axes.legend(lines, labels)
    else:
        axes.text(0.5, 0.5, "no finished epoch", transform=axes.transAxes, ha="center")


def _mark_changes(axes: "Axes", run: RunHistory, colour: str | None) -> None:
    """Marks the changes of the learning rate. Without a colour, each has the new rate."""
    for epoch, rate in run.rate_changes:
        axes.axvline(epoch + 0.5, color=colour or INK, linestyle=":", linewidth=0.8)
        if colour is None:
            axes.annotate(
                f"{rate:g}",
                (epoch + 0.5, 1),
                xycoords=("data", "axes fraction"),
                fontsize=6.5,
                rotation=90,
                ha="right",
                va="top",
            )


def _limit_y(axes: "Axes", runs: Sequence[RunHistory], quantity: Quantity) -> str:
    """Limits the vertical axis, and marks the loss of guessing. Returns a note for the title."""
    top = axes.get_ylim()[1] * 1.04
    guessing = max(math.log(len(run.run.classes)) for run in runs)
    if quantity.is_share or guessing == 0 or not any(run.records for run in runs):
        axes.set_ylim(0, top)
        return ""
    axes.set_ylim(0, min(top, CUT_OFF * guessing))
    if guessing < top:
        axes.axhline(guessing, color=COLOURS[5], linestyle="-.", linewidth=0.8)
        axes.annotate(
            "guessing", (0, guessing), xycoords=("axes fraction", "data"), fontsize=6.5, va="bottom"
        )
    return f", cut off at {CUT_OFF * guessing:.2g}" if top > CUT_OFF * guessing else ""


def plot_time(run: RunHistory) -> "Figure":
    """Draws the parts of a run's time as a bar.

    Args:
        run: The run. It has a finished epoch.

    Returns:
        The figure.
    """
    shares = time_shares(run.records)
    total, left = max(sum(shares.values()), 1e-9), 0.0
    with figure_style():
        figure = new_figure(PANEL[0], 1.5)
        axes = figure.subplots()
        for (part, seconds), colour in zip(shares.items(), TIME_COLOURS, strict=False):
            share = seconds / total
            axes.barh(0, share, left=left, color=colour, label=f"{part}: {share:.0%}")
            left += share
        axes.set_xlim(0, 1)
        axes.set_axis_off()
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
    pooled, block = _pool(shares, MAX_CELLS)
    with figure_style():
        side = float(np.clip(1.3 + 0.24 * num_classes, PANEL[0], 5.6))
        figure = new_figure(side, side * 0.92)
        axes = figure.subplots()
        end = len(pooled) * block - 0.5
        extent = (-0.5, end, end, -0.5)
        image = axes.imshow(pooled, cmap="Blues", vmin=0, vmax=1, extent=extent, aspect="equal")
        axes.set_xlim(-0.5, num_classes - 0.5)
        axes.set_ylim(num_classes - 0.5, -0.5)
        axes.grid(False)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        if num_classes <= MAX_NAMED:
            _name_ticks(axes, classes)
        if num_classes <= MAX_ANNOTATED:
            for i, j in np.ndindex(matrix.shape):
                if matrix[i, j]:
                    colour = "white" if shares[i, j] > 0.55 else "#10243c"
                    axes.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", color=colour)
        else:
            bar = figure.colorbar(image, shrink=0.7, label="share of the true class")
            bar.outline.set_edgecolor(GRID)
    return figure


def _name_ticks(axes: "Axes", classes: Sequence[str]) -> None:
    """Writes the names of the classes beside both axes."""
    names = [drawable(shorten_to_width(str(name), MAX_NAME)) for name in classes]
    texts = [text for text, _ in names]
    rotation = 0 if max(map(len, texts)) <= 2 else 90
    axes.set_xticks(range(len(classes)), texts, rotation=rotation)
    axes.set_yticks(range(len(classes)), texts)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        for label, (_, families) in zip(labels, names, strict=True):
            label.set_fontfamily(families)


def _pool(values: np.ndarray, max_side: int) -> tuple[np.ndarray, int]:
    """The maxima of square blocks, so that no cell is lost; and the side of a block."""
    size = -(-len(values) // max_side)
    pad = -len(values) % size
    side = (len(values) + pad) // size
    padded = np.pad(values, ((0, pad), (0, pad)))
    return padded.reshape(side, size, side, size).max((1, 3)), size
