"""Reads weights from a run's folder, or from a file of vgg_jax or another library."""

import logging
import math
import numbers
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vgg_jax.configs.evaluation import check_rounding
from vgg_jax.configs.models import CONFIGS
from vgg_jax.errors import InputError, single_line
from vgg_jax.model import POOLS, VGG
from vgg_jax.paths import local_copy, to_path
from vgg_jax.weights.detect import DetectedModel, detect, set_image_size
from vgg_jax.weights.fetch import resolve
from vgg_jax.weights.file_kinds import describe_folder
from vgg_jax.weights.formats import open_file, reraise_damaged, unsupported_dtype
from vgg_jax.weights.imagenet import CLASSES
from vgg_jax.weights.keras_hub import find_preprocessing, has_layer
from vgg_jax.weights.layouts import CONV1_KERNEL, TORCHVISION_FEATURES, UNIT_STD
from vgg_jax.weights.memory import copy_for_jax
from vgg_jax.weights.source_images import (
    SourceImages,
    check_classes,
    from_preprocessing,
    parse,
)
from vgg_jax.weights.tensor_file import TensorFile
from vgg_jax.weights.weights import Weights, fold_std_into_conv1, from_loaded, to_metadata

logger = logging.getLogger(__name__)

Trees = dict[str, dict[str, dict[str, np.ndarray]]]  # collection -> layer -> parameter


def read(
    path: str | os.PathLike,
    net: str | None = None,
    preprocessing: str | Mapping[str, Any] | None = None,
    image_size: int | None = None,
    classes: Sequence[str] | None = None,
    download: bool = False,
) -> Weights:
    """Reads the weights of a run's best epoch, of a file, or of a name of published weights.

    Names and shapes decide the layout and the net of a file. A record at INFO says what a file of
    another library was taken for.

    Args:
        path: A run's folder, a weight file, or a name that `vgg-jax weights` lists, such as
            "torchvision/vgg16", whose file is in a cache. A path that exists goes before a name.
        net: Name of the net, for a file whose tensors fit several nets (A and A-LRN).
        preprocessing: As in `vgg_jax.load`, for a file that does not name its own.
        image_size: Side of the images in pixels. A file whose fc6 reads one position needs it: 32,
            or the size of images of which fc6 reads the mean of pool5. The kernel of fc6 is then
            repeated over all positions, divided by their number. Other files tell the size.
        classes: Names of the classes, as in `vgg_jax.load`.
        download: Download the file of a name if no cache has it.

    Returns:
        The weights, with the file's values as float32. A standard deviation by which the images of
        the file are divided is folded into conv1_1.

    Raises:
        InputError: The file cannot be read or is not a VGG. The message lists every missing,
            unexpected or misshapen tensor. Or an argument is not possible for the file.
    """
    if net is not None and net not in tuple(CONFIGS):  # a list has no hash
        raise InputError(f"net is {net!r}: expected one of {', '.join(CONFIGS)}")
    if image_size is not None and not isinstance(image_size, numbers.Integral):
        raise InputError(f"image_size is {image_size!r}: expected a number of pixels, an integer")
    source, published = resolve(path, download)
    if to_path(source).is_dir():
        return from_loaded(*load(source, net, preprocessing, image_size, classes))
    if published is not None and preprocessing is None:
        preprocessing = published.preprocessing
    with local_copy(source) as file:
        weights = _read_file(file, net, preprocessing, image_size, classes)
    if weights.source_notes:
        logger.info(f"{path}: {weights}")
    return weights


def load(
    path: str | os.PathLike,
    net: str | None = None,
    preprocessing: str | Mapping[str, Any] | None = None,
    image_size: int | None = None,
    classes: Sequence[str] | None = None,
    download: bool = False,
) -> tuple[VGG, dict[str, Any], dict[str, Any]]:
    """Loads the network of a run's folder, of a weight file, or of a name of published weights.

    Args:
        path: A run's folder, for `vgg_jax.runs.checkpoint.load_best`, or a file or a name, for
            `load_file`.
        net: Name of the net, for a file only.
        preprocessing: As for `read`, for a file only.
        image_size: As for `read`, for a file only.
        classes: As for `read`.
        download: As for `read`.

    Returns:
        `(model, variables, metadata)`, as those functions do.

    Raises:
        InputError: There is no network, or it cannot be read.
    """
    if not to_path(path).is_dir():
        return load_file(path, net, preprocessing, image_size, classes, download)
    for_files_only = {"net": net, "preprocessing": preprocessing, "image_size": image_size}
    for name, value in for_files_only.items():
        if value is not None:
            raise InputError(
                f"{name} is {value!r} and {path} is a folder: "
                f"expected a {name} for a file of weights only; a run knows its own"
            )
    folder = to_path(path)
    problem = "" if (folder / "run.json").exists() else describe_folder(folder)
    if problem:
        raise InputError(f"{path} {problem}: expected the workdir of a run, or a weight file")
    from vgg_jax.runs.checkpoint import load_best  # orbax comes with the extra `train`

    model, variables, metadata = load_best(path)
    if classes is not None:
        metadata |= {"classes": check_classes(classes, model.num_classes)}
    return model, variables, metadata


