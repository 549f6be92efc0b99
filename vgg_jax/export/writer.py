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
from vgg_jax.runs.files import check_free, replace_atomically, usual_permissions
from vgg_jax.weights import from_loaded, save
from vgg_jax.weights.writer import SHARED_NETS

# Side of the last pooling's output, and features of fc6 and fc7, in torchvision and timm.
_PYTORCH_HEAD = (7, 4096, 4096)


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
    onnx_float16: bool = False,
    layout: str = "vgg_jax",
    overwrite: bool = False,
) -> None:
    """Exports a net to a file that other programs run, as `vgg-jax export` does.

    The file is complete, or the target stays as it was. `vgg_jax.export.verify.verify` checks it.

    Args:
        path: A file ending in .onnx, .stablehlo or .safetensors, or a folder ending in
            .savedmodel. The ending determines the format.
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
        onnx_float16: Stores the weights and computes in float16, in an .onnx file. The images and
            the output keep their types.
        layout: Names and axis order in a .safetensors file: "vgg_jax", "torchvision" or "timm".
        overwrite: Replaces an existing file or an earlier export.

    Raises:
        InputError: The arguments do not fit together, the ending is unknown, the library of the
            format is not installed, or the path exists or cannot be written to.
    """
    weights = from_loaded(model, variables, metadata)
    if fold_batch_norm:
        weights = fold(weights)
    spec = ExportSpec(weights, output, uint8, bfloat16, onnx_float16)
    write(path, spec, layout, overwrite)


def write(
    out: str | os.PathLike, spec: ExportSpec, layout: str = "vgg_jax", overwrite: bool = False
) -> None:
    """Writes a net in the format that `format_of(out)` tells.

    The file is complete, or the target stays as it was.

    Args:
        out: The file, or for .savedmodel the folder.
        spec: The net, with its inputs and outputs.
        layout: Names and axis order in a .safetensors file, one of `SAVE_LAYOUTS`.
        overwrite: Replace an existing file or an earlier export.

    Raises:
        InputError: The library of the format is not installed, the format or the library cannot
            hold what `spec` or `layout` ask for, its folder is missing, `out` exists, or it is a
            folder that is no earlier export.
    """
    out, file_format = require_local(out, is_output=True), format_of(out)
    _check_format(out, file_format, spec, layout)
    if out.is_dir() and not (file_format == "savedmodel" and (out / SAVEDMODEL_METADATA).exists()):
        raise InputError(f"{out} is a folder: expected a name that is free, or an earlier export's")
    check_free(out, overwrite)
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
    try:
        with replace_atomically(out) as temporary, usual_permissions(temporary):
            write_program(temporary, spec)
    except OSError as error:
        raise InputError(
            f"cannot write {out} ({error.strerror or error}): "
            "expected a folder that can be written to, with room for the file"
        ) from error


def _check_format(out: Path, file_format: str, spec: ExportSpec, layout: str) -> None:
    """Raises InputError if the format, or the library of the layout, has no such file."""
    if file_format == "safetensors" and (spec.output, spec.uint8) != ("logits", True):
        raise InputError(
            f"{out} holds weights only: expected the output logits of uint8 images; "
            "the other formats have other outputs and inputs"
        )
    if file_format != "safetensors" and layout != "vgg_jax":
        raise InputError(
            f"layout is {layout!r}: expected a .safetensors file with it; {out} is a program"
        )
    if file_format != "onnx" and spec.float16:
        raise InputError(
            f"{out} cannot compute in float16: expected a name that ends in .onnx with it; pass "
            "--bfloat16 to halve other files"
        )
    model = spec.weights.model
    sides = (model.image_size // 2 ** len(model.config.stages), *model.config.fc)
    is_shared = layout in ("torchvision", "timm") and spec.weights.net in SHARED_NETS
    if is_shared and sides != _PYTORCH_HEAD:
        raise InputError(
            f"the net reads {model.image_size}x{model.image_size} images and has "
            f"{' and '.join(map(str, model.config.fc))} features in fc6 and fc7: "
            f"expected 224x224 and 4096, the only ones that {layout} loads; pass the layout vgg_jax"
        )


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
