"""Writes an exported file."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vgg_jax.errors import InputError, install_hint
from vgg_jax.export.spec import REQUIRED_EXTRA, SAVEDMODEL_METADATA, ExportSpec, format_of
from vgg_jax.export.spec import fold_batch_norm as fold
from vgg_jax.model import VGG
from vgg_jax.paths import require_local
from vgg_jax.runs.files import replace_atomically
from vgg_jax.weights import from_loaded, save


def export(
    path: str | os.PathLike,
    model: VGG,
    variables: Mapping[str, Any],
    metadata: Mapping[str, Any],
    *,
    output: str = "logits",
    uint8: bool = True,
    fold_batch_norm: bool = False,
    bfloat16: bool = False,
    layout: str = "vgg_jax",
) -> None:
    """Exports a net to a file that other programs run, as `vgg-jax export` does.

    The file is complete, or the target stays as it was. `vgg_jax.export.verify.verify` checks it.

    Args:
        path: A file ending in .onnx, .stablehlo or .safetensors, or a folder ending in
            .savedmodel. The ending determines the format. An earlier export is replaced.
        model: The net. Its `other_sizes` is not exported: the logits are those of images of
            image_size.
        variables: Its variables.
        metadata: "net", "classes" and "preprocessing", as `vgg_jax.load` returns them.
        output: "logits" (N, K), for images of image_size; "posteriors" (N, K), for images of
            image_size or larger; or "score_map" (N, h, w, K), likewise. A .safetensors file holds
            weights, and takes "logits" only.
        uint8: True for uint8 images (N, H, W, 3), which are preprocessed inside; False for float32
            images on the 0-255 scale, less the mean. A .safetensors file takes True only.
        fold_batch_norm: Folds batch normalisations into the convolutions.
        bfloat16: Stores the weights as bfloat16. The computation is in float32.
        layout: Names and axis order in a .safetensors file: "vgg_jax", "torchvision" or "timm".

    Raises:
        InputError: The arguments do not fit together, the ending is unknown, the library of the
            format is not installed, or the path cannot be written to.
    """
    weights = from_loaded(model, variables, metadata)
    if fold_batch_norm:
        weights = fold(weights)
    write(path, ExportSpec(weights, output, uint8, bfloat16), layout)


def write(out: str | os.PathLike, spec: ExportSpec, layout: str = "vgg_jax") -> None:
    """Writes a net in the format that `format_of(out)` tells.

    The file is complete, or the target stays as it was.

    Args:
        out: The file, or for .savedmodel the folder. An earlier export is replaced.
        spec: The net, with its inputs and outputs.
        layout: Names and axis order in a .safetensors file, one of `SAVE_LAYOUTS`.

    Raises:
        InputError: The library of the format is not installed, the format cannot hold what
            `spec` or `layout` ask for, its folder is missing, or `out` is a folder that is no
            earlier export.
    """
    out, file_format = require_local(out, is_output=True), format_of(out)
    if file_format == "safetensors" and (spec.output, spec.uint8) != ("logits", True):
        raise InputError(
            f"{out} holds weights only: expected the output logits of uint8 images; "
            "the other formats have other outputs and inputs"
        )
    if file_format != "safetensors" and layout != "vgg_jax":
        raise InputError(
            f"layout is {layout!r}: expected a .safetensors file with it; {out} is a program"
        )
    if out.is_dir() and not (file_format == "savedmodel" and (out / SAVEDMODEL_METADATA).exists()):
        raise InputError(f"{out} is a folder: expected a name that is free, or an earlier export's")
    if file_format == "safetensors":
        save(out, spec.weights, layout, spec.dtype, spec.metadata())
        return
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out}: there is no folder {out.parent}; create it")
    try:
        write_program = _program_writer(file_format)
    except ImportError as error:
        raise InputError(
            f"writing {out} needs {error.name}: {install_hint(REQUIRED_EXTRA[file_format])}"
        ) from error
    with replace_atomically(out) as temporary:
        write_program(temporary, spec)


def _program_writer(file_format: str) -> Callable[[Path, ExportSpec], None]:
    """Imports the writer of a format; it imports the library of the format."""
    if file_format == "onnx":
        from vgg_jax.export import onnx

        return onnx.write
    if file_format == "stablehlo":
        from vgg_jax.export import stablehlo

        return stablehlo.write
    from vgg_jax.export import savedmodel

    return savedmodel.write