def load_file(
    path: str | os.PathLike,
    net: str | None = None,
    preprocessing: str | Mapping[str, Any] | None = None,
    image_size: int | None = None,
    classes: Sequence[str] | None = None,
    download: bool = False,
) -> tuple[VGG, dict[str, Any], dict[str, Any]]:
    """Loads the network of a weight file.

    Args:
        path: A weight file, or a name of published weights.
        net: Name of the net, for a file whose tensors fit several nets.
        preprocessing: As for `read`.
        image_size: As for `read`.
        classes: As for `read`.
        download: As for `read`.

    Returns:
        `(model, variables, metadata)`, for float RGB images (N, H, W, 3) on the 0-255 scale
        minus `metadata["preprocessing"]["mean_rgb"]`; `model.in_channels` may be other than 3 in a
        file of vgg_jax. A std of the preprocessing is folded into conv1_1; `metadata["source"]`
        names such changes and what was assumed, and `metadata["path"]` is `path`. If
        the file has no fully connected layers, the model gives `features` up to pool5 only. The
        variables are NumPy arrays. They must not be changed in place once jax has them, because on
        a CPU it may use their memory.

    Raises:
        InputError: As `read` does.
    """
    weights = read(path, net, preprocessing, image_size, classes, download)
    return weights.model, weights.variables, to_metadata(weights) | {"path": str(path)}


def _read_file(
    path: Path,
    net: str | None,
    preprocessing: str | Mapping[str, Any] | None,
    image_size: int | None,
    classes: Sequence[str] | None,
) -> Weights:
    file = open_file(path)
    try:
        metadata = _check_metadata(file.metadata)
        shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
        in_channels = metadata["in_channels"]
        own_size = metadata.get("image_size")
        if image_size is not None and own_size not in (None, image_size):
            raise InputError(
                f"image_size is {image_size}, and the file names {own_size}: expected no "
                "image_size for such a file; leave it out"
            )
        detected = detect(shapes, net or metadata.get("net"), in_channels)
        _check_pooling(file, detected, image_size)
        detected = set_image_size(detected, own_size or image_size)
    except InputError as error:
        # A tensor's name may hold a line break.
        raise InputError(f"{path}: {single_line(error, max_length=None)}") from error
    if detected.left_out:
        left_out = single_line(", ".join(detected.left_out), max_length=None)
        logger.warning(
            f"{path}: only the convolutions are read, {detected}; another head is left out: "
            f"{left_out}"
        )
    images = _source_images(path, file, detected, metadata, preprocessing)
    trees = _read_tensors(path, file, detected, images.bgr)
    params, top = trees["params"], detected.top
    if _is_features_only(detected, params):
        if preprocessing is not None:
            raise InputError(
                f"preprocessing is {preprocessing!r}, and {path} is torchvision's "
                "IMAGENET1K_FEATURES: expected no preprocessing for this file; leave it out"
            )
        top = False
        if not _names_colours(metadata):
            images = from_preprocessing(TORCHVISION_FEATURES, False, "of IMAGENET1K_FEATURES")
        params = {name: layer for name, layer in params.items() if not name.startswith("fc")}
    names, classes_note = _classes(path, metadata, detected.num_classes, top, classes)
    colours = images.to_preprocessing()._replace(**metadata["preprocessing"])
    std = colours.std_rgb
    is_divided = any(value != 1 for value in std)
    size_note = f"image size {detected.image_size}"
    if detected.mean_window > 1:
        size_note += ", global average pooling before fc6"
    head_notes = [file.note] if file.note else []
    notes = (*[size_note, *head_notes] * top, str(images), *[classes_note] * top)
    return Weights(
        net=detected.net,
        layout=detected.layout.name,
        model=VGG(
            detected.config,
            len(names),
            detected.batch_norm,
            image_size=detected.image_size,
            pool=metadata["pool"],
            in_channels=in_channels,
        ),
        params=fold_std_into_conv1(params, std) if is_divided else params,
        batch_stats=trees["batch_stats"],
        top=top,
        preprocessing=colours._replace(std_rgb=(1.0,) * in_channels),
        classes=names,
        source_std=std if is_divided else (),
        source_bgr=images.bgr,
        # The metadata of vgg_jax's own files name the net, and leave nothing to assume.
        source_notes=() if "net" in metadata and _names_colours(metadata) else notes,
    )


