"""Collects what a report shows of a run. A part that is missing becomes a note."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

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
from vgg_jax.model import VGG
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.reporting.classes import confident_mistakes, unsure_hits
from vgg_jax.reporting.history import RunHistory, read_run
from vgg_jax.reporting.pictures import Look, Picture, look_at, read_pictures
from vgg_jax.runs.checkpoint import load_best
from vgg_jax.summary import LayerSummary, summarize

T = TypeVar("T")

PICTURES = 12  # mistakes, and as many hits
LOOKS = 2  # mistakes, and as many hits, with maps of where the net looks
# Multiply-adds of the evaluation that a report makes itself: about 10 seconds on two cores. Nets
# with few take more images, up to the largest number.
MAX_MACS, MAX_IMAGES = 2.5e12, 2000


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
        net: The best net.
        evaluation: Posteriors of validation images.
        evaluated: A description of these images.
        is_sample: True if the report evaluated these images itself, by centre crops.
        mistakes: The wrong predictions with the largest posteriors.
        hits: The correct predictions with the smallest posteriors.
        looks: Where the net looks in some of the photos.
        activations: The output of each stage for one photo, (h, w, C) by name of the layer.
    """

    history: RunHistory
    layers: list[LayerSummary]
    notes: list[str] = dataclasses.field(default_factory=list)
    net: Net | None = None
    evaluation: Evaluation | None = None
    evaluated: str = ""
    is_sample: bool = False
    mistakes: list[Picture] = dataclasses.field(default_factory=list)
    hits: list[Picture] = dataclasses.field(default_factory=list)
    looks: list[Look] = dataclasses.field(default_factory=list)
    activations: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


def collect(
    path: str | os.PathLike, data: str | None = None, data_dir: str | None = None
) -> RunReport:
    """Collects what a report shows of a run.

    Args:
        path: Folder of the run.
        data: Where the run's images are now; None for where they were.
        data_dir: Folder of prepared data sets.

    Returns:
        The report. Its `notes` say what is missing and why.

    Raises:
        InputError: There is no run in the folder.
    """
    history = read_run(path)
    config = history.run.config
    layers = summarize(config.vgg, len(history.run.classes), config.batch_norm, config.image_size)
    report = RunReport(history, layers)
    if history.divergence is not None:
        report.notes.append(f"The run diverged: {history.divergence}.")
    if not history.records:
        report.notes.append(
            "No epoch has finished, so there are no curves, and no net to look at; the same "
            "`vgg-jax train` command resumes the run."
        )
        return report
    report.net = _try(report.notes, "The net is not shown", lambda: Net(*load_best(path)))
    if report.net is None:
        return report
    net = report.net
    saved = _saved_evaluation(report.history.path, net.metadata)
    source = _try(
        report.notes,
        "The photos are not shown",
        lambda: open_source(
            net.metadata, data, "val", data_dir=data_dir, download=False, skip_bad=False
        )[1],
    )
    if saved is not None:
        report.evaluation, report.evaluated = saved
        if source is not None and source.size != len(saved[0].files):
            report.notes.append(
                f"The photos are not shown: {source.name} has {source.size} images, and the "
                f"evaluation has {len(saved[0].files)}."
            )
            source = None
    elif source is not None:
        sample = sample_source(source, layers)
        report.evaluation = _try(
            report.notes, "The net was not evaluated", lambda: _evaluate(net, sample)
        )
        report.evaluated = _describe_sample(sample.size, source.size)
        report.is_sample = True
        source = sample
    if report.evaluation is not None and source is not None:
        _try(report.notes, "The photos are not shown", lambda: _add_pictures(report, source))
    return report


def _try(notes: list[str], missing: str, function: Callable[[], T]) -> T | None:
    """Calls a function. An error of the input becomes a note, and the result is None."""
    try:
        return function()
    except (InputError, OSError) as error:
        notes.append(f"{missing}: {single_line(error, None).rstrip('.')}.")
        return None


def _saved_evaluation(folder: Path, metadata: Mapping[str, Any]) -> tuple[Evaluation, str] | None:
    """The newest evaluation of the best net on the run's validation images, and what it is."""
    found = []
    for path in folder.glob("*/evaluation.json"):
        try:
            results = json.loads(path.read_text())
            is_own = (
                results["data"] == metadata["config"].data
                and split_kind(results["split"]) == "validation"
                and results["epoch"] == metadata["epoch"]
            )
            if is_own:
                evaluation = load_evaluation(path.parent)
                scales = ", ".join(map(str, results["scales"]))
                text = (
                    f"All {len(evaluation.labels):,} validation images, protocol "
                    f"{results['protocol']['name']}, Q = {scales}, from {path.parent.name}/."
                )
                found.append((path.stat().st_mtime, evaluation, text))
        except (InputError, OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # of another program, or damaged: the report makes its own
    if not found:
        return None
    _, evaluation, text = max(found, key=lambda item: item[0])
    return evaluation, text


def sample_source(source: Any, layers: list[LayerSummary]) -> Any:
    """Selects as many images as a report evaluates itself, at random, the same in each call.

    Args:
        source: The validation images.
        layers: Cost of the net's layers.

    Returns:
        The source, or a part of it.
    """
    macs = sum(layer.macs for layer in layers)
    size = min(source.size, MAX_IMAGES, max(16, int(MAX_MACS / macs)))
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


def _add_pictures(report: RunReport, source: Any) -> None:
    """Adds the galleries, where the net looks, and the activations of one photo."""
    evaluation, net = report.evaluation, report.net
    assert evaluation is not None and net is not None
    mistakes, hits = confident_mistakes(evaluation, PICTURES), unsure_hits(evaluation, PICTURES)
    preprocessing = net.metadata["preprocessing"]
    pictures = read_pictures(source, mistakes + hits, evaluation, preprocessing)
    report.mistakes = [pictures[position] for position in mistakes]
    report.hits = [pictures[position] for position in hits]
    shown = [*report.mistakes[:LOOKS], *report.hits[:LOOKS]]
    model, mean_rgb = net.model, tuple(preprocessing["mean_rgb"])
    classes = net.metadata["classes"]
    report.looks = look_at(model, net.variables, mean_rgb, shown, classes)
    if shown:
        report.activations = stage_outputs(model, net.variables, shown[0].pixels, mean_rgb)


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
