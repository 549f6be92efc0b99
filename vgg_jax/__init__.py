"""VGG (Simonyan & Zisserman, arXiv 1409.1556) in JAX/Flax.

    model, variables, metadata = vgg_jax.load("vgg16.safetensors")
    images = vgg_jax.preprocess(["photo.jpg"], metadata)
    logits = model.apply(variables, images)

`VGG` is the module, and `vgg11` … `vgg19` are its published configurations. `fit`, `evaluate` and
`export.export` do what the commands `vgg-jax train`, `evaluate` and `export` do.
"""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vgg_jax.configs.colours import IMAGENET, ColourStatistics
from vgg_jax.configs.models import CONFIGS, Conv, VGGConfig
from vgg_jax.configs.presets import preset
from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError, install_hint

if TYPE_CHECKING:
    from vgg_jax import export as export
    from vgg_jax import reporting as reporting
    from vgg_jax.evaluation.evaluate import evaluate
    from vgg_jax.inference import compile_inference
    from vgg_jax.model import (
        PAPER_INIT_LAYERS,
        VGG,
        copy_matching_layers,
        vgg11,
        vgg11_lrn,
        vgg13,
        vgg16,
        vgg16_c,
        vgg19,
        with_in_channels,
        with_new_head,
    )
    from vgg_jax.preprocessing import preprocess
    from vgg_jax.runtime.compiler import compiler_options
    from vgg_jax.training.loop import fit

__version__ = "0.2.0.dev0"

__all__ = [
    "CONFIGS",
    "IMAGENET",
    "PAPER_INIT_LAYERS",
    "VGG",
    "ColourStatistics",
    "Conv",
    "InputError",
    "TrainConfig",
    "VGGConfig",
    "__version__",
    "compile_inference",
    "compiler_options",
    "copy_matching_layers",
    "evaluate",
    "export",
    "fit",
    "load",
    "preprocess",
    "preset",
    "reporting",
    "save",
    "vgg11",
    "vgg11_lrn",
    "vgg13",
    "vgg16",
    "vgg16_c",
    "vgg19",
    "with_in_channels",
    "with_new_head",
]

# Names that need jax or numpy are imported on first use, so that `vgg-jax --help` answers at once.
_LAZY = {
    "compile_inference": "vgg_jax.inference",
    "compiler_options": "vgg_jax.runtime.compiler",
    "evaluate": "vgg_jax.evaluation.evaluate",
    "fit": "vgg_jax.training.loop",
    "preprocess": "vgg_jax.preprocessing",
    **dict.fromkeys(
        (
            "PAPER_INIT_LAYERS",
            "VGG",
            "copy_matching_layers",
            "vgg11",
            "vgg11_lrn",
            "vgg13",
            "vgg16",
            "vgg16_c",
            "vgg19",
            "with_in_channels",
            "with_new_head",
        ),
        "vgg_jax.model",
    ),
}


def __getattr__(name: str) -> Any:
    if name in ("export", "reporting"):  # subpackages; their import sets the attribute
        return importlib.import_module(f"vgg_jax.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_LAZY[name])
    except (ImportError, InputError) as error:
        if name != "fit":
            raise
        return _unavailable(name, error)
    globals()[name] = getattr(module, name)
    return globals()[name]


def _unavailable(name: str, cause: Exception) -> Callable[..., Any]:
    """Returns a function that raises InputError, for a missing package of the extra `train`.

    An error while the attribute is looked up would break `help(vgg_jax)`.
    """
    message = str(cause)
    if not isinstance(cause, InputError):  # one of ours names the extra already
        message = f"vgg_jax.{name} cannot be imported ({message}): {install_hint('train')}"

    def raise_error(*_args: Any, **_kwargs: Any) -> None:
        raise InputError(message) from cause

    return raise_error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def save(
    path: str | os.PathLike,
    model: "VGG",
    variables: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> None:
    """Saves a net to a .safetensors file. It is the counterpart of `load`.

    `vgg-jax evaluate`, `predict` and `export` take the file.

    Args:
        path: The file, ending in .safetensors.
        model: The network. Its `config`, `num_classes`, `batch_norm`, `image_size`, `pool` and
            `in_channels` are saved, and no other fields.
        variables: Its variables.
        metadata: "net", "classes" and "preprocessing", as `load` returns them. A net with another
            head needs `metadata | {"classes": names}`, even if the number of classes is the same.
            `preprocessing["mean_rgb"]` has one value for each channel. For a model with other
            channels it may also be an RGB mean. The file then gets the mean of its three values
            for one channel, and for others the values repeated cyclically (R, G, B, R, …), as
            `with_in_channels` describes.

    Raises:
        InputError: If the path has another ending, the arguments do not fit together, or the file
            cannot be written.
    """
    from vgg_jax.weights import from_loaded
    from vgg_jax.weights import save as save_weights

    save_weights(path, from_loaded(model, variables, metadata))


def load(
    path: str | os.PathLike,
    net: str | None = None,
    preprocessing: str | Mapping[str, Any] | None = None,
    image_size: int | None = None,
    classes: Sequence[str] | None = None,
    download: bool = False,
) -> tuple["VGG", dict[str, Any], dict[str, Any]]:
    """Loads a trained net from a run's folder, from a weight file, or by name.

    Weight files may come from this package or from another library
    (`vgg_jax.weights.load_file`). A run gives its best checkpoint
    (`vgg_jax.runs.checkpoint.load_best`). The file of a name is looked for in the caches of torch,
    Hugging Face, Keras and vgg_jax.

    Args:
        path: Folder of a run, a weight file, or a name of published weights that `vgg-jax weights`
            lists, such as "torchvision/vgg16". A path that exists goes before a name.
        net: Name of the net in a weight file whose shapes do not determine it, such as "A-LRN".
        preprocessing: Images that the net of another library's file was trained with: "caffe" (BGR
            in 0-255, less the authors' mean), "torchvision" (RGB, divided by torchvision's standard
            deviation), or a dict of

            - "mean": subtracted from the images. One number, or one for each channel.
            - "std": the images are then divided by it. 1 by default.
            - "range": "0-255" (default) or "0-1", the scale of the images, the mean and the std.
              Images in -1 to 1 are those in "0-1", with a mean and a std of 0.5.
            - "channels": "rgb" (default) or "bgr", the order in the images, the mean and the std.
              It has no default if the library's own nets read BGR.

            None means those of the library that the names belong to. A file of Keras 3 needs a
            value, unless it is a KerasHub preset with its JSON files.
        image_size: Side of the images in pixels, for a weight file whose fc6 reads one position: 32
            for a net of 32x32 images. A larger size means that fc6 reads the mean of pool5 of such
            images (global average pooling). Other files tell the size.
        classes: Names of the classes, in the order of the outputs. They replace those of the run or
            the file, or the numbers or ImageNet's names that a file without names gets.
        download: Download the file of a name if no cache has it. Nothing else is downloaded.

    Returns:
        The model, its variables, and metadata such as `classes` and `preprocessing`. "source" tells
        what was assumed of a file. The variables of a file are NumPy arrays. They must not be
        changed in place once jax has them, because on a CPU it may use their memory.

    Raises:
        InputError: If there is no such run or file, the file does not hold a VGG, or the other
            arguments do not fit it.
    """
    from vgg_jax.weights import load

    return load(path, net, preprocessing, image_size, classes, download)