def _check_pooling(file: TensorFile, detected: DetectedModel, image_size: int | None) -> None:
    """Refuses a head after global max pooling, unless it pools one position."""
    smallest = 2 ** len(detected.config.stages)
    is_pooled = detected.top and detected.image_size == smallest != image_size
    if is_pooled and has_layer(file.config, "GlobalMaxPooling2D"):
        raise InputError(
            "it has GlobalMaxPooling2D before its dense layers: expected GlobalAveragePooling2D, "
            "which fc6 can compute; save a model of the convolutions alone to use those"
        )


def _names_colours(metadata: Mapping[str, Any]) -> bool:
    return not {"mean_rgb", "std_rgb"}.isdisjoint(metadata["preprocessing"])


def _source_images(
    path: Path,
    file: TensorFile,
    detected: DetectedModel,
    metadata: Mapping[str, Any],
    preprocessing: str | Mapping[str, Any] | None,
) -> SourceImages:
    """The images that a file's net was trained with: its own, passed, or assumed."""
    layout, in_channels = detected.layout, metadata["in_channels"]
    is_rgb = in_channels == 3
    if _names_colours(metadata):
        if preprocessing is not None:
            raise InputError(
                f"preprocessing is {preprocessing!r}, and {path} names a mean of its own: "
                "expected no preprocessing for such a file; leave it out"
            )
        # Files without a rounding are older, and were cropped so.
        colours = layout.preprocessing._replace(rounding="nearest")
        if not is_rgb and colours.std_rgb == UNIT_STD:
            colours = colours._replace(std_rgb=(1.0,) * in_channels)
        colours = colours._replace(**metadata["preprocessing"])
        for name, values in (("mean_rgb", colours.mean_rgb), ("std_rgb", colours.std_rgb)):
            if len(values) != in_channels:
                raise InputError(
                    f"{path} names no {name} for its {in_channels} channels: expected the metadata "
                    f"mean_rgb and std_rgb, with a value for each"
                )
        return from_preprocessing(colours, layout.bgr and is_rgb, "from the file")
    if preprocessing is not None:
        return parse(preprocessing, layout, in_channels)
    if not is_rgb:
        raise InputError(
            f"{path} has in_channels {in_channels} and names no mean: expected the mean and the "
            "std of its images; pass mean and std in preprocessing= to vgg_jax.load, or --mean and "
            "--std to vgg-jax import"
        )
    if not layout.shared:
        return from_preprocessing(layout.preprocessing, layout.bgr, "assumed from the layout")
    preset = None
    if layout.name == "keras 3":
        with reraise_damaged(path):
            has_head = detected.top or bool(detected.left_out)
            preset = find_preprocessing(path, file.config, has_head)
    if preset is None:
        raise InputError(
            f"{path} has names that {layout.shared} share: "
            "expected one of these; pass preprocessing= to vgg_jax.load, or "
            "--preprocessing to vgg-jax import"
        )
    return from_preprocessing(preset, False, "from KerasHub's JSON")


def _is_features_only(detected: DetectedModel, params: Mapping[str, Mapping[str, Any]]) -> bool:
    """True for IMAGENET1K_FEATURES: convolutions for the authors' images, a classifier of NaN."""
    if detected.layout.name != "torchvision" or not detected.top:
        return False
    # A net that diverged has NaN in some layers of its head only, or in its convolutions too.
    is_nan = {
        name: bool(np.isnan(layer["kernel"]).all())
        for name, layer in params.items()
        if "kernel" in layer
    }
    return all(value == name.startswith("fc") for name, value in is_nan.items())


def _classes(
    path: Path,
    metadata: Mapping[str, Any],
    num_classes: int,
    top: bool,
    class_names: Sequence[str] | None,
) -> tuple[tuple[str, ...], str]:
    """The names of the classes, and whose names they are."""
    if class_names is not None:
        if not top:
            raise InputError(
                f"{path} has no fully connected layers and classes are given: "
                "expected no classes; leave them out"
            )
        return check_classes(class_names, num_classes), "class names as passed"
    names = metadata.get("classes")
    if not names:
        is_imagenet = num_classes == len(CLASSES)
        note = (
            "class names of ImageNet, assumed from their number"
            if is_imagenet
            else "classes are numbers"
        )
        return (CLASSES if is_imagenet else tuple(map(str, range(num_classes)))), note
    if top and len(names) != num_classes:
        raise InputError(
            f"{path} names {len(names)} classes and fc8 has {num_classes}: expected a name for each"
        )
    return names, "class names from the file"


