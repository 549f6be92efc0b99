"""What the command line takes: a flag for each argument of a command, with its default."""

import argparse
from typing import Any

from vgg_jax.configs.evaluation import MAX_PIXELS_PER_BATCH, PROTOCOLS
from vgg_jax.configs.export import EXPORT_OUTPUTS, SAVE_LAYOUTS
from vgg_jax.configs.presets import PRESETS
from vgg_jax.configs.train import (
    ALLREDUCE_DTYPES,
    CHOICES,
    DISTRIBUTED_MODES,
    MAX_LR_HALVINGS,
    ON_NAN,
    SAVE_SECONDS,
    TrainConfig,
)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="vgg-jax", description="VGG (Simonyan & Zisserman, arXiv 1409.1556) in JAX/Flax."
    )
    commands = top.add_subparsers(required=True, dest="command", metavar="COMMAND")
    add_train(
        commands.add_parser(
            "train", help="train a network, or go on with a run", argument_default=argparse.SUPPRESS
        )
    )

    command = commands.add_parser(
        "evaluate", help="a trained network's errors, as the paper measures them"
    )
    command.add_argument(
        "run", metavar="RUN_OR_WEIGHTS", help="the workdir of a run, or a file of weights"
    )
    add_data(command, None, "the run's own")
    command.add_argument(
        "--split",
        default="val",
        help="of the run's own data, val is what the run validated on (default: val)",
    )
    command.add_argument("--protocol", default="dense", choices=PROTOCOLS, help="default: dense")
    command.add_argument(
        "--scales",
        type=int,
        nargs="+",
        default=[],
        metavar="Q",
        help="test scales (default: S, or the middle of its jitter)",
    )
    command.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="the mean with the mirror image (default: as in training; off for center)",
    )
    command.add_argument(
        "--softmax-first",
        action="store_true",
        help="dense: soft-max at every position, then the mean",
    )
    command.add_argument(
        "--ceil", action="store_true", help="pooling as in Caffe: an odd side is rounded up"
    )
    command.add_argument(
        "--skip-bad", action="store_true", help="leave out files that are no images"
    )
    add_cache(command)
    more = "computed at once; more is faster on an accelerator"
    command.add_argument(
        "--pixels",
        type=int,
        default=MAX_PIXELS_PER_BATCH,
        help=f"{more} (default: {MAX_PIXELS_PER_BATCH})",
    )
    command.add_argument(
        "--out",
        help="folder for evaluation.json and posteriors.npz (default: SPLIT-PROTOCOL-SCALES-FLAGS in RUN, or in FILE-evaluated)",
    )

    command = commands.add_parser("fuse", help="the mean of the posteriors of several evaluations")
    command.add_argument("posteriors", nargs="+", metavar="POSTERIORS.npz")
    command.add_argument(
        "--out", help="folder for evaluation.json and posteriors.npz (default: none is written)"
    )

    command = commands.add_parser("predict", help="the most probable classes of images")
    command.add_argument(
        "net", metavar="RUN_OR_WEIGHTS", help="the workdir of a run, or a file of weights"
    )
    command.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders and patterns")
    command.add_argument("--top", type=int, default=5, help="classes of each image (default: 5)")
    command.add_argument(
        "--json", action="store_true", dest="as_json", help="one JSON object a line"
    )
    command.add_argument("--protocol", default="dense", choices=PROTOCOLS, help="default: dense")
    command.add_argument(
        "--scales",
        type=int,
        nargs="+",
        default=[],
        metavar="Q",
        help="test scales (default: as for evaluate)",
    )
    add_cache(command)

    command = commands.add_parser(
        "import", help="another library's weights into a .safetensors file in our names"
    )
    command.add_argument(
        "file",
        metavar="FILE",
        help=".pth, .safetensors (torchvision, timm), .h5 (Keras, flaxmodels), .caffemodel, .mat",
    )
    command.add_argument("out", metavar="OUT", help="the .safetensors file to write")
    command.add_argument(
        "--net", choices=CHOICES["net"], help="where the shapes do not tell: A-LRN"
    )
    command.add_argument(
        "--check",
        choices=("torch",),
        help="print the largest difference from PyTorch after each layer",
    )

    command = commands.add_parser("export", help="a net as a file that others run")
    command.add_argument(
        "net", metavar="RUN_OR_WEIGHTS", help="the workdir of a run, or a file of weights"
    )
    command.add_argument(
        "out",
        metavar="FILE",
        help="ends in .safetensors, .onnx, .stablehlo, or .savedmodel (a folder)",
    )
    command.add_argument(
        "--layout", choices=SAVE_LAYOUTS, default="vgg_jax", help=".safetensors: whose names"
    )
    command.add_argument(
        "--output",
        choices=EXPORT_OUTPUTS,
        default="logits",
        help="not .safetensors: logits of images of the net's size; posteriors or score maps of any size (default: logits)",
    )
    command.add_argument(
        "--uint8",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="images are uint8, preprocessed inside (default), or float32",
    )
    command.add_argument(
        "--fold-batch-norm",
        action="store_true",
        help="batch normalisation multiplied into the convolutions",
    )
    command.add_argument(
        "--bfloat16", action="store_true", help="half the size: weights are stored in bfloat16"
    )
    command.add_argument(
        "--net",
        dest="arch",
        choices=CHOICES["net"],
        help="where a file's shapes do not tell: A-LRN",
    )

    command = commands.add_parser(
        "verify", help="ask an exported file again for the answer that it was exported with"
    )
    command.add_argument("file", metavar="FILE")

    command = commands.add_parser("summary", help="a network's layers, parameters and cost")
    command.add_argument("net", choices=CHOICES["net"])
    command.add_argument("--num-classes", type=int, default=1000)
    command.add_argument("--batch-norm", action="store_true")
    command.add_argument("--image-size", type=int, default=224)
    command.add_argument(
        "--batch-size",
        type=int,
        help="also compile training with so many images a step here, and say what memory it takes",
    )
    command.add_argument("--microbatch", type=int, help="as for train")
    command.add_argument(
        "--dtype", default="float32", choices=CHOICES["dtype"], help="as for train"
    )

    command = commands.add_parser(
        "statistics", help="mean and standard deviation of a data set's colours"
    )
    add_data(command)
    command.add_argument("--split", default="train")
    command.add_argument(
        "--skip-bad", action="store_true", help="leave out files that are no images"
    )

    command = commands.add_parser(
        "verify-data", help="read every image once, and list those that cannot be read"
    )
    add_data(command)
    command.add_argument(
        "--out",
        default="bad-images.jsonl",
        help="the list, for train --exclude (default: bad-images.jsonl)",
    )

    commands.add_parser(
        "selfcheck", help="whether this release of jax computes rightly on the devices here"
    )
    return top


