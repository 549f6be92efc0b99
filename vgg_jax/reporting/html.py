"""Writes runs as one HTML file that needs no network."""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vgg_jax import __version__
from vgg_jax.configs.presets import resolve_learning_rate
from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError, install_hint, single_line
from vgg_jax.paths import to_path
from vgg_jax.reporting.classes import class_figures, confusion_matrix, most_confused
from vgg_jax.reporting.collect import RunReport, collect
from vgg_jax.reporting.net_figures import plot_activations, plot_filters
from vgg_jax.reporting.output import check_out, require_matplotlib, write_out
from vgg_jax.reporting.pictures import data_url, jpeg_bytes
from vgg_jax.reporting.run_figures import (
    plot_confusion,
    plot_curves,
    plot_time,
    shown_quantities,
)
from vgg_jax.reporting.style import figure_bytes, inline_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report.html")
NONE = "–"  # a value that there is not
MAX_ROWS = 30  # of the per-class table that are shown at first: the classes with the worst F1


def report(
    runs: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    figures: str | os.PathLike | None = None,
    data: str | None = None,
    data_dir: str | None = None,
) -> list[str]:
    """Writes a report of one run, or of several side by side.

    Args:
        runs: Folders of the runs.
        out: The HTML file.
        figures: Folder for the figures as files, which is created if needed.
        data: Where the runs' images are now; None for where they were.
        data_dir: Folder of prepared data sets.

    Returns:
        A sentence for each part that is missing.

    Raises:
        InputError: There is no run in a folder, the report cannot be written, or a package is not
            installed.
    """
    require_matplotlib()
    render = _load_template()
    target = check_out(out, (".html", ".htm"), overwrite=True)
    names = _unique_names(runs)
    reports = []
    for path, name in zip(runs, names, strict=True):
        run_report = collect(path, data, data_dir)
        run_report.history = dataclasses.replace(run_report.history, name=name)
        reports.append(run_report)
    shared, by_run = draw_figures(reports)
    notes = [note for run_report in reports for note in run_report.notes]
    if figures is not None:
        try:
            save_figures(to_path(figures), reports, shared, by_run)
        except OSError as error:
            notes.append(
                f"The figures were not saved in {figures}: {single_line(error)}; pass another "
                "--figures."
            )
    page = render(
        title=", ".join(names),
        version=__version__,
        curves=[inline_svg(figure) for figure in shared.values()],
        comparison=compare(reports) if len(reports) > 1 else [],
        runs=[_context(*item) for item in zip(reports, by_run, strict=True)],
    )
    write_out(target, page.encode())
    return notes


def _load_template() -> Any:
    """Returns the function that renders the page."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise InputError(f"a report needs Jinja2: {install_hint('report')}") from error
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = lambda value: NONE if _is_nan(value) else f"{value:.1%}"
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _unique_names(runs: Sequence[str | os.PathLike]) -> list[str]:
    """Names runs after their folders, or after their paths if two folders have one name."""
    paths = [os.path.normpath(os.fspath(path)) for path in runs]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise InputError(f"{twice} is passed twice: expected different runs")
    names = [os.path.basename(path) for path in paths]
    return names if len(set(names)) == len(names) else paths


def draw_figures(
    reports: Sequence[RunReport],
) -> "tuple[dict[str, Figure], list[dict[str, Figure]]]":
    """Draws all figures of a report.

    Args:
        reports: The runs.

    Returns:
        The curves by name, for all runs together; and for each run its other figures by name.
    """
    histories = [report.history for report in reports]
    shared = {}
    if any(history.records for history in histories):
        for quantity in shown_quantities(histories):
            shared[quantity.key] = plot_curves(histories, [quantity])
    return shared, [_draw_run(report) for report in reports]


def _draw_run(report: RunReport) -> "dict[str, Figure]":
    figures = {}
    if report.history.records:
        figures["time"] = plot_time([report.history])
    if report.evaluation is not None:
        matrix = confusion_matrix(report.evaluation)
        figures["confusion"] = plot_confusion(matrix, report.evaluation.classes.tolist())
    if report.net is not None:
        kernel = np.asarray(report.net.variables["params"]["conv1_1"]["kernel"])
        figures["filters"] = plot_filters(kernel)
    if report.activations:
        figures["activations"] = plot_activations(report.activations)
    return figures


def save_figures(
    folder: Path,
    reports: Sequence[RunReport],
    shared: "dict[str, Figure]",
    by_run: "list[dict[str, Figure]]",
) -> None:
    """Writes the figures as SVG files, and the photos as JPEG files.

    Args:
        folder: The folder, which is created if needed.
        reports: The runs.
        shared: Figures of all runs, by name.
        by_run: Figures of each run, by name.

    Raises:
        OSError: A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in shared.items():
        (folder / f"{name}.svg").write_bytes(figure_bytes(figure, "svg"))
    for report, figures in zip(reports, by_run, strict=True):
        prefix = "" if len(reports) == 1 else report.history.name.replace(os.sep, "-") + "-"
        for name, figure in figures.items():
            (folder / f"{prefix}{name}.svg").write_bytes(figure_bytes(figure, "svg"))
        photos = {
            "mistake": [picture.pixels for picture in report.mistakes],
            "hit": [picture.pixels for picture in report.hits],
            "score-map": [look.score_overlay for look in report.looks],
            "grad-cam": [look.cam_overlay for look in report.looks],
        }
        for name, images in photos.items():
            for number, pixels in enumerate(images, 1):
                (folder / f"{prefix}{name}-{number}.jpg").write_bytes(jpeg_bytes(pixels))


