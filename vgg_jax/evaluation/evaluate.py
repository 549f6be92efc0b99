"""Evaluates a net on a data set (§4), saves posteriors and errors, and fuses saved posteriors."""

import dataclasses
import io
import json
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.arrays import IN_MEMORY, NPZ_ERRORS, ArraySource, check_arrays, whole_source
from vgg_jax.configs.evaluation import MAX_PIXELS_PER_BATCH, EvalProtocol
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.division import split_kind
from vgg_jax.errors import InputError
from vgg_jax.evaluation.class_names import map_class_indices
from vgg_jax.evaluation.dense import iter_posteriors, resolve_protocol
from vgg_jax.input_data import open_split, open_train_val, rescaled_images, split_names
from vgg_jax.metrics import MetricSums, finalize, label_ranks, wilson_interval
from vgg_jax.model import VGG
from vgg_jax.paths import to_path
from vgg_jax.runs.files import atomic_write
from vgg_jax.runs.metadata import load_run
from vgg_jax.runtime.progress import ProgressBar
from vgg_jax.weights import from_loaded
from vgg_jax.weights.weights import to_metadata

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The posteriors of a split, in its order."""

    posteriors: np.ndarray  # float32 (N, K)
    labels: np.ndarray  # int32 (N,)
    files: np.ndarray  # str (N,)
    classes: np.ndarray  # str (K,)

    def errors(self) -> dict[str, Any]:
        """Computes the errors.

        Returns:
            "top1_error" and "top5_error" in [0, 1], each with its 95 % interval
            ("top1_error_interval"), the mean cross-entropy "loss", and the "count" of images.
        """
        count = len(self.labels)
        # Not of the logarithms: in float32 those of close posteriors are equal.
        ranks = np.asarray(label_ranks(jnp.asarray(self.posteriors), jnp.asarray(self.labels)))
        of_labels = np.float64(self.posteriors[np.arange(count), self.labels])
        loss = -np.log(np.maximum(of_labels, np.finfo(np.float32).tiny)).sum()
        sums = MetricSums(float(loss), int((ranks < 1).sum()), int((ranks < 5).sum()), count)
        errors = finalize(sums)
        intervals = {
            f"{name}_interval": wilson_interval(errors[name], count)
            for name in ("top1_error", "top5_error")
        }
        return errors | intervals


def evaluate(
    model: VGG,
    variables: Mapping[str, Any],
    metadata: Mapping[str, Any],
    data: str | os.PathLike | tuple[Any, Any] | None = None,
    split: str = "val",
    *,
    protocol: str | EvalProtocol = "dense",
    scales: Sequence[int] = (),
    data_dir: str | None = None,
    download: bool = False,
    skip_bad: bool = False,
    pixels: int = MAX_PIXELS_PER_BATCH,
    match: str = "exact",
    out: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Evaluates a net on a whole split, as `vgg-jax evaluate` does.

    Args:
        model: The net.
        variables: Its variables.
        metadata: Its metadata, as `vgg_jax.load` returns them. "net", "classes" and
            "preprocessing" are enough if `data` is given.
        data: An image folder, a name of TensorFlow Datasets, a path of an .npz file, or arrays
            (images, labels); the run's own by default. Its classes are some of the net's, in any
            order. Numbers as labels of arrays are positions in the net's classes.
        split: Name of the split. For the run's own data, "val" is the run's validation split.
        protocol: The evaluation protocol, or its name: one of "center", "ten-crop", "dense",
            "multi-crop" and "both". Mirror images count by default, unless the run was trained
            without them; never for "center".
        scales: Test scales Q. The default is the training scale S, the middle of its jitter (§4.1),
            or 256 for a weight file of a 224-pixel net.
        data_dir: Folder of the downloaded data sets.
        download: Downloads the data set if it is missing.
        skip_bad: Leave out files that are not images. An image that cannot be decoded still raises
            DataError.
        pixels: Most pixels of the windows that are computed at once.
        match: How the data's classes are found among the net's: "exact", "order", "synset" or
            "name", as `map_class_indices` explains.
        out: Folder to write posteriors.npz and evaluation.json into (`save_evaluation`).

    Returns:
        "top1_error" and "top5_error" in [0, 1], each with its 95 % interval
        ("top1_error_interval"), the mean cross-entropy "loss", the "count" of images, and the
        settings and the time: the content of evaluation.json.

    Raises:
        InputError: The net, the data or a setting is invalid, or an extra is not installed.
        DataError: An image cannot be decoded.
    """
    net = to_metadata(from_loaded(model, variables, metadata))
    path = metadata.get("path")
    name = path or "the net"
    if isinstance(protocol, str):
        protocol = EvalProtocol(protocol)
    protocol, scales = resolve_protocol(protocol, scales, model, net, name)
    if isinstance(data, (tuple, list)):
        data, source = IN_MEMORY, _array_source(data, net["classes"])
    else:
        data, source = open_source(
            metadata, data, split, data_dir=data_dir, download=download, skip_bad=skip_bad
        )
    started = time.monotonic()
    evaluation = evaluate_source(
        model,
        variables,
        net,
        source,
        name,
        protocol=protocol,
        scales=scales,
        pixels=pixels,
        match=match,
    )
    seconds = time.monotonic() - started
    results = {
        "run": path,
        "epoch": metadata.get("epoch"),
        "data": data,
        "split": split,
        "net": net["net"],
        "scales": list(scales),
        "protocol": dataclasses.asdict(protocol) | {"flip": protocol.use_flip},
        **evaluation.errors(),
        "seconds": round(seconds, 3),
        "images_per_second": round(source.size / seconds, 2),
    }
    if out is not None:
        save_evaluation(out, evaluation, results)
    return results