def add_data(
    command: argparse.ArgumentParser, default: str | None = "digits", said: str = "digits"
) -> None:
    command.add_argument(
        "data",
        nargs="?",
        default=default,
        metavar="DATA",
        help=f"digits, an image folder, or a name of TensorFlow Datasets (default: {said})",
    )
    command.add_argument("--data-dir", default=None, help="where prepared TensorFlow Datasets lie")
    command.add_argument(
        "--download",
        action="store_true",
        default=False,
        help="let TensorFlow Datasets download and prepare the data",
    )


def mesh_axes(text: str) -> dict[str, int]:
    """ "data=4,model=2" -> {"data": 4, "model": 2}. Raises argparse.ArgumentTypeError."""
    axes = dict(part.partition("=")[::2] for part in text.split(","))
    if (
        not set(axes) <= {"data", "model"}
        or len(axes) != text.count("=")
        or not all(value.isdecimal() for value in axes.values())
    ):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected axes such as data=8 or data=4,model=2"
        )
    return {axis: int(value) for axis, value in axes.items()}


def add_cache(command: argparse.ArgumentParser) -> None:
    what = "keep compiled programs in the user's cache folder (default: on)"
    command.add_argument(
        "--compilation-cache", action=argparse.BooleanOptionalAction, default=True, help=what
    )


