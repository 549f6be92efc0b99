"""Collects what a report shows of a run. A part that is missing becomes a note."""

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from vgg_jax.arrays import IN_MEMORY
from vgg_jax.configs.evaluation import EvalProtocol
from vgg_jax.division import split_kind
from vgg_jax.errors import InputError, single_line
from vgg_jax.evaluation.dense import resolve_protocol
from vgg_jax.evaluation.evaluate import (
    Evaluation,
    evaluate_source,
    load_evaluation,
    open_source,
)
from vgg_jax.input_data import pick
from vgg_jax.metrics import is_loss_of_guessing
from vgg_jax.model import VGG
from vgg_jax.paths import is_remote, to_path
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.reporting.classes import confident_mistakes, unsure_hits
from vgg_jax.reporting.history import RunHistory, read_divergence, read_records, run_name
from vgg_jax.reporting.pictures import (
    ExplainedPicture,
    Picture,
    explain_pictures,
    read_pictures,
)
from vgg_jax.runs.checkpoint import load_best
from vgg_jax.runs.metadata import has_checkpoint, load_run
from vgg_jax.summary import LayerSummary, summarize

T = TypeVar("T")

PICTURES = 12  # mistakes, and as many hits
EXPLAINED = 2  # mistakes, and as many hits, with maps of where the net looks
# Multiply-adds of the evaluations that a report makes itself, of all its runs together: some
# seconds on two cores. Nets with few take more images, up to the largest number.
MAX_MACS, MIN_IMAGES, MAX_IMAGES = 1e12, 16, 2000


class Net(NamedTuple):
    """The best net of a run, as `vgg_jax.load` returns it."""

    model: VGG
    variables: Mapping[str, Any]
    metadata: Mapping[str, Any]


@dataclasses.dataclass
class RunReport:
    """What a report shows of a run.

    Attributes:
        history: The run and its finished epochs.
        layers: Shape and cost of each layer.
        notes: A sentence for each part that is missing, and why.
        filters: The kernel of conv1_1 of the best net.
        evaluation: Posteriors of validation images.
        evaluated: A description of these images.
        is_sample: True if the report evaluated these images itself, by centre crops.
        mistakes: The wrong predictions with the largest posteriors.
        hits: The correct predictions with the smallest posteriors.
        explained: Where the net looks in some of the photos.
        activations: The output of each stage for one photo, (h, w, C) by name of the layer.
    """

    history: RunHistory
    layers: list[LayerSummary]
    notes: list[str] = dataclasses.field(default_factory=list)
    filters: np.ndarray | None = None
    evaluation: Evaluation | None = None
    evaluated: str = ""
    is_sample: bool = False
    mistakes: list[Picture] = dataclasses.field(default_factory=list)
    hits: list[Picture] = dataclasses.field(default_factory=list)
    explained: list[ExplainedPicture] = dataclasses.field(default_factory=list)
    activations: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def collect(
    path: str | os.PathLike,
    data: str | None = None,
    data_dir: str | None = None,
    max_macs: float = MAX_MACS,
) -> RunReport:
    """Collects what a report shows of a run.

    Args:
        path: Folder of the run.
        data: Where the run's images are now; None for where they were.
        data_dir: Folder of prepared data sets.
        max_macs: Multiply-adds of the evaluation that the report makes itself.

    Returns:
        The report. Its `notes` say what is missing and why.

    Raises:
        InputError: There is no run in the folder, or `data` are not its images.
    """
    folder, notes = to_path(path), list[str]()
    run = load_run(folder)
    divergence = _try(notes, "The end of the run is unknown", lambda: read_divergence(folder))
    if divergence is not None:
        # Without the names of the images, which are many. `diverged.txt` has them.
        short = re.sub(r" \(images .*?\)", "", divergence)
        notes.append(f"The run diverged: {short.rstrip('.')}.")
    records = _try(
        notes, "The curves are not shown", lambda: read_records(folder / "metrics.jsonl")
    )
    history = RunHistory(folder, run_name(path), run, records or [], divergence)
    config = run.config
    layers = summarize(config.vgg, len(run.classes), config.batch_norm, config.image_size)
    report = RunReport(history, layers, notes)
    if records == [] and not has_checkpoint(folder / "best"):
        remedy = "the same `vgg-jax train` command resumes the run"
        if divergence is not None:
            remedy = (
                "train again with a smaller --learning-rate, --batch-norm or --on-nan halve, and "
                "another --workdir"
            )
        notes.append(
            f"No epoch has finished, so there are no curves, and no net to look at; {remedy}."
        )
        return report
    if records == []:
        notes.append("The curves are not shown: metrics.jsonl lists no finished epoch.")
    if records and is_loss_of_guessing(records[-1]["train"]["loss"], len(run.classes)):
        notes.append(
            f"The training loss is that of guessing, ln({len(run.classes)}) = "
            f"{math.log(len(run.classes)):.3f}: the net has not learned."
        )
    net = _try(notes, "The net is not shown", lambda: Net(*load_best(path)))
    if net is not None:
        report.filters = np.asarray(net.variables["params"]["conv1_1"]["kernel"])
        _add_evaluation(report, net, data, data_dir, max_macs)
    return report