def _read_tensors(path: Path, file: TensorFile, detected: DetectedModel, bgr: bool) -> Trees:
    """Reads the values into the names and axis order of vgg_jax, as float32.

    `bgr` tells that conv1_1 reads BGR. A float64 kernel of conv1_1 stays so: `save` writes one
    after a division by a std.
    """
    count = sum(math.prod(tensor.foreign_shape) for tensor in detected.tensors)
    size = file.num_bytes
    # A value has at least 2 bytes, and weights compress by less than 8.
    if count > 4 * size:
        raise InputError(
            f"{path} claims {count:,} values in {size:,} bytes: expected all of them in the file"
        )
    trees: Trees = {"params": {}, "batch_stats": {}}
    with reraise_damaged(path):
        for tensor in detected.tensors:
            collection, layer, param = tensor.path
            array = file.tensors[tensor.foreign_name].read()
            if array.dtype.kind in "biuc":
                raise unsupported_dtype(path, tensor.foreign_name, array.dtype)
            is_conv1 = tensor.path == CONV1_KERNEL
            dtype = np.float64 if is_conv1 and array.dtype == np.float64 else np.float32
            if is_conv1:
                tensor = tensor._replace(bgr=bgr and tensor.shape[2] == 3)
            # One copy: of net D, a second one takes a second (docs/performance.md#first-answer).
            value = tensor.from_foreign(array, partial(copy_for_jax, dtype=dtype))
            trees[collection].setdefault(layer, {})[param] = value
    if detected.mean_window > 1:
        fc6, positions = trees["params"]["fc6"], detected.mean_window**2
        fc6["kernel"] = np.tile(fc6["kernel"] / np.float32(positions), (positions, 1))
    return trees


def _check_metadata(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the metadata of vgg_jax's own files, and MatConvNet's mean.

    Args:
        raw: The metadata of the file.

    Returns:
        "net", "image_size" and "classes", as far as the file has them, "in_channels", "pool",
        and "preprocessing", a dict of fields of `Preprocessing`.

    Raises:
        InputError: A value is not possible.
    """
    metadata: dict[str, Any] = {"in_channels": 3, "pool": raw.get("pool", "max")}
    preprocessing: dict[str, Any] = {}
    try:
        if "net" in raw:
            if raw["net"] not in CONFIGS:
                raise ValueError(f"net is {raw['net']!r}: expected one of {', '.join(CONFIGS)}")
            metadata["net"] = raw["net"]
        if "image_size" in raw:
            metadata["image_size"] = _to_int("image_size", raw["image_size"])
        if "in_channels" in raw:
            metadata["in_channels"] = _to_int("in_channels", raw["in_channels"])
        if metadata["pool"] not in POOLS:
            raise ValueError(f"pool is {metadata['pool']!r}: expected one of {', '.join(POOLS)}")
        if "classes" in raw:
            metadata["classes"] = tuple(str(name) for name in raw["classes"])
        for name in ("mean_rgb", "std_rgb"):
            if name in raw:
                preprocessing[name] = _check_colour(name, raw[name], metadata["in_channels"])
        if raw.get("scale") is not None:
            preprocessing["scale"] = _to_int("scale", raw["scale"])
        preprocessing |= {name: bool(raw[name]) for name in ("flip", "exif") if name in raw}
        if "rounding" in raw:
            check_rounding(raw["rounding"])
            preprocessing["rounding"] = raw["rounding"]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"its metadata cannot be read ({error}): expected the metadata that vgg_jax writes"
        ) from error
    return metadata | {"preprocessing": preprocessing}


def _to_int(name: str, value: Any) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError) as error:  # int(inf) overflows
        raise ValueError(f"{name} is {value!r}: expected an integer") from error


def _check_colour(name: str, values: Any, in_channels: int) -> tuple[float, ...]:
    colour = tuple(float(value) for value in values)
    is_valid = len(colour) == in_channels and np.isfinite(colour).all()
    if not is_valid or (name == "std_rgb" and min(colour) <= 0):
        sign = " positive" if name == "std_rgb" else ""
        raise ValueError(
            f"{name} is {colour}: expected a finite{sign} number for each of {in_channels} channels"
        )
    return colour
