"""Explains the class of one photo, as a picture and as arrays."""

import contextlib
import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vgg_jax.configs.evaluation import DENSE
from vgg_jax.errors import InputError, shorten_names
from vgg_jax.evaluation.class_names import map_class_indices
from vgg_jax.evaluation.dense import resolve_protocol
from vgg_jax.evaluation.explain import check_layer, explain
from vgg_jax.preprocessing import load_resized
from vgg_jax.reporting.net_figures import plot_explanation
from vgg_jax.reporting.output import check_out, require_matplotlib, write_out
from vgg_jax.reporting.style import figure_bytes
from vgg_jax.runs.files import check_free
from vgg_jax.weights import load


def explain_photo(
    path: str | os.PathLike,
    photo: str | os.PathLike,
    out: str | os.PathLike,
    *,
    class_name: str | None = None,
    scale: int | None = None,
    layer: str | None = None,
    overwrite: bool = False,
    preprocessing: str | Mapping[str, Any] | None = None,
    image_size: int | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[str, float, list[str]]:
    """Writes the score map and Grad-CAM of a photo.

    The .npz file has the fields of `Explanation`, the names of the "classes", the explained
    "class", and the "photo" at the test scale.

    Args:
        path: A run's folder, a weight file, or a name of published weights.
        photo: The image file.
        out: The .png file. An .npz file of the same name is written beside it.
        class_name: The class to explain, by its name, its WordNet id, or one of several names
            between commas; None for the most probable one.
        scale: Test scale Q; None for the net's own.
        layer: Name of the layer for Grad-CAM; None for the default of `explain`.
        overwrite: Replace existing files.
        preprocessing: As in `vgg_jax.load`.
        image_size: As in `vgg_jax.load`.
        classes: As in `vgg_jax.load`.

    Returns:
        The class, its posterior, and the names of the two files.

    Raises:
        InputError: An argument is wrong, a file exists or cannot be written, or a package is not
            installed.
        DataError: The photo cannot be read.
    """
    require_matplotlib()
    image_file = check_out(out, (".png",), overwrite)
    array_file = image_file.with_suffix(".npz")
    check_free(array_file, overwrite)
    model, variables, metadata = load(
        path, preprocessing=preprocessing, image_size=image_size, classes=classes
    )
    names = list(metadata["classes"])
    index = None if class_name is None else [_find_class(names, class_name)]
    if layer is not None:
        check_layer(model, layer)
    if scale is not None and scale < model.image_size:
        raise InputError(
            f"scale is {scale}: expected at least the size of the net's images, {model.image_size}"
        )
    protocol, scales = resolve_protocol(
        DENSE, () if scale is None else (scale,), model, metadata, path
    )
    settings = metadata["preprocessing"]
    pixels = load_resized(photo, scales, settings["exif"], protocol.rounding)[0]
    (explanation,) = explain(
        model,
        variables,
        pixels[None],
        mean_rgb=settings["mean_rgb"],
        classes=index,
        layer=layer,
    )
    figure = plot_explanation(pixels, explanation, names)
    name = names[explanation.class_index]
    arrays = explanation._asdict() | {"classes": np.array(names, str), "class": name}
    content = io.BytesIO()
    np.savez(content, photo=pixels, **arrays)
    write_out(image_file, figure_bytes(figure, "png"))
    write_out(array_file, content.getvalue())
    files = [os.fspath(file) for file in (image_file, array_file)]
    return name, float(explanation.posterior[explanation.class_index]), files


def _find_class(names: Sequence[str], name: str) -> int:
    """Finds a class by its name, its WordNet id, or one of its names between commas."""
    for match in ("exact", "name"):
        with contextlib.suppress(InputError):
            return int(map_class_indices([name], names, "", match)[0])
    similar = [other for other in names if name.casefold() in other.casefold()]
    raise InputError(
        f"the class is {name!r}: expected one of the net's {len(names)}: "
        f"{shorten_names(similar or names)}"
    )
