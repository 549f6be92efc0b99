"""Writes runs as one HTML file that needs no network."""

import contextlib
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vgg_jax import __version__
from vgg_jax.errors import InputError, install_hint, single_line
from vgg_jax.paths import require_local, to_path
from vgg_jax.reporting.classes import class_figures, confusion_matrix, most_confused
from vgg_jax.reporting.collect import MAX_MACS, RunReport, collect
from vgg_jax.reporting.net_figures import plot_activations, plot_filters
from vgg_jax.reporting.output import check_out, require_matplotlib, write_out
from vgg_jax.reporting.pictures import data_url, jpeg_bytes
from vgg_jax.reporting.run_figures import (
    plot_confusion,
    plot_curves,
    plot_time,
    run_colours,
    shown_quantities,
)
from vgg_jax.reporting.style import figure_bytes, inline_svg
from vgg_jax.reporting.tables import (
    compare,
    format_accuracy,
    percent,
    results,
    summarize_run,
    worst_first,
)
from vgg_jax.reporting.text import shorten_to_width
from vgg_jax.runs.metadata import load_run, settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GENERATOR = '<meta name="generator" content="vgg_jax report">'
TEMPLATE = Path(__file__).with_name("report.html")
MAX_NAME = 60  # width of the names of classes and files
MAX_ROWS = 30  # of the per-class table that are shown at first


class Result(NamedTuple):
    """The outcome of `report`.

    Attributes:
        notes: A sentence for each part that is missing.
        has_figures: True if figures were asked for, and all were written.
    """

    notes: list[str]
    has_figures: bool


def report(
    runs: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    figures: str | os.PathLike | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    overwrite: bool = False,
) -> Result:
    """Writes a report of one run, or of several side by side.

    Args:
        runs: Folders of the runs.
        out: The HTML file. An earlier report is replaced.
        figures: Folder for the figures as files, which is created if needed.
        data: Where the runs' images are now; None for where they were.
        data_dir: Folder of prepared data sets.
        overwrite: Replace a file that is no report, too.

    Returns:
        What is missing, and if the figures were written.

    Raises:
        InputError: There is no run in a folder, `data` are not its images, the report cannot be
            written, or a package is not installed.
    """
    require_matplotlib()
    render = _load_template()
    target = check_out(out, (".html", ".htm"), overwrite or _is_report(out))
    folder = None
    if figures is not None:
        folder = require_local(os.path.expanduser(figures), is_output=True)
    _check_different(runs)
    for path in runs:
        load_run(to_path(path))  # before the work on any of them
    reports = [collect(path, data, data_dir, MAX_MACS / len(runs)) for path in runs]
    _make_names_unique(reports, runs)
    shared, by_run = draw_figures(reports)
    notes = [
        f"{run_report.history.name}: {note}" if len(reports) > 1 else note
        for run_report in reports
        for note in run_report.notes
    ]
    has_figures = folder is not None
    if folder is not None:
        try:
            save_figures(folder, reports, shared, by_run)
        except OSError as error:
            has_figures = False
            notes.append(
                f"The figures were not saved in {figures}: {single_line(error)}; pass another "
                "--figures."
            )
    page = render(
        title=", ".join(run_report.history.name for run_report in reports),
        version=__version__,
        generator=GENERATOR,
        curves=[inline_svg(figure, f"curves: {name}") for name, figure in shared.items()],
        comparison=compare(reports) if len(reports) > 1 else [],
        runs=[
            _context(*item, data)
            for item in zip(reports, by_run, run_colours(len(reports)), strict=True)
        ],
    )
    # A name of a file or a class may have bytes that are no text.
    write_out(target, page.encode(errors="backslashreplace"))
    return Result(notes, has_figures)


def _is_report(path: str | os.PathLike) -> bool:
    """Tells if a file is an earlier report. A missing file is none."""
    with contextlib.suppress(OSError), open(os.path.expanduser(path), "rb") as file:
        return GENERATOR.encode() in file.read(1024)
    return False