def evaluate_source(
    model: VGG,
    variables: Mapping[str, Any],
    metadata: Mapping[str, Any],
    source: Any,
    name: str,
    *,
    protocol: EvalProtocol,
    scales: tuple[int, ...],
    pixels: int = MAX_PIXELS_PER_BATCH,
    match: str = "exact",
) -> Evaluation:
    """Computes the posteriors of all images of a source.

    Args:
        model: The net.
        variables: Its variables.
        metadata: Its metadata: "classes" and "preprocessing".
        source: The images, as `open_source` returns them.
        name: Name of the net, for messages.
        protocol: The evaluation protocol, as `resolve_protocol` returns it.
        scales: Test scales Q.
        pixels: As in `evaluate`.
        match: As in `evaluate`.

    Returns:
        The posteriors, in the order of the source.

    Raises:
        InputError: The net lacks a class of the source.
        DataError: An image cannot be decoded.
    """
    classes, preprocessing = metadata["classes"], metadata["preprocessing"]
    class_indices = _class_indices(source, classes, name, match)
    if match != "exact":
        first = classes[class_indices[0]]
        logger.info("classes by --match %s: %r is %r, and so on", match, source.classes[0], first)
    images = _Images(source, scales, preprocessing["exif"], protocol.rounding, class_indices)
    stream = iter_posteriors(
        model,
        variables,
        iter(images),
        mesh=make_mesh(len(jax.local_devices()), jax.local_devices()),
        protocol=protocol,
        mean_rgb=preprocessing["mean_rgb"],
        pixels=pixels,
    )
    posteriors = _collect(stream, source.size, model.num_classes)
    return Evaluation(
        posteriors, images.labels, np.array(images.files, str), np.array(classes, str)
    )


def open_source(
    metadata: Mapping[str, Any],
    data: str | os.PathLike | None,
    split: str,
    *,
    data_dir: str | None,
    download: bool,
    skip_bad: bool,
) -> tuple[str, Any]:
    """Opens a split of the data that a net is evaluated on.

    Args:
        metadata: The net's metadata. Those of a run have its "config" and its "path".
        data: The data, or None for the run's own.
        split: Name of the split.
        data_dir: As in `evaluate`.
        download: As in `evaluate`.
        skip_bad: As in `evaluate`.

    Returns:
        The name of the data, and its images: a `vgg_jax.data.DataSource` or an `ArraySource`.

    Raises:
        InputError: The data is missing, or is not that of the run.
    """
    path = metadata.get("path")
    config = metadata.get("config") if path else None
    if data is None:
        if config is None:
            raise InputError(
                f"{path or 'the net'} is not a run and no data is given: "
                "expected an image folder or a name of TensorFlow Datasets"
            )
        data = config.data
        if data == IN_MEMORY:
            raise InputError(
                f"{path} was trained on arrays in memory: pass data, as arrays (images, labels) in "
                "Python or as a file"
            )
    data = os.fspath(data)
    is_own = config is not None and data == config.data
    # The run may have held out its validation images, and the data may have moved since.
    is_validation = split_kind(split) == "validation"
    may_be_moved = config is not None and not is_own and is_validation
    if may_be_moved:
        names = split_names(data, data_dir=data_dir, download=download)
        kinds = set(map(split_kind, names))
        may_be_moved = "train" in kinds and "validation" not in kinds
    if config is None or not (is_own or may_be_moved):
        return data, open_split(
            data, split, data_dir=data_dir, download=download, skip_bad=skip_bad, exclude=()
        )
    options: dict[str, Any] = {
        "data_dir": data_dir,
        "download": download,
        "skip_bad": skip_bad or config.skip_bad,
        "exclude": config.exclude,
    }
    if not is_validation:
        return data, open_split(data, split, **options)
    run = load_run(to_path(metadata["path"]))
    if not is_own:  # before the division, which other data may not allow
        whole = open_split(data, "train", **options)
        expected = (run.storage, run.train_size + run.validation_size)
        _check_same_data(data, path, expected, (whole.storage, whole.size))
    train, validation = open_train_val(
        dataclasses.replace(config, data=data, skip_bad=options["skip_bad"]),
        data_dir=data_dir,
        download=download,
        version=run.input_version,
    )
    sizes = (run.storage, run.train_size, run.validation_size)
    _check_same_data(data, path, sizes, (train.storage, train.size, validation.size))
    return data, validation


