"""Weights of VGGs, from a run's folder or a file, ours or another library's: in our names, order of axes and input convention."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vgg_jax.configs.export import SAVE_LAYOUTS
from vgg_jax.configs.models import CONFIGS
from vgg_jax.errors import InputError
from vgg_jax.model import VGG
from vgg_jax.paths import local_copy, require_local, to_path
from vgg_jax.weights.detect import detect
from vgg_jax.weights.formats import open_file, reraise_damaged
from vgg_jax.weights.imagenet import CLASSES
from vgg_jax.weights.layouts import FEATURES, LAYOUTS, UNIT_STD, Preprocessing, tensor_table

Tree = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """The tensors of a file, bit by bit, in our names and order, and what is known of them."""

    net: str
    layout: str  # whose names and order they came in
    model: VGG
    params: Tree
    batch_stats: Tree
    top: bool  # whether the fully connected layers are there
    preprocessing: Preprocessing  # as the tensors are: a deviation is not yet in conv1_1
    classes: tuple[str, ...]

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes, for images that are not divided by a deviation."""
        params = fold_std_into_conv1(self.params, self.preprocessing.std_rgb)
        return (
            {"params": params, "batch_stats": self.batch_stats}
            if self.model.batch_norm
            else {"params": params}
        )

    def __str__(self) -> str:
        parts = [
            f"{self.net}{' with batch normalisation' if self.model.batch_norm else ''} in {self.layout}'s layout"
        ]
        parts += [] if self.top else ["without fully connected layers"]
        parts += (
            ["conv1_1 turned from BGR to RGB"]
            if any(layout.bgr for layout in LAYOUTS if layout.name == self.layout)
            else []
        )
        if self.preprocessing.std_rgb != UNIT_STD:
            parts.append(
                f"deviation ({', '.join(f'{std:.3f}' for std in self.preprocessing.std_rgb)}) to be divided into conv1_1"
            )
        return ", ".join(parts)


def read(path: str | os.PathLike, net: str | None = None) -> Weights:
    """The weights of a run's best epoch, or in a file, of the layout and net that its names and shapes tell; of `net` if one is given.

    Raises InputError for what cannot be read, or is not a VGG's, naming each tensor that is missing, misshapen or too much.
    """
    if net is not None and net not in CONFIGS:
        raise InputError(f"net is {net!r}: expected one of {', '.join(CONFIGS)}")
    if to_path(path).is_dir():
        model, variables, metadata = load(path, net)
        known = metadata["preprocessing"]
        preprocessing = Preprocessing(
            tuple(known["mean_rgb"]), UNIT_STD, known["scale"], metadata["flip"], known["exif"]
        )
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        model = model.clone(dtype=jnp.float32)  # whatever it was trained in
        return Weights(
            metadata["net"],
            "vgg_jax",
            model,
            params,
            batch_stats,
            True,
            preprocessing,
            metadata["classes"],
        )
    with local_copy(path) as file:
        return _read(file, net)


def _read(path: Path, net: str | None) -> Weights:
    contents = open_file(path)
    try:
        notes = _notes(contents.notes)
        shapes = {name: tensor.shape for name, tensor in contents.tensors.items()}
        found = detect(shapes, net or notes.get("net"), notes.get("image_size"))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    trees: dict[str, dict[str, dict[str, np.ndarray]]] = {"params": {}, "batch_stats": {}}
    numbers = sum(math.prod(row.shape) for row in found.rows)
    if (
        numbers > 4 * path.stat().st_size
    ):  # a number has 2 bytes at least, and weights compress by less than 8
        raise InputError(
            f"{path} says that it holds {numbers:,} numbers in {path.stat().st_size:,} bytes: expected them all in the file"
        )
    with reraise_damaged(path):
        for row in found.rows:
            group, layer, leaf = row.path
            trees[group].setdefault(layer, {})[leaf] = row.from_foreign(
                contents.tensors[row.foreign_name].read().astype(np.float32)
            )
    preprocessing, top = found.layout.preprocessing, found.top
    head = [name for name in trees["params"] if name.startswith("fc")]
    if found.layout.name == "torchvision" and any(
        np.isnan(trees["params"][name]["kernel"]).all() for name in head
    ):
        # IMAGENET1K_FEATURES, the authors' own convolutions: the classifier is not a number, and the images are as the authors had them.
        preprocessing, top = FEATURES, False
        trees["params"] = {
            name: layer for name, layer in trees["params"].items() if name not in head
        }
    preprocessing = preprocessing._replace(**notes["preprocessing"])
    classes = notes.get("classes") or class_names(found.num_classes)
    if top and len(classes) != found.num_classes:
        raise InputError(
            f"{path} names {len(classes)} classes and fc8 has {found.num_classes}: expected a name for each"
        )
    model = VGG(found.config, len(classes), found.batch_norm, image_size=found.image_size)
    return Weights(
        found.net,
        found.layout.name,
        model,
        trees["params"],
        trees["batch_stats"],
        top,
        preprocessing,
        classes,
    )


def load(
    path: str | os.PathLike, net: str | None = None
) -> tuple[VGG, dict[str, Any], dict[str, Any]]:
    """The network of a run's folder, by `vgg_jax.runs.checkpoint.load_best`, or in a file of weights, by `load_file`."""
    if not to_path(path).is_dir():
        return load_file(path, net)
    if net is not None:
        raise InputError(
            f"net is {net!r} and {path} is a folder: expected a net for a file of weights only; a run knows its own"
        )
    from vgg_jax.runs.checkpoint import load_best  # orbax comes with the extra `train`

    return load_best(path)


