"""Predicts the most probable classes of image files."""

import glob
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from vgg_jax.configs.evaluation import DENSE, EvalProtocol
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.errors import InputError
from vgg_jax.evaluation.dense import iter_posteriors, resolve_protocol
from vgg_jax.image_files import (
    FORMATS,
    has_image_suffix,
    is_image,
    is_system_name,
    read_local_header,
)
from vgg_jax.preprocessing import load_resized
from vgg_jax.weights import load

logger = logging.getLogger(__name__)


class Prediction(NamedTuple):
    """The most probable classes of a file, or the reason why there are none."""

    file: str
    top: list[tuple[str, float]]  # (class, probability), most probable first
    error: str | None = None


def predict(
    path: str | os.PathLike,
    images: Sequence[str],
    *,
    protocol: EvalProtocol = DENSE,
    scales: Sequence[int] = (),
    top: int = 5,
    preprocessing: str | Mapping[str, Any] | None = None,
    image_size: int | None = None,
    classes: Sequence[str] | None = None,
) -> Iterator[Prediction]:
    """Predicts the classes of image files.

    Args:
        path: A run's folder or a weight file.
        images: Files, folders and patterns such as `photos/*.jpg`, as for `expand_paths`.
        protocol: The evaluation protocol.
        scales: Test scales; empty for the net's own.
        top: Number of classes per image.
        preprocessing: Images that the net of a weight file was trained with, as in `vgg_jax.load`.
        image_size: Side of the images, as in `vgg_jax.load`.
        classes: Names of the classes, as in `vgg_jax.load`.

    Yields:
        A prediction per file, in the order of the files. An unreadable file has an error instead
        of classes, and does not stop the others. Images are computed in batches. Each batch yields
        the files before the first one that is not done yet, among them the unreadable ones.

    Raises:
        InputError: The net cannot be read, a setting is invalid, or there are no files.
    """
    if top < 1:
        raise InputError(f"top is {top}: expected at least 1")
    files = expand_paths(images)
    model, variables, metadata = load(
        path, preprocessing=preprocessing, image_size=image_size, classes=classes
    )
    protocol, scales = resolve_protocol(protocol, scales, model, metadata, path)
    expected, class_names = metadata["preprocessing"], metadata["classes"]
    done: dict[int, Prediction] = {}  # by position in `files`, until the earlier ones are done
    readable: list[int] = []  # positions

    def scaled_images() -> Iterator[list[np.ndarray]]:
        for position, file in enumerate(files):
            try:
                image = load_resized(file, scales, expected["exif"], protocol.rounding)
            except InputError as error:
                done[position] = Prediction(file, [], str(error))
                continue
            readable.append(position)
            yield image

    posteriors = iter_posteriors(
        model,
        variables,
        scaled_images(),
        mesh=make_mesh(1, jax.devices()[:1]),
        protocol=protocol,
        mean_rgb=expected["mean_rgb"],
        num_images=len(files),
    )
    first = 0  # position of the next prediction to yield
    for index, posterior in posteriors:
        best = np.argsort(-posterior, kind="stable")[:top]  # as `label_ranks` orders them
        top_classes = [(class_names[i], float(posterior[i])) for i in best]
        done[readable[index]] = Prediction(files[readable[index]], top_classes)
        while first in done:
            yield done.pop(first)
            first += 1
    yield from (done[position] for position in sorted(done))


def expand_paths(images: Sequence[str]) -> list[str]:
    """Expands folders and patterns into files.

    Args:
        images: Files, folders, whose images at any depth count, and glob patterns. Images are
            recognised by their first bytes. Links are followed. Paths in an object store must be
            files.

    Returns:
        The files. A name that matches no local file stays in the list. It may be in an object
        store; otherwise reading reports it. A file in a folder that has an image's extension, and
        is none, stays too.

    Raises:
        InputError: There are no files.
    """
    files: list[str] = []
    for name in images:
        if os.path.isdir(name):
            in_folder = _images_under(name)
            if not in_folder:
                logger.warning("no images in %r", name)
            files += in_folder
        elif os.path.lexists(name):
            files.append(name)
        else:
            files += sorted(glob.glob(name, recursive=True)) or [name]
    if not files:
        raise InputError(f"no images in {', '.join(map(repr, images))}: expected {FORMATS} files")
    return files


def _images_under(folder: str) -> list[str]:
    """Lists the images in a folder and below it, sorted, and logs how many files are left out.

    As in training, those that are hidden or belong to the system count too.
    """
    images: list[str] = []
    skipped: list[str] = []
    for path in _walk(folder):
        name = os.path.basename(path)
        if is_system_name(name):
            skipped.append(path)
            continue
        # A file that claims to be an image is reported if it is none.
        header = read_local_header(path)
        is_wanted = is_image(header) or (has_image_suffix(name) and not _is_pipe(path))
        (images if is_wanted else skipped).append(path)
    if skipped:
        logger.info(
            "skipped %d files of %s that are no images, hidden or of the system, for example %r",
            len(skipped),
            folder,
            min(skipped),
        )
    return sorted(images)


def _is_pipe(path: str) -> bool:
    """Tells whether a path is a named pipe or the like, which may never end."""
    return os.path.exists(path) and not os.path.isfile(path)


def _walk(folder: str, ancestors: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yields the files below a folder, and its folders of the system without what is in them.

    Links are followed, but not to a folder that they lie in.
    """
    ancestors |= {os.path.realpath(folder)}
    _, subfolders, names = next(os.walk(folder), (folder, [], []))
    yield from (os.path.join(folder, name) for name in names)
    for name in subfolders:
        path = os.path.join(folder, name)
        if is_system_name(name):
            yield path
        elif os.path.realpath(path) not in ancestors:
            yield from _walk(path, ancestors)