def _check_same_data(data: str, path: Any, expected: tuple, actual: tuple) -> None:
    """Raises InputError if the data, by storage and sizes, are not those of the run in `path`."""
    if actual != expected:
        images = [" + ".join(f"{size:,}" for size in sizes) for _, *sizes in (expected, actual)]
        raise InputError(
            f"{data} is not what {path} was trained on: expected {images[0]} images "
            f"({expected[0]}), found {images[1]} ({actual[0]}), so the run's validation images are "
            "unknown; pass another --split, as --split train for all images of it, or the folder "
            "where the run's data is now"
        )


def _array_source(data: Sequence[Any], net_classes: Sequence[str]) -> ArraySource:
    """Checks arrays (images, labels), whose labels are names or positions in the net's classes."""
    if len(data) != 2:
        raise InputError(f"data has {len(data)} items: expected arrays (images, labels)")
    images, labels = data
    return whole_source(check_arrays(images, labels, "the data", net_classes), IN_MEMORY)


def _class_indices(source: Any, net_classes: Sequence[str], name: str, match: str) -> np.ndarray:
    """Finds the classes of a source among those of a net, int (n,)."""
    numbers = tuple(map(str, range(len(source.classes))))
    if isinstance(source, ArraySource) and source.classes == numbers and match == "exact":
        if len(numbers) > len(net_classes):
            raise InputError(
                f"the labels of {source.name} are up to {len(numbers) - 1}: expected positions in "
                f"the {len(net_classes)} classes of {name}"
            )
        return np.arange(len(numbers))
    return map_class_indices(
        source.classes, net_classes, f"{source.name} has classes that {name} does not know", match
    )


class _Images:
    """Iterates over the rescaled images of a source, and keeps their labels and file names.

    Attributes:
        labels: Class indices of the net, int32 (N,).
        files: Names of the files read so far.
    """

    def __init__(
        self,
        source: Any,
        scales: tuple[int, ...],
        exif: bool,
        rounding: str,
        class_indices: np.ndarray,
    ) -> None:
        self.labels = np.zeros(source.size, np.int32)
        self.files: list[str] = []
        self._source, self._resize_options = source, (scales, exif, rounding)
        self._class_indices = class_indices

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        examples = rescaled_images(self._source, *self._resize_options)
        for index, example in enumerate(examples):
            self.labels[index] = self._class_indices[example["label"][0]]
            self.files.append(self._source.file_name(int(example["index"][0])))
            yield [image[0] for image in example["scaled"]]


def _collect(stream: Iterable[tuple[int, np.ndarray]], size: int, num_classes: int) -> np.ndarray:
    """Collects the posteriors of all images, float32 (N, K), and shows the progress."""
    posteriors = np.full((size, num_classes), np.nan, np.float32)
    count = 0
    with ProgressBar("evaluation", size) as progress:
        for index, posterior in stream:
            posteriors[index] = posterior
            count += 1
            progress.update()
    if count != size:
        raise RuntimeError(f"{count} of {size} images were evaluated")
    return posteriors


def save_evaluation(
    out: str | os.PathLike, evaluation: Evaluation, results: dict[str, Any]
) -> None:
    """Writes posteriors.npz and evaluation.json into a folder.

    Each file is replaced atomically.

    Args:
        out: The folder, which is created if needed.
        evaluation: The content of posteriors.npz.
        results: The content of evaluation.json.
    """
    folder, content = to_path(out), io.BytesIO()
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(content, **dataclasses.asdict(evaluation))
    atomic_write(folder / "posteriors.npz", content.getvalue())
    atomic_write(folder / "evaluation.json", (json.dumps(results, indent=1) + "\n").encode())