def load_file(
    path: str | os.PathLike, net: str | None = None
) -> tuple[VGG, dict[str, Any], dict[str, Any]]:
    """The network in a file of weights: `(model, variables, metadata)`, for images float RGB, 0-255, less `mean_rgb`.

    A deviation that the net's images were divided by goes into conv1_1; `metadata["source"]` says what was done. Without fully
    connected layers in the file, the model gives `features` up to pool5 only. Raises InputError as `read` does.
    """
    weights = read(path, net)
    return weights.model, weights.variables, to_metadata(weights)


def to_metadata(weights: Weights) -> dict[str, Any]:
    """What is to be known besides the numbers, as `load_best` gives it."""
    size, known = weights.model.image_size, weights.preprocessing
    preprocessing = {
        "mean_rgb": known.mean_rgb,
        "range": (0, 255),
        "channels": "RGB",
        "image_size": size,
        "scale": known.scale
        or round(size * 256 / 224),  # Q, the shorter side; the centre crop is read
        "interpolation": "bilinear, antialiased",
        "exif": known.exif,
    }
    about = {"net": weights.net, "flip": known.flip, "top": weights.top, "source": str(weights)}
    return about | {"classes": weights.classes, "preprocessing": preprocessing}


def save(
    path: str | os.PathLike,
    weights: Weights,
    layout: str = "vgg_jax",
    dtype: Any = np.float32,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes a .safetensors file in a layout of `SAVE_LAYOUTS`, whole or not at all, with `more` in its metadata.

    Ours says in its metadata all that `read` needs. The others' are for images as those libraries prepare them: RGB, less the mean that
    the metadata name, divided by their own deviation; a net of another deviation has that multiplied into conv1_1.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if layout not in SAVE_LAYOUTS:
        raise InputError(f"layout is {layout!r}: expected one of {', '.join(SAVE_LAYOUTS)}")
    if layout != "vgg_jax" and weights.net not in ("A", "B", "D", "E"):
        raise InputError(
            f"the net is {weights.net}, which {layout} does not have: expected A, B, D or E; pass the layout vgg_jax"
        )
    there = next(each for each in LAYOUTS if each.name == layout)
    std = weights.preprocessing.std_rgb if layout == "vgg_jax" else there.preprocessing.std_rgb
    params = weights.params
    if std != weights.preprocessing.std_rgb:
        params = fold_std_into_conv1(
            params,
            tuple(
                ours / theirs
                for ours, theirs in zip(weights.preprocessing.std_rgb, std, strict=True)
            ),
        )
    trees, model = {"params": params, "batch_stats": weights.batch_stats}, weights.model
    tensors = {}
    for row in tensor_table(
        there, model.config, model.num_classes, model.batch_norm, model.image_size, weights.top
    ):
        group, layer, leaf = row.path
        tensors[row.foreign_name] = row.to_foreign(np.asarray(trees[group][layer][leaf])).astype(
            dtype
        )
    known = weights.preprocessing._replace(
        std_rgb=std, scale=to_metadata(weights)["preprocessing"]["scale"]
    )
    notes = {
        "net": weights.net,
        "image_size": model.image_size,
        "classes": weights.classes,
    } | known._asdict()
    file = require_local(path)
    temporary = file.with_name(file.name + ".part")
    try:
        save_file(
            tensors,
            temporary,
            metadata={"format": "pt", "vgg_jax": json.dumps(notes | dict(more or {}))},
        )
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"cannot write {path} ({error}): expected a folder that can be written to, with room for the file"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def class_names(count: int) -> tuple[str, ...]:
    """ImageNet's for 1,000, in the order of the released models; else numbers."""
    return CLASSES if count == len(CLASSES) else tuple(map(str, range(count)))


def fold_std_into_conv1(params: Tree, std_rgb: tuple[float, ...]) -> Tree:
    """Parameters for images that are not divided by a deviation. Zero padding stays what it was: the mean colour."""
    if std_rgb == UNIT_STD:
        return params
    first = params["conv1_1"]
    kernel = (
        np.asarray(first["kernel"], np.float64) / np.array(std_rgb)[None, None, :, None]
    ).astype(np.float32)
    return {**params, "conv1_1": {**first, "kernel": kernel}}


def _notes(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What our own files say, and MatConvNet's of their mean, checked. Raises InputError for what cannot be."""
    notes: dict[str, Any] = {"preprocessing": {}}
    known = notes["preprocessing"]
    try:
        if "net" in raw:
            notes["net"] = {name: name for name in CONFIGS}[raw["net"]]
        if "image_size" in raw:
            notes["image_size"] = int(raw["image_size"])
        if "classes" in raw:
            notes["classes"] = tuple(str(name) for name in raw["classes"])
        for name in ("mean_rgb", "std_rgb"):
            if name in raw:
                known[name] = tuple(float(value) for value in raw[name])
                if (
                    len(known[name]) != 3
                    or not np.isfinite(known[name]).all()
                    or (name == "std_rgb" and min(known[name]) <= 0)
                ):
                    raise ValueError(f"{name} is {known[name]}")
        if raw.get("scale") is not None:
            known["scale"] = int(raw["scale"])
        known |= {name: bool(raw[name]) for name in ("flip", "exif") if name in raw}
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"its metadata cannot be read ({error}): expected what vgg_jax writes"
        ) from error
    return notes
