"""The tables of a report: results, settings, and the comparison of several runs."""

import math
import os
from collections.abc import Sequence

from vgg_jax.configs.train import TrainConfig
from vgg_jax.evaluation.evaluate import Evaluation
from vgg_jax.reporting.classes import ClassFigures
from vgg_jax.reporting.collect import RunReport
from vgg_jax.reporting.history import RunHistory
from vgg_jax.runs.metadata import settings

NONE = "–"  # a value that there is not


def compare(reports: Sequence[RunReport]) -> list[tuple[str, list[str]]]:
    """Lists what several runs reached, and the settings that differ.

    Args:
        reports: The runs.

    Returns:
        Rows: a name, and a value for each run.
    """
    columns = [results(report) for report in reports]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name, NONE) for column in columns]) for name in names]
    configurations = [settings(report.history.run.config) for report in reports]
    for fields in zip(*configurations, strict=True):
        values = [text for _, text, _ in fields]
        if len(set(values)) > 1:
            rows.append((fields[0][0], values))
    return rows


def results(report: RunReport) -> dict[str, str]:
    """The results of a run, as texts by name.

    Args:
        report: The run.

    Returns:
        The figures of the best epoch, the time, and the size of the data and of the net.
    """
    history, run = report.history, report.history.run
    has_top5 = len(run.classes) > 5
    names = ["accuracy, centre crops", "validation loss", "best epoch"]
    if has_top5:
        names.insert(1, "top-5 accuracy, centre crops")
    rows = dict.fromkeys(names, NONE)
    rows |= {
        "finished epochs": str(len(history.records)),
        "training time": NONE,
        "images per second": NONE,
        "classes": f"{len(run.classes):,}",
        "training images": f"{run.train_size:,}",
        "validation images": f"{run.validation_size:,}",
        "parameters": f"{sum(layer.params for layer in report.layers):,}",
        "multiply-adds per image": short_number(sum(layer.macs for layer in report.layers)),
    }
    if history.records:
        best = history.best
        speeds = sorted(record["images_per_second"] for record in history.records)
        seconds = sum(record["seconds"] for record in history.records)
        rows |= {
            "accuracy, centre crops": f"{best['validation']['accuracy']:.2%}",
            "validation loss": f"{best['validation']['loss']:.4f}",
            "best epoch": str(best["epoch"]),
            "training time": format_seconds(seconds),
            "images per second": f"{speeds[len(speeds) // 2]:,.1f}",
        }
        if has_top5:
            rows["top-5 accuracy, centre crops"] = f"{1 - best['validation']['top5_error']:.2%}"
    return rows


def summarize_run(history: RunHistory) -> str:
    """Says in a line what a run is: net, data, images, start, learning rate and date."""
    config = history.run.config
    net = f"Net {config.net}" + (" with batch normalisation" if config.batch_norm else "")
    name = os.path.basename(config.data.rstrip("/")) or config.data
    scale = " to ".join(map(str, sorted({*config.scale})))
    start = "from random parameters"
    if config.init_from is not None:
        start = f"from {os.path.basename(config.init_from.rstrip('/'))}"
    if config.freeze:
        start += f" (frozen: {' '.join(config.freeze)})"
    parts = [
        f"{net} on {name}",
        f"{config.image_size}-pixel crops at S = {scale}",
        start,
        _describe_learning_rate(config),
    ]
    if history.records:
        parts.append(history.records[-1]["time"].partition("T")[0])
    return ", ".join(parts) + "."


def _describe_learning_rate(config: TrainConfig) -> str:
    optimizer = "AdamW at " if config.optimizer == "adamw" else ""
    schedule = " with a cosine schedule" if config.schedule == "cosine" else ""
    return f"{optimizer}learning rate {config.learning_rate:g}{schedule}"


def format_accuracy(evaluation: Evaluation) -> str:
    """The accuracy of an evaluation and its 95 % interval, as "94.8% (90.0% to 97.3%)"."""
    errors = evaluation.errors()
    low, high = errors["top1_error_interval"]
    return f"{1 - errors['top1_error']:.2%} ({1 - high:.2%} to {1 - low:.2%})"


def worst_first(classes: Sequence[ClassFigures]) -> list[ClassFigures]:
    """Sorts classes by F1. A class without images and predictions has none, and comes last."""
    return sorted(classes, key=lambda row: 2 if math.isnan(row.f1) else row.f1)


def percent(value: float) -> str:
    """A share as "12.3%". NaN is a dash."""
    return NONE if math.isnan(value) else f"{value:.1%}"


def short_number(value: float) -> str:
    """A number with three digits or more and a unit, such as "15.47 G"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= 0.9995 * size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,.0f}"


def format_seconds(seconds: float) -> str:
    """A duration to the second, such as "4 min 38 s", or "2 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