def find_posteriors(path: str | os.PathLike) -> str:
    """Finds the posteriors.npz of an evaluation.

    Args:
        path: The file, its folder, or the folder of a run with one evaluation.

    Returns:
        The path of the file.

    Raises:
        InputError: The folder holds no evaluation, or several.
    """
    folder = to_path(path)
    if not folder.is_dir():
        return os.fspath(path)
    if (folder / "posteriors.npz").exists():
        return os.fspath(folder / "posteriors.npz")
    evaluations = sorted(map(os.fspath, folder.glob("*/posteriors.npz")))
    if not evaluations:
        raise InputError(
            f"{path} holds no evaluation: expected {folder / 'posteriors.npz'}, or one in a "
            f"folder there; run `vgg-jax evaluate {path}` first"
        )
    if len(evaluations) > 1:
        raise InputError(
            f"{path} holds {len(evaluations)} evaluations: expected one; pass some of "
            f"{', '.join(evaluations)}"
        )
    return evaluations[0]


def load_evaluation(path: str | os.PathLike) -> Evaluation:
    """Reads a posteriors.npz.

    Args:
        path: The file, or its folder as for `find_posteriors`.

    Returns:
        The evaluation.

    Raises:
        InputError: `save_evaluation` did not write the file, or it is damaged.
    """
    path = find_posteriors(path)
    names = [field.name for field in dataclasses.fields(Evaluation)]
    try:
        with to_path(path).open("rb") as file, np.load(file, allow_pickle=False) as content:
            evaluation = Evaluation(**{name: content[name] for name in names})
        _check_arrays(evaluation)
    # A damaged size of an array may be of more than all memory.
    except (*NPZ_ERRORS, MemoryError) as error:
        raise InputError(
            f"{path} cannot be read ({error}): "
            "expected a posteriors.npz as `vgg-jax evaluate` writes it"
        ) from error
    return evaluation


def _check_arrays(evaluation: Evaluation) -> None:
    arrays = vars(evaluation)
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise ValueError(f"{name} is not an array")
    posteriors, *others = (array.shape for array in arrays.values())
    n, k = posteriors if len(posteriors) == 2 else (None, None)
    if others != [(n,), (n,), (k,)]:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"{shapes}: expected (N, K), (N,), (N,), (K,)")


def fuse(paths: Sequence[str | Path]) -> Evaluation:
    """Averages the posteriors of several files (§4.4).

    Args:
        paths: The posteriors.npz files, or folders as for `find_posteriors`; at least one.

    Returns:
        The first evaluation, with the mean posteriors.

    Raises:
        InputError: The images, labels or classes differ, or a file cannot be read.
    """
    first = load_evaluation(paths[0])
    total = np.zeros(first.posteriors.shape)
    for path in paths:
        other = load_evaluation(path)
        for name, noun in (("classes", "class"), ("files", "image"), ("labels", "label of image")):
            expected, actual = getattr(first, name), getattr(other, name)
            if name == "files":  # the data may have moved between the evaluations
                expected, actual = _without_root(expected), _without_root(actual)
            if not np.array_equal(expected, actual):
                raise InputError(
                    f"{noun} {_first_difference(actual, path, expected, paths[0])}: "
                    "expected the same images and classes; evaluate both on the same split"
                )
        total += other.posteriors
    return dataclasses.replace(first, posteriors=(total / len(paths)).astype(np.float32))


def _without_root(files: np.ndarray) -> np.ndarray:
    """Removes the folder that all files have in common from their names."""
    names = files.tolist()
    try:
        root = os.path.commonpath({os.path.dirname(name) for name in names})
    except ValueError:  # no files, or absolute and relative names
        root = ""
    return np.array([name[len(root) :] for name in names], str)


def format_errors(results: dict[str, Any], num_classes: int) -> str:
    """Formats the errors, their intervals and the number of images in one line.

    Args:
        results: The results of `evaluate` or `Evaluation.errors`.
        num_classes: Number of classes. With at most five, the top-5 error is left out: it is 0.

    Returns:
        The line, without a newline.
    """
    parts = []
    for k in (1, 5) if num_classes > 5 else (1,):
        low, high = results[f"top{k}_error_interval"]
        parts.append(f"top-{k} error {results[f'top{k}_error']:.2%} ({low:.2%} to {high:.2%})")
    return f"{', '.join(parts)}; 95 % intervals, {results['count']} images"


def _first_difference(
    actual: Sequence, path: str | Path, expected: Sequence, other_path: str | Path
) -> str:
    if len(actual) != len(expected):
        return f"count is {len(actual)} in {path} and {len(expected)} in {other_path}"
    pairs = enumerate(zip(actual, expected, strict=True))
    index = next(i for i, (one, other) in pairs if one != other)
    return (
        f"{index} is {str(actual[index])!r} in {path} and {str(expected[index])!r} in {other_path}"
    )
