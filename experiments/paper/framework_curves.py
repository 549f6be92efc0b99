"""Curves of the same training in vgg_jax and in PyTorch: their lines, differences and figures.

A run is {"framework": "jax" or "torch", "seed", "epochs"}. An epoch has "seconds" and `QUANTITIES`.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from vgg_jax.reporting.style import COLOURS, figure_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRAMEWORKS = ("jax", "torch")
QUANTITIES = ("train_loss", "valid_loss", "train_accuracy", "valid_accuracy")


def means(sums: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean "loss" and the "accuracy", from the sums "loss", "correct" and "count" of steps."""
    count = sums["count"].sum()
    return {
        "loss": float(sums["loss"].sum() / count),
        "accuracy": float(sums["correct"].sum() / count),
    }


def epoch_line(name: str, number: int, entry: dict[str, float]) -> str:
    """Time, epoch, losses and accuracies of an epoch."""
    values = ", ".join(f"{key.replace('_', ' ')} {entry[key]:.4f}" for key in QUANTITIES)
    return f"{name}: time {entry['seconds']:.1f} s, epoch {number}, {values}"


def compare(runs: list[dict]) -> list[dict[str, Any]] | None:
    """Compares the two frameworks, for each epoch and quantity.

    Args:
        runs: Those of one data set and optimizer.

    Returns:
        For each epoch and quantity the means over the seeds, their "difference" (ours minus
        PyTorch's), the pooled "deviation" of a run over the seeds, and the "limit": Student's 95 %
        quantile for the difference of two such means. "within_noise" tells if the difference is at
        most the limit. With one seed, the last three are None. None without runs of both.
    """
    from scipy import stats  # scikit-learn brings it

    curves = {(run["framework"], run["seed"]): run["epochs"] for run in runs}
    seeds = [seed for name, seed in curves if name == "jax" and ("torch", seed) in curves]
    if not seeds:
        return None
    rows, count = [], len(seeds)
    for epoch in range(len(curves["jax", seeds[0]])):
        row: dict[str, Any] = {"epoch": epoch + 1, "seeds": sorted(seeds)}
        for quantity in QUANTITIES:
            values = np.array(
                [[curves[name, seed][epoch][quantity] for seed in seeds] for name in FRAMEWORKS]
            )
            ours, theirs = values.mean(1).tolist()
            cell: dict[str, Any] = {"jax": ours, "torch": theirs, "difference": ours - theirs}
            cell |= dict.fromkeys(("deviation", "limit", "within_noise"))
            if count > 1:
                deviation = float(np.sqrt(values.var(1, ddof=1).mean()))
                limit = float(stats.t.ppf(0.975, 2 * count - 2)) * deviation * (2 / count) ** 0.5
                within = abs(ours - theirs) <= limit
                cell |= {"deviation": deviation, "limit": limit, "within_noise": within}
            row[quantity] = cell
        rows.append(row)
    return rows


def plot(runs: list[dict], kind: str) -> "Figure":
    """Curves of "loss" or "accuracy" of all runs: a colour for each framework."""
    with figure_style():
        figure = new_figure(5, 3.2)
        axes = figure.subplots()
        labelled = set()
        for entry in runs:
            for split, line in (("train", "--"), ("valid", "-")):
                values = [epoch[f"{split}_{kind}"] for epoch in entry["epochs"]]
                label = f"{entry['framework']}, {split}"
                axes.plot(
                    range(1, len(values) + 1),
                    values,
                    line,
                    marker=".",
                    alpha=0.8,
                    color=COLOURS[FRAMEWORKS.index(entry["framework"])],
                    label=None if label in labelled else label,
                )
                labelled.add(label)
        axes.set(xlabel="epoch", ylabel=kind)
        axes.legend()
    return figure
