"""Writes an exported file."""

import os
from collections.abc import Callable
from pathlib import Path

from vgg_jax.errors import InputError, install_hint
from vgg_jax.export.spec import REQUIRED_EXTRA, SAVEDMODEL_METADATA, ExportSpec, format_of
from vgg_jax.paths import require_local
from vgg_jax.runs.files import replace_atomically
from vgg_jax.weights import save


def write(out: str | os.PathLike, spec: ExportSpec, layout: str = "vgg_jax") -> None:
    """Writes a net in the format that `format_of(out)` tells.

    The file is complete, or the target stays as it was.

    Args:
        out: The file, or for .savedmodel the folder. An earlier export is replaced.
        spec: The net, with its inputs and outputs.
        layout: Names and axis order in a .safetensors file, one of `SAVE_LAYOUTS`.

    Raises:
        InputError: The library of the format is not installed, the format cannot hold what
            `spec` or `layout` ask for, or `out` is a folder that is no earlier export.
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
