"""Writes a net as a file that others run: safetensors, ONNX, StableHLO or a TensorFlow SavedModel."""

import os
import shutil

from vgg_jax.errors import InputError
from vgg_jax.export.spec import REQUIRED_EXTRA, SAVEDMODEL_METADATA, ExportSpec, format_of
from vgg_jax.paths import require_local
from vgg_jax.weights.io import save


def write(out: str | os.PathLike, artefact: ExportSpec, layout: str = "vgg_jax") -> None:
    """Writes the file that `kind_of(out)` says, whole or not at all; a .safetensors file in a `layout`.

    Raises InputError where the library that it needs is not installed, for a folder in its place that is no earlier export, and for what
    the kind of file cannot hold: a program has no layout of weights, and weights no other output.
    """
    out, kind = require_local(out), format_of(out)
    if kind == "safetensors" and (artefact.output, artefact.uint8) != ("logits", True):
        raise InputError(
            f"{out} holds weights only: expected the output logits of uint8 images with it; others are for .onnx and the others"
        )
    if kind != "safetensors" and layout != "vgg_jax":
        raise InputError(
            f"layout is {layout!r}: expected a .safetensors file with it; {out} is a program"
        )
    if out.is_dir() and not (kind == "savedmodel" and (out / SAVEDMODEL_METADATA).exists()):
        raise InputError(f"{out} is a folder: expected a name that is free, or an earlier export's")
    temporary = out.with_name(out.name + ".new")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    try:
        if kind == "onnx":
            from vgg_jax.export.onnx import write
        elif kind == "stablehlo":
            from vgg_jax.export.stablehlo import write
        elif kind == "savedmodel":
            from vgg_jax.export.savedmodel import write
    except ImportError as error:
        raise InputError(
            f"writing {out} needs {error.name}: pip install 'vgg-jax[{REQUIRED_EXTRA[kind]}]'"
        ) from error
    try:
        if kind == "safetensors":
            save(temporary, artefact.weights, layout, artefact.dtype, artefact.metadata())
        else:
            write(temporary, artefact)
        if out.is_dir():
            shutil.rmtree(out)
        os.replace(temporary, out)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