def _add_evaluation(
    report: RunReport, net: Net, data: str | None, data_dir: str | None, max_macs: float
) -> None:
    """Adds an evaluation of the net, and the photos that it shows."""
    notes = report.notes
    saved = _saved_evaluation(report.history, net.metadata, data)
    missing = "The photos are" if saved else "The classes, the photos and where the net looks are"
    missing += " not shown"
    try:
        _, source = open_source(
            net.metadata, data, "val", data_dir=data_dir, download=False, skip_bad=False
        )
    except (InputError, OSError) as error:
        # The end of the message is advice for `vgg-jax evaluate`.
        reason = single_line(error, None).split(";")[0].rstrip(".")
        advice = "pass --data PATH with the folder or file where the run's images are now"
        if data is not None:
            raise InputError(f"{reason}; {advice}") from error
        notes.append(f"{missing}: {reason}; {advice}.")
        source = None
    if saved is not None:
        report.evaluation, report.evaluated = saved
        if source is not None and not _has_images(source, report.evaluation):
            notes.append(
                f"{missing}: the images of {source.name} are not those of the saved evaluation."
            )
            source = None
    elif source is not None:
        sample = sample_source(source, report.layers, max_macs)
        report.evaluation = _try(notes, missing, lambda: _evaluate(net, sample))
        report.evaluated = _describe_sample(sample.size, source.size)
        report.is_sample = True
        source = sample
    if report.evaluation is not None and source is not None:
        _try(notes, missing, lambda: _add_pictures(report, net, source))


def _try(notes: list[str], missing: str, function: Callable[[], T]) -> T | None:
    """Calls a function. An error of the input becomes a note, and the result is None."""
    try:
        return function()
    except (InputError, OSError) as error:
        notes.append(f"{missing}: {single_line(error, None).rstrip('.')}.")
        return None


def _saved_evaluation(
    history: RunHistory, metadata: Mapping[str, Any], data: str | None
) -> tuple[Evaluation, str] | None:
    """The newest evaluation of the best net on the run's validation images, and what it is.

    An evaluation of arrays is not used: nothing says which they were.
    """
    evaluations = []
    for path in history.path.glob("*/evaluation.json"):
        try:
            results = json.loads(path.read_text())
            is_own = (
                results["data"] in (metadata["config"].data, data)
                and results["data"] != IN_MEMORY
                and split_kind(results["split"]) == "validation"
                and results["epoch"] == metadata["epoch"]
                and results["count"] == history.run.validation_size
            )
            if is_own:
                evaluation = load_evaluation(path.parent)
                scales = ", ".join(map(str, results["scales"]))
                text = (
                    f"All {len(evaluation.labels):,} validation images, protocol "
                    f"{results['protocol']['name']}, Q = {scales}, from {path.parent.name}/."
                )
                evaluations.append((_modified(path), evaluation, text))
        except (InputError, OSError, ValueError, KeyError, TypeError):
            continue  # of another program, or damaged: the report makes its own
    if not evaluations:
        return None
    _, evaluation, text = max(evaluations, key=lambda item: item[0])
    return evaluation, text