def _load_template() -> Any:
    """Returns the function that renders the page."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise InputError(f"a report needs Jinja2: {install_hint('report')}") from error
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    environment.filters["short"] = lambda text: shorten_to_width(text, MAX_NAME)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render


def _check_different(runs: Sequence[str | os.PathLike]) -> None:
    paths = [os.path.realpath(path) for path in runs]
    repeated = [str(run) for run, path in zip(runs, paths, strict=True) if paths.count(path) > 1]
    if repeated:
        raise InputError(f"{repeated[0]} is passed twice: expected different runs")


def _make_names_unique(reports: Sequence[RunReport], runs: Sequence[str | os.PathLike]) -> None:
    """Names runs after their paths if two folders have one name."""
    names = [run_report.history.name for run_report in reports]
    if len(set(names)) < len(names):
        for run_report, path in zip(reports, runs, strict=True):
            run_report.history.name = os.fspath(path).rstrip("/")


def draw_figures(
    reports: Sequence[RunReport],
) -> "tuple[dict[str, Figure], list[dict[str, Figure]]]":
    """Draws all figures of a report.

    Args:
        reports: The runs.

    Returns:
        The curves by name, for all runs together; and for each run its other figures by name.
    """
    histories = [run_report.history for run_report in reports]
    shared = {}
    if any(history.records for history in histories):
        for quantity in shown_quantities(histories):
            shared[quantity.key] = plot_curves(histories, [quantity])
    return shared, [_draw_run(run_report) for run_report in reports]


def _draw_run(run_report: RunReport) -> "dict[str, Figure]":
    figures = {}
    if run_report.history.records:
        figures["time"] = plot_time(run_report.history)
    if run_report.evaluation is not None:
        matrix = confusion_matrix(run_report.evaluation)
        figures["confusion"] = plot_confusion(matrix, run_report.evaluation.classes.tolist())
    if run_report.filters is not None:
        figures["filters"] = plot_filters(run_report.filters)
    if run_report.activations:
        figures["activations"] = plot_activations(run_report.activations)
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
    for run_report, figures in zip(reports, by_run, strict=True):
        prefix = run_report.history.name.replace("/", "-") + "-" if len(reports) > 1 else ""
        for name, figure in figures.items():
            (folder / f"{prefix}{name}.svg").write_bytes(figure_bytes(figure, "svg"))
        photos = {
            "mistake": [picture.pixels for picture in run_report.mistakes],
            "hit": [picture.pixels for picture in run_report.hits],
            "score-map": [explained.score_overlay for explained in run_report.explained],
            "grad-cam": [explained.cam_overlay for explained in run_report.explained],
        }
        for name, images in photos.items():
            for number, pixels in enumerate(images, 1):
                (folder / f"{prefix}{name}-{number}.jpg").write_bytes(jpeg_bytes(pixels))


def _context(
    run_report: RunReport, figures: "dict[str, Figure]", colour: str, data: str | None
) -> dict[str, Any]:
    """The values that the template shows of a run."""
    history, run, evaluation = run_report.history, run_report.history.run, run_report.evaluation
    classes = [] if evaluation is None else worst_first(class_figures(evaluation))
    layers = run_report.layers
    largest = max(layer.macs for layer in layers)
    path = str(history.path)
    arguments = [path] if data is None else [path, data]
    return {
        "name": history.name,
        "colour": colour,
        "summary": summarize_run(history),
        "path": path,
        "notes": run_report.notes,
        "results": results(run_report),
        "command": run.command,
        "environment": run.environment or {},
        "settings": settings(run.config),
        "storage": run.storage,
        "svg": {
            name: inline_svg(figure, f"{name} of {history.name}")
            for name, figure in figures.items()
        },
        "has_rate_changes": bool(history.rate_changes),
        "evaluated": run_report.evaluated,
        "is_sample": run_report.is_sample,
        "evaluate_command": shlex.join(["vgg-jax", "evaluate", *arguments]),
        "accuracy": None if evaluation is None else format_accuracy(evaluation),
        "classes": classes[:MAX_ROWS],
        "other_classes": classes[MAX_ROWS:],
        "has_gaps": any(math.isnan(row.precision + row.recall + row.f1) for row in classes),
        "confused": [] if evaluation is None else most_confused(evaluation),
        "mistakes": [(picture, _url(picture.pixels)) for picture in run_report.mistakes],
        "hits": [(picture, _url(picture.pixels)) for picture in run_report.hits],
        "explained": [
            {
                "picture": explained.picture,
                "layer": explained.explanation.layer,
                "windows": explained.explanation.score_map.shape,
                "photo": _url(explained.picture.pixels),
                "score": _url(explained.score_overlay),
                "cam": _url(explained.cam_overlay),
            }
            for explained in run_report.explained
        ],
        "layers": [
            (layer, " x ".join(map(str, layer.shape)), layer.macs / largest) for layer in layers
        ],
        "total_params": sum(layer.params for layer in layers),
        "total_macs": sum(layer.macs for layer in layers),
    }


def _url(pixels: np.ndarray) -> str:
    return data_url(jpeg_bytes(pixels))
