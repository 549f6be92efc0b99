"""From a trained net and image files to the most probable classes of each."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from vgg_jax.configs import DENSE, Protocol
from vgg_jax.errors import InputError
from vgg_jax.posteriors import stream_posteriors
from vgg_jax.sharding import data_mesh
from vgg_jax.weights import load

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")  # of what is looked at in a folder


class Prediction(NamedTuple):
    """What is to be said of one file: its most probable classes, or why it has none."""

    file: str
    top: list[tuple[str, float]]
    error: str | None = None


def predict(
    path: str | os.PathLike, images: Sequence[str], *, protocol: Protocol = DENSE, scales: Sequence[int] = (), top: int = 5
) -> Iterator[Prediction]:
    """Each image's `top` classes by the net of a run or of a file of weights, in the order of the files.

    `images` are files, folders, in which every image at any depth counts, and patterns such as "photos/*.jpg". A file that cannot be read
    has an error instead; the others are answered. Raises InputError for a net that cannot be read, and where there is no file at all.
    """
    files = listed(images)
    model, variables, metadata = load(path)
    scales = tuple(scales) or (metadata["preprocessing"]["scale"],)
    if min(scales) < model.image_size:
        raise InputError(f"scales is {scales}: expected at least the size of the net's images, {model.image_size}")
    if protocol.flip is None and not metadata["flip"]:
        protocol = Protocol(protocol.name, False, protocol.softmax_first, protocol.ceil)
    from vgg_jax.data import read_scaled  # TensorFlow is for those who read files

    readable: list[int] = []
    errors: dict[int, str] = {}

    def scaled() -> Iterator[list[Any]]:
        for index, file in enumerate(files):
            try:
                image = read_scaled(file, scales, metadata["preprocessing"]["exif"])
            except InputError as error:
                errors[index] = str(error)
                continue
            readable.append(index)
            yield image

    mesh = data_mesh(1, jax.devices()[:1])
    mean_rgb = metadata["preprocessing"]["mean_rgb"]
    found: dict[int, list[tuple[str, float]]] = {}
    for number, posterior in stream_posteriors(model, variables, scaled(), mesh=mesh, protocol=protocol, mean_rgb=mean_rgb):
        best = posterior.argsort()[::-1][:top]
        found[readable[number]] = [(metadata["classes"][i], float(posterior[i])) for i in best]
    for index, file in enumerate(files):
        yield Prediction(file, found.get(index, []), errors.get(index))


def listed(images: Sequence[str]) -> list[str]:
    """The files that these names mean. One that names nothing stays, to be reported. Raises InputError where a folder has no image."""
    files: list[str] = []
    for name in images:
        if os.path.isdir(name):
            inside = sorted(str(file) for file in Path(name).rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise InputError(f"no images in {name!r}: expected files ending in {', '.join(SUFFIXES)}")
            files += inside
        else:
            files += [name] if os.path.lexists(name) else sorted(glob.glob(name, recursive=True)) or [name]
    return files