def _modified(path: Path) -> float:
    """The time of a file's last change. In an object store it has another name."""
    status: Any = path.stat()
    return status.mtime if is_remote(path) else status.st_mtime


def _has_images(source: Any, evaluation: Evaluation) -> bool:
    """Tells if an evaluation is of a source's images, by their names and folders."""
    if source.size != len(evaluation.files):
        return False
    names = [source.file_name(int(index)) for index in source.indices]
    pairs = zip(names, evaluation.files.tolist(), strict=True)
    return all(one.split("/")[-2:] == other.split("/")[-2:] for one, other in pairs)


def sample_source(source: Any, layers: list[LayerSummary], max_macs: float) -> Any:
    """Selects as many images as a report evaluates itself, at random, the same in each call.

    Args:
        source: The validation images.
        layers: Cost of the net's layers.
        max_macs: Multiply-adds of all these images.

    Returns:
        The source, or a part of it.
    """
    macs = sum(layer.macs for layer in layers)
    size = min(source.size, MAX_IMAGES, max(MIN_IMAGES, int(max_macs / macs)))
    if size == source.size:
        return source
    positions = np.random.default_rng(0).choice(source.size, size, replace=False)
    return pick(source, np.sort(positions))


def _describe_sample(size: int, total: int) -> str:
    images = f"All {total:,} validation images"
    if size < total:
        images = f"{size:,} of {total:,} validation images, drawn at random"
    return f"{images}, centre crops."


def _evaluate(net: Net, source: Any) -> Evaluation:
    path = net.metadata["path"]
    protocol, scales = resolve_protocol(EvalProtocol("center"), (), net.model, net.metadata, path)
    return evaluate_source(
        net.model, net.variables, net.metadata, source, path, protocol=protocol, scales=scales
    )


def _add_pictures(report: RunReport, net: Net, source: Any) -> None:
    """Adds the galleries, where the net looks, and the activations of one photo."""
    evaluation = report.evaluation
    assert evaluation is not None
    mistakes, hits = confident_mistakes(evaluation, PICTURES), unsure_hits(evaluation, PICTURES)
    preprocessing = net.metadata["preprocessing"]
    pictures = read_pictures(source, mistakes + hits, evaluation, preprocessing)
    report.mistakes = [pictures[position] for position in mistakes]
    report.hits = [pictures[position] for position in hits]
    shown = [*report.mistakes[:EXPLAINED], *report.hits[:EXPLAINED]]
    mean_rgb = tuple(preprocessing["mean_rgb"])
    report.explained = explain_pictures(net.model, net.variables, mean_rgb, shown)
    if shown:
        pixels = shown[0].pixels
        report.activations = stage_outputs(net.model, net.variables, pixels, mean_rgb)


def stage_outputs(
    model: VGG, variables: Mapping[str, Any], pixels: np.ndarray, mean_rgb: tuple[float, ...]
) -> dict[str, np.ndarray]:
    """Computes the output of each stage before its pooling.

    Args:
        model: The net.
        variables: Its variables.
        pixels: A photo, uint8 (H, W, 3).
        mean_rgb: Mean of each channel, which is subtracted.

    Returns:
        float32 (h, w, C) by name of the layer.
    """
    names = [layer.name for layer in model.layers()]
    layers = tuple(
        names[names.index(f"pool{stage}") - 1] for stage in range(1, len(model.config.stages) + 1)
    )

    @jax.jit
    def compute(variables: Mapping[str, Any], images: Any) -> Any:
        return model.apply(variables, images, layers, method="features")

    outputs = compute(variables, subtract_mean(pixels[None], mean_rgb))
    return {name: np.asarray(outputs[name][0], np.float32) for name in layers}
