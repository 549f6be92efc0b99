"""From a trained net and image files to the most probable classes of each."""

import glob
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax

from vgg_jax.configs.evaluation import DENSE, EvalProtocol
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.errors import InputError
from vgg_jax.evaluation.dense import iter_posteriors, resolve_protocol
from vgg_jax.paths import is_remote
from vgg_jax.weights import load

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")  # of what is looked at in a folder


class Prediction(NamedTuple):
    """What is to be said of one file: its most probable classes, or why it has none."""

    file: str
    top: list[tuple[str, float]]
    error: str | None = None


def predict(
    path: str | os.PathLike,
    images: Sequence[str],
    *,
    protocol: EvalProtocol = DENSE,
    scales: Sequence[int] = (),
    top: int = 5,
) -> Iterator[Prediction]:
    """Each image's `top` classes by the net of a run or of a file of weights, in the order in which they are known.

    `images` are files, folders, in which every image at any depth counts, and patterns such as "photos/*.jpg". A file that cannot be read
    has an error instead; the others are answered. Raises InputError for a net that cannot be read, and where there is no file at all.
    """
    if top < 1:
        raise InputError(f"top is {top}: expected at least 1")
    files = expand_paths(images)
    model, variables, metadata = load(path)
    protocol, scales = resolve_protocol(protocol, scales, model, metadata, path)
    from vgg_jax.data import load_resized  # TensorFlow is for those who read files

    readable: list[str] = []
    failed: list[Prediction] = []

    def scaled() -> Iterator[list[Any]]:
        # Not in the caller's thread: a KeyboardInterrupt within TensorFlow's call corrupts its memory.
        with ThreadPoolExecutor(1, "reader") as reader:
            for file in files:
                try:
                    image = reader.submit(
                        load_resized, file, scales, metadata["preprocessing"]["exif"]
                    ).result()
                except InputError as error:
                    failed.append(Prediction(file, [], str(error)))
                    continue
                readable.append(file)
                yield image

    mesh = make_mesh(1, jax.devices()[:1])
    mean_rgb = metadata["preprocessing"]["mean_rgb"]
    for number, posterior in iter_posteriors(
        model, variables, scaled(), mesh=mesh, protocol=protocol, mean_rgb=mean_rgb
    ):
        while failed:
            yield failed.pop(0)
        yield Prediction(
            readable[number],
            [
                (metadata["classes"][i], float(posterior[i]))
                for i in posterior.argsort()[::-1][:top]
            ],
        )
    yield from failed


def expand_paths(images: Sequence[str]) -> list[str]:
    """The files that these names mean. One that names nothing stays, to be reported. Raises InputError where there is none."""
    files: list[str] = []
    for name in images:
        if is_remote(name):
            files.append(name)
        elif os.path.isdir(name):
            files += sorted(
                str(file)
                for file in Path(name).rglob("*")
                if file.suffix.lower() in SUFFIXES and file.is_file()
            )
        else:
            files += (
                [name]
                if os.path.lexists(name)
                else sorted(glob.glob(name, recursive=True)) or [name]
            )
    if not files:
        raise InputError(
            f"no images in {', '.join(map(repr, images))}: expected files ending in {', '.join(SUFFIXES)}"
        )
    return files