def add_train(command: argparse.ArgumentParser) -> None:
    """A flag for each field of TrainConfig. What is not given stays out, so that the data set's preset decides."""
    default = TrainConfig()
    command.description = (
        f"Train a network. Running the same command again goes on where it stopped. The defaults below are the paper's; "
        f"{', '.join(PRESETS)} have their own."
    )
    add_data(command)
    add_cache(command)
    command.add_argument(
        "--workdir", default=None, help="the run's folder (default: runs/DATA-NET)"
    )

    command.add_argument(
        "--save-seconds",
        type=float,
        help=f"between two saves within an epoch (default: {SAVE_SECONDS})",
    )
    command.add_argument(
        "--on-nan",
        choices=ON_NAN,
        help=f"where the loss is not finite: stop (default), or go back to the last save with half the rate, at most {MAX_LR_HALVINGS} times",
    )
    command.add_argument(
        "--debug-nans",
        action="store_true",
        help="name the layer where the loss is not finite; slower, with more memory",
    )

    what = "axes of the devices, as data=4,model=2: those that share the examples, times those that share fc6 and fc7 (default: data alone)"
    command.add_argument("--mesh", type=mesh_axes, metavar="AXES", help=what)
    command.add_argument(
        "--fsdp",
        action="store_true",
        help="spread parameters and momentum over the devices, for memory",
    )
    command.add_argument(
        "--reduce",
        choices=ALLREDUCE_DTYPES,
        help="how gradients travel between devices (default: float32)",
    )
    what = "join other processes: where SLURM, Open MPI, Kubernetes or a TPU pod is found, or JAX_COORDINATOR_ADDRESS is set (default: auto)"
    command.add_argument("--distributed", choices=DISTRIBUTED_MODES, help=what)

    def flag(name: str, help: str, **options: Any) -> None:
        value = getattr(default, name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        if name in CHOICES:
            options["choices"] = CHOICES[name]
        command.add_argument(
            "--" + name.replace("_", "-"),
            help=help if value in (None, ()) else f"{help} (default: {shown})",
            **options,
        )

    def switch(name: str, help: str) -> None:
        command.add_argument(
            "--" + name.replace("_", "-"), action=argparse.BooleanOptionalAction, help=help
        )

    flag("net", "column of Table 1")
    switch("batch_norm", "batch normalisation behind every convolution")
    flag("fc", "widths of fc6 and fc7", type=int, nargs=2)
    flag("dropout_rate", "of fc6 and fc7", type=float)
    flag("initializer", "of the kernels")
    flag("initializer_std", "the deviation of --initializer paper", type=float)
    flag(
        "init_from",
        "start with the layers of a run, or of a file of weights",
        metavar="RUN_OR_WEIGHTS",
    )
    flag("freeze", "layers that stay as they are: names, or conv or fc", nargs="+", metavar="LAYER")
    flag("dtype", "of the computation; parameters are float32")
    flag("image_size", "side of the crop that the net reads", type=int)
    flag(
        "scale",
        "S, or S_min S_max: the shorter side that images are rescaled to",
        type=int,
        nargs="+",
        metavar="S",
    )
    switch("flip", "mirror half of the images")
    flag(
        "colour_shift",
        "deviation of the random shift along the principal colours, 0 for none",
        type=float,
    )
    flag(
        "colour_convention",
        "what the shift is relative to: a component's deviation or its variance",
    )
    switch("exif", "turn photos upright as their EXIF orientation says")
    flag("statistics", "mean RGB and principal colours")
    flag(
        "validation_fraction",
        "of the training images, where the data has no validation split",
        type=float,
    )
    switch(
        "skip_bad",
        "leave out files that are no images, and images that cannot be read (at most one in a hundred)",
    )
    command.add_argument(
        "--exclude", metavar="LIST", help="leave out the images in a list that verify-data wrote"
    )
    switch(
        "cache",
        "keep the encoded images in memory, of small ones the pixels; of TFRecord files the order is another",
    )
    flag("batch_size", "images a step", type=int)
    flag(
        "microbatch",
        "images whose activations are held at once; a step adds up their gradients",
        type=int,
    )
    flag(
        "learning_rate",
        "at the start (default: 0.01, or 0.001 for fewer than 100 classes)",
        type=float,
    )
    flag("momentum", "of SGD", type=float)
    flag("weight_decay", "L2 penalty", type=float)
    switch("decay_biases", "decay biases and batch-norm parameters too")
    flag("schedule", "when the rate is divided by 10")
    flag("patience", "plateau: epochs without a better validation accuracy", type=int)
    flag("drops", "plateau: times the rate is divided; the next plateau ends the run", type=int)
    flag("drop_epochs", "step: the epochs after which it is", type=int, nargs="+", metavar="EPOCH")
    flag("epochs", "at most", type=int)
    flag("seed", "of everything random", type=int)