def compare(reports: Sequence[RunReport]) -> list[tuple[str, list[str]]]:
    """Lists what several runs reached, and the settings that differ.

    Args:
        reports: The runs.

    Returns:
        Rows: a name, and a value for each run.
    """
    columns = [_results(report) for report in reports]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, [column.get(name, NONE) for column in columns]) for name in names]
    for field in dataclasses.fields(TrainConfig):
        values = [_format(getattr(report.history.run.config, field.name)) for report in reports]
        if len(set(values)) > 1:
            rows.append((field.name, values))
    return rows


def _results(report: RunReport) -> dict[str, str]:
    """The results of a run, as texts by name."""
    history, run = report.history, report.history.run
    results = dict.fromkeys(("validation accuracy", "validation loss", "best epoch"), NONE)
    if len(run.classes) > 5:
        results = {"validation accuracy": NONE, "validation top-5 accuracy": NONE} | results
    results |= {
        "finished epochs": str(len(history.records)),
        "training time": NONE,
        "images per second": NONE,
        "classes": f"{len(run.classes):,}",
        "training images": f"{run.train_size:,}",
        "validation images": f"{run.validation_size:,}",
        "parameters": f"{sum(layer.params for layer in report.layers):,}",
        "multiply-adds per image": _short_number(sum(layer.macs for layer in report.layers)),
    }
    if history.records:
        best = history.best
        speeds = sorted(record["images_per_second"] for record in history.records)
        seconds = sum(record["seconds"] for record in history.records)
        results |= {
            "validation accuracy": f"{best['validation']['accuracy']:.2%}",
            "validation loss": f"{best['validation']['loss']:.4f}",
            "best epoch": str(best["epoch"]),
            "training time": _duration(seconds),
            "images per second": f"{speeds[len(speeds) // 2]:,.1f}",
        }
        if len(run.classes) > 5:
            top5 = 1 - best["validation"]["top5_error"]
            results["validation top-5 accuracy"] = f"{top5:.2%}"
    return results


def _context(report: RunReport, figures: "dict[str, Figure]") -> dict[str, Any]:
    """The values that the template shows of a run."""
    history, run = report.history, report.history.run
    evaluation = report.evaluation
    classes = class_figures(evaluation) if evaluation is not None else []
    # The worst first. A class without images and predictions has no F1, and comes last.
    ordered = sorted(classes, key=lambda row: 2 if math.isnan(row.f1) else row.f1)
    largest = max((layer.macs for layer in report.layers), default=1) or 1
    return {
        "name": history.name,
        "path": str(history.path),
        "notes": report.notes,
        "results": _results(report),
        "command": run.command,
        "environment": run.environment or {},
        "settings": _settings(run.config),
        "storage": run.storage,
        "svg": {name: inline_svg(figure) for name, figure in figures.items()},
        "has_drops": bool(history.drops),
        "evaluated": report.evaluated,
        "is_sample": report.is_sample,
        "accuracy": None if evaluation is None else 1 - evaluation.errors()["top1_error"],
        "classes": ordered[:MAX_ROWS],
        "other_classes": ordered[MAX_ROWS:],
        "confused": [] if evaluation is None else most_confused(evaluation),
        "mistakes": [(picture, _url(picture.pixels)) for picture in report.mistakes],
        "hits": [(picture, _url(picture.pixels)) for picture in report.hits],
        "looks": [
            {
                "picture": look.picture,
                "layer": look.explanation.layer,
                "windows": look.explanation.score_map.shape,
                "photo": _url(look.picture.pixels),
                "score": _url(look.score_overlay),
                "cam": _url(look.cam_overlay),
            }
            for look in report.looks
        ],
        "layers": [
            (layer, " x ".join(map(str, layer.shape)), layer.macs / largest)
            for layer in report.layers
        ],
        "total_params": sum(layer.params for layer in report.layers),
        "total_macs": sum(layer.macs for layer in report.layers),
    }


def _settings(config: TrainConfig) -> list[tuple[str, str, bool]]:
    """The settings of a run: name, value, and whether it differs from the paper's default."""
    paper = resolve_learning_rate(TrainConfig(), 1000)
    rows = []
    for field in dataclasses.fields(TrainConfig):
        value = getattr(config, field.name)
        differs = value != getattr(paper, field.name) and field.name != "data"
        rows.append((field.name, _format(value), differs))
    return rows


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        text = " ".join(map(str, value)) or "none"
        return text if len(text) <= 80 else f"{text[:79]}…"
    return "none" if value is None else str(value)


def _url(pixels: np.ndarray) -> str:
    return data_url(jpeg_bytes(pixels))


def _short_number(value: float) -> str:
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
