"""The flags of the command line. Imports neither JAX nor TensorFlow."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from vgg_jax import __version__
from vgg_jax.configs.colours import CHANNEL_ORDERS, IMAGE_RANGES
from vgg_jax.configs.evaluation import MATCHES, MAX_PIXELS_PER_BATCH, PROTOCOLS
from vgg_jax.configs.export import EXPORT_OUTPUTS, SAVE_LAYOUTS
from vgg_jax.configs.models import CONFIGS
from vgg_jax.configs.presets import PRESETS
from vgg_jax.configs.train import (
    ALLREDUCE_DTYPES,
    DISTRIBUTED_MODES,
    DTYPES,
    KEEP,
    MAX_LR_HALVINGS,
    ON_NAN,
    OPTIMIZERS,
    SAVE_SECONDS,
    TrainConfig,
)

# A command, or a group of its flags under one heading.
Flags = argparse.ArgumentParser | argparse._ArgumentGroup

# Headings of `vgg-jax train --help`. Each field of TrainConfig names one of them.
TRAIN_GROUPS = ("data", "model", "augmentation", "optimiser", "schedule", "run", "devices")


class Several:
    """The type of a flag with one or more values: `--scale 256 512`, or `--scale 256,512`.

    argparse's own way, `nargs="+"`, takes the arguments of the command for values, as the file in
    `--mean 1 2 3 net.safetensors`. Here the values end at the first word that cannot be one.

    Args:
        convert: Converts one value.
        pattern: Regular expression of one value. None: all that `convert` converts.
    """

    def __init__(self, convert: Callable[[str], Any], pattern: str | None = None) -> None:
        self._convert, self._pattern = convert, pattern

    def __call__(self, text: str) -> list[Any]:
        """Converts the values, which commas or spaces separate."""
        values = text.replace(",", " ").split()
        try:
            if not values:
                raise ValueError
            return list(map(self._convert, values))
        except ValueError as error:
            name = self._convert.__name__
            raise argparse.ArgumentTypeError(f"invalid {name} value: {text!r}") from error

    def accepts(self, word: str) -> bool:
        """Tells if a word of the command line may be one more value."""
        if self._pattern is not None:
            return re.fullmatch(self._pattern, word) is not None
        try:
            self(word)
        except argparse.ArgumentTypeError:
            return False
        return True


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage of all flags.

    A flag whose type is `Several` takes the words after it that may be its values.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses the arguments, after the values of each flag have become one word."""
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._join_values(words), namespace)

    def _join_values(self, words: list[str]) -> list[str]:
        joined: list[str] = []
        while words:
            word = words.pop(0)
            if word == "--":
                return [*joined, word, *words]
            several, values = self._several(word), []
            while several is not None and words and several.accepts(words[0]):
                values.append(words.pop(0))
            joined.append(f"{word}={','.join(values)}" if values else word)
        return joined

    def _several(self, word: str) -> Several | None:
        """The type of a flag with several values, whose name may be abbreviated."""
        flags = self._option_string_actions
        names = [word] if word in flags else [name for name in flags if name.startswith(word)]
        if not word.startswith("--") or len({id(flags[name]) for name in names}) != 1:
            return None
        kind = flags[names[0]].type
        return kind if isinstance(kind, Several) else None

    def error(self, message: str) -> NoReturn:
        """Prints the error, and exits with code 2."""
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def parse_args(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parses the arguments of `vgg-jax`.

    Without arguments, it prints the commands and exits.

    Args:
        argv: The arguments. None means those of this program.

    Returns:
        The values by name. "command" is the name of the command.

    Raises:
        SystemExit: With code 2 after an error, and 0 after help or a version was printed.
    """
    top = parser()
    if not (sys.argv[1:] if argv is None else argv):
        top.print_help()
        top.exit()
    arguments, unknown = top.parse_known_args(argv)
    if unknown:
        name = vars(arguments)["command"]
        command = Parser(prog=f"{top.prog} {name}", add_help=False)
        command.error(f"unrecognized arguments: {' '.join(unknown)}")
    return vars(arguments)


def parser() -> Parser:
    """Builds the parser of `vgg-jax`. The nets to choose from are those in CONFIGS at this time."""
    top = Parser(
        prog="vgg-jax",
        usage="vgg-jax COMMAND [FLAGS]",
        description=f"VGG (Simonyan & Zisserman, arXiv 1409.1556) in JAX/Flax.\n\n{_overview()}",
        epilog="`vgg-jax COMMAND --help` lists the flags of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_verbose(top, default=False)
    top.add_argument("--version", action="version", version=f"vgg-jax {__version__}")
    # The description has the commands in groups. Without `help`, argparse does not repeat them.
    commands = top.add_subparsers(
        prog=top.prog, required=True, dest="command", metavar="COMMAND", help=argparse.SUPPRESS
    )
    for group in _COMMANDS.values():
        for name, (help, add_flags) in group.commands.items():
            # A setting of training that is not passed stays absent, so that the preset decides.
            default = argparse.SUPPRESS if name in ("train", "preview") else None
            description = f"{help[0].upper()}{help[1:]}."
            command = commands.add_parser(name, description=description, argument_default=default)
            add_flags(command)
            # Absent unless it is passed, so that one before the command counts.
            _add_verbose(command, default=argparse.SUPPRESS)
    return top


def _add_verbose(flags: Flags, default: Any) -> None:
    flags.add_argument(
        "--verbose",
        action="store_true",
        default=default,
        help="print errors and warnings in full, however long they are",
    )


def _overview() -> str:
    """Lists the commands in groups, each with an example."""
    lines = []
    for title, group in _COMMANDS.items():
        lines.append(f"{title}, for example `{group.example}`:")
        lines += [f"  {name:<12} {help}" for name, (help, _) in group.commands.items()]
        lines.append("")
    return "\n".join(lines)


def _add_train(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Train a net. The same command resumes a run that was stopped. "
        f"The defaults below are the paper's; {', '.join(PRESETS)} have their own."
    )
    groups = {name: command.add_argument_group(name) for name in TRAIN_GROUPS}
    _add_data(groups["data"])
    for field in dataclasses.fields(TrainConfig):
        if field.metadata:
            _add_field(groups[field.metadata["group"]], field)
    _add_run(groups["run"])
    _add_devices(groups["devices"])


def _add_preview(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Draw a contact sheet of what the net sees: training images with their labels, their crops "
        "in the first epochs, and the centre crop of the evaluation. The crops are those of "
        "`vgg-jax train` with the same flags."
    )
    sheet = command.add_argument_group("sheet")
    sheet.add_argument(
        "-o",
        "--out",
        default="preview.png",
        metavar="FILE",
        help="file ending in .png, .pdf or .svg (default: preview.png)",
    )
    _add_overwrite(sheet)
    sheet.add_argument(
        "--images",
        type=int,
        default=8,
        metavar="N",
        help="images to draw, the first ones of the first epoch (default: 8)",
    )
    sheet.add_argument(
        "--epochs",
        type=int,
        default=6,
        metavar="N",
        help="crops to draw of each image, those of the epochs 1 to N (default: 6)",
    )
    groups = {name: command.add_argument_group(name) for name in ("data", "augmentation", "run")}
    _add_data(groups["data"])
    for field in dataclasses.fields(TrainConfig):
        if field.metadata.get("group") in groups and field.name != "cache_features":
            _add_field(groups[field.metadata["group"]], field)


def _add_field(group: Flags, field: dataclasses.Field) -> None:
    """Adds the flag of a field of TrainConfig, from the field's metadata."""
    flag, default = "--" + field.name.replace("_", "-"), field.default
    help, choices = field.metadata["help"], field.metadata["choices"]
    if isinstance(default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
        return
    options: dict[str, Any] = {"type": type(default)} | field.metadata["flag"]
    if options.get("nargs") == "+":
        del options["nargs"]
        options["type"] = Several(options["type"], options.pop("pattern", None))
        options["metavar"] += "..."
    if choices is not None:
        options["choices"] = tuple(choices)
    if default not in (None, ()):
        values = default if isinstance(default, tuple) else (default,)
        help = f"{help} (default: {' '.join(map(str, values))})"
    group.add_argument(flag, help=help, **options)


def _add_run(group: Flags) -> None:
    group.add_argument("--workdir", default=None, help="folder of the run (default: runs/DATA-NET)")
    group.add_argument(
        "--save-seconds",
        type=float,
        help=f"seconds between two saves within an epoch (default: {SAVE_SECONDS})",
    )
    group.add_argument(
        "--keep",
        type=int,
        metavar="N",
        help="checkpoints to keep in last/, and in best/; with 1, a damaged one is a lost run "
        f"(default: {KEEP})",
    )
    group.add_argument(
        "--on-nan",
        choices=ON_NAN,
        help="after a non-finite loss: stop (default), or resume from the last save with half the "
        f"learning rate, at most {MAX_LR_HALVINGS} times",
    )
    group.add_argument(
        "--debug-nans",
        action="store_true",
        help="name the layer of a non-finite loss; slower, and needs more memory",
    )
    group.add_argument(
        "--tensorboard",
        action="store_true",
        help="write events for TensorBoard to WORKDIR/tensorboard",
    )
    group.add_argument(
        "--profile",
        type=parse_steps,
        metavar="FIRST:LAST",
        help="trace these steps, such as 10:20, to WORKDIR/tensorboard; they are counted from 1, "
        "also when a run resumes",
    )
    _add_cache(group)


def _add_devices(group: Flags) -> None:
    group.add_argument(
        "--mesh",
        type=parse_mesh,
        metavar="AXES",
        help="axes of the device mesh, such as data=4,model=2: the devices that share the images, "
        "times those that share fc6 and fc7 (default: data alone)",
    )
    group.add_argument(
        "--fsdp",
        action="store_true",
        help="shard parameters and momentum over the devices to save memory",
    )
    group.add_argument(
        "--reduce",
        choices=ALLREDUCE_DTYPES,
        help="dtype of the gradients sent between devices (default: float32)",
    )
    group.add_argument(
        "--distributed",
        choices=DISTRIBUTED_MODES,
        help="join other processes; auto does so under SLURM, Open MPI, Kubernetes, on a TPU pod, "
        "or if JAX_COORDINATOR_ADDRESS is set (default: auto)",
    )


def parse_steps(text: str) -> tuple[int, int]:
    """Parses a range of steps: "10:20" becomes (10, 20).

    Args:
        text: The first and the last step, counted from 1.

    Returns:
        The two numbers.

    Raises:
        argparse.ArgumentTypeError: The text is no such range.
    """
    match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected the first and the last step, counted from 1, such as 10:20"
        )
    return first, last


def parse_mesh(text: str) -> dict[str, int]:
    """Parses mesh axes: "data=4,model=2" becomes {"data": 4, "model": 2}.

    Args:
        text: The axes.

    Returns:
        The size of each axis in the text.

    Raises:
        argparse.ArgumentTypeError: If an axis is unknown or repeated, or its size is no number.
    """
    axes = dict(part.partition("=")[::2] for part in text.split(","))
    is_known = axes.keys() <= {"data", "model"}
    is_unique = len(axes) == text.count("=")
    if not (is_known and is_unique and all(size.isdecimal() for size in axes.values())):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected axes such as data=8 or data=4,model=2"
        )
    return {axis: int(size) for axis, size in axes.items()}


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    _add_path(command)
    _add_data(command, None, "the run's own")
    command.add_argument(
        "--split",
        default="val",
        help="split of the data; val of the run's own data is what the run validated on "
        "(default: val)",
    )
    _add_protocol(command, "S, or the middle of its jitter")
    command.add_argument(
        "--flip",
        action=argparse.BooleanOptionalAction,
        help="average with the mirror image (default: as in training; off for center)",
    )
    command.add_argument(
        "--softmax-first",
        action="store_true",
        help="dense: apply the soft-max at every position before averaging",
    )
    command.add_argument(
        "--ceil", action="store_true", help="round an odd side up in a pooling, as Caffe does"
    )
    _add_skip_bad(
        command, "leave out files that are not images; an image that cannot be decoded is an error"
    )
    command.add_argument(
        "--match",
        choices=MATCHES,
        default="exact",
        help="how the data's classes are found among the net's: by equal names (exact, the "
        "default), by their number (order), by their WordNet ids (synset), or by names without "
        "regard to case, spaces and synonyms (name)",
    )
    _add_cache(command)
    command.add_argument(
        "--pixels",
        type=int,
        default=MAX_PIXELS_PER_BATCH,
        help="maximum pixels per batch, which bounds memory; "
        f"more is faster on an accelerator (default: {MAX_PIXELS_PER_BATCH})",
    )
    command.add_argument(
        "--out",
        help="folder for evaluation.json and posteriors.npz "
        "(default: SPLIT-PROTOCOL-SCALES-FLAGS in RUN, in FILE-evaluated, or in NAME-evaluated in "
        "the current folder)",
    )
    _add_source(command)


def _add_fuse(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "posteriors",
        nargs="+",
        metavar="EVALUATION",
        help="posteriors.npz files that evaluate wrote, their folders, or runs with one evaluation",
    )
    command.add_argument(
        "--out", help="folder for evaluation.json and posteriors.npz (default: none is written)"
    )


def _add_predict(command: argparse.ArgumentParser) -> None:
    _add_path(command)
    command.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders and patterns")
    command.add_argument("--top", type=int, default=5, help="classes per image (default: 5)")
    command.add_argument(
        "--json", action="store_true", dest="as_json", help="print one JSON object per line"
    )
    _add_protocol(command, "as for evaluate")
    _add_cache(command)
    _add_source(command)


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "file",
        metavar="FILE",
        help=".pth, .safetensors (torchvision, timm), .h5 or .keras (Keras, flaxmodels), "
        ".caffemodel, .mat; or a name such as torchvision/vgg16",
    )
    command.add_argument("out", metavar="OUT", help="the .safetensors file to write")
    _add_overwrite(command)
    _add_net(command)
    command.add_argument(
        "--check",
        choices=("torch",),
        help="print the largest difference from PyTorch after each layer",
    )
    _add_source(command)


def _add_export(command: argparse.ArgumentParser) -> None:
    _add_path(command)
    command.add_argument(
        "out",
        metavar="FILE",
        help="file ending in .safetensors, .onnx or .stablehlo, or folder ending in .savedmodel",
    )
    command.add_argument(
        "--layout",
        choices=SAVE_LAYOUTS,
        default="vgg_jax",
        help=".safetensors: the library whose tensor names are used (default: vgg_jax)",
    )
    command.add_argument(
        "--output",
        choices=EXPORT_OUTPUTS,
        default="logits",
        help="not .safetensors: logits for images of the net's size, "
        "or posteriors or score maps for any size (default: logits)",
    )
    command.add_argument(
        "--uint8",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="images are uint8 and preprocessed inside (default), or float32",
    )
    command.add_argument(
        "--fold-batch-norm",
        action="store_true",
        help="fold the batch normalisation into the convolutions",
    )
    command.add_argument(
        "--bfloat16",
        action="store_true",
        help="store the weights in bfloat16, which halves the size",
    )
    command.add_argument(
        "--onnx-float16",
        action="store_true",
        help=".onnx: store the weights and compute in float16, for GPUs and browsers",
    )
    _add_overwrite(command)
    _add_net(command)
    _add_source(command)


def _add_weights(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json", action="store_true", dest="as_json", help="print one JSON object per line"
    )


def _add_fetch(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Download published weights into the cache of vgg_jax, unless a cache has them. "
        "The same command resumes a download. VGG_JAX_CACHE names another cache folder, "
        "VGG_JAX_MIRROR and HF_ENDPOINT name mirrors."
    )
    command.add_argument(
        "names", nargs="+", metavar="NAME", help="names that `vgg-jax weights` lists"
    )


def _add_verify(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="a file that export wrote")


def _add_summary(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "net",
        metavar="NET_OR_RUN",
        help=f"column of Table 1 ({', '.join(CONFIGS)}), the workdir of a run, a weight file, or a "
        "name such as torchvision/vgg16",
    )
    shape = command.add_argument_group("shape of a column of Table 1")
    shape.add_argument("--num-classes", type=int, help="classes (default: 1000)")
    shape.add_argument(
        "--batch-norm", action="store_true", help="add batch normalisation after every convolution"
    )
    shape.add_argument("--image-size", type=int, help="side of the images (default: 224)")
    shape.add_argument(
        "--fc", type=int, nargs=2, help="output features of fc6 and fc7 (default: 4096 4096)"
    )
    command.add_argument(
        "--batch-size",
        type=int,
        help="also compile a training step with this many images, and print the memory it needs",
    )
    command.add_argument("--microbatch", type=int, help="as for train")
    _add_field(command, TrainConfig.__dataclass_fields__["freeze"])
    command.add_argument("--optimizer", choices=OPTIMIZERS, help="as for train (default: sgd)")
    command.add_argument("--dtype", default="float32", choices=DTYPES, help="as for train")


def _add_explain(command: argparse.ArgumentParser) -> None:
    _add_path(command)
    command.add_argument("photo", metavar="PHOTO", help="an image file")
    command.add_argument(
        "-o",
        "--out",
        help="the PNG file to write; the arrays go into an .npz file of the same name "
        "(default: PHOTO-explained.png in the current folder)",
    )
    command.add_argument(
        "--class",
        dest="class_name",
        metavar="NAME",
        help="the class to explain (default: the most probable one)",
    )
    command.add_argument(
        "--scale", type=int, metavar="Q", help="test scale (default: as for evaluate)"
    )
    command.add_argument(
        "--layer",
        help="layer for Grad-CAM (default: the last ReLU with a map of 7x7 or more, relu5_3 for "
        "net D)",
    )
    _add_overwrite(command)
    _add_cache(command)
    _add_source(command)


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument("runs", nargs="+", metavar="RUN", help="workdirs of runs")
    command.add_argument(
        "-o",
        "--out",
        default="report.html",
        help="the HTML file; an earlier report is replaced (default: report.html)",
    )
    _add_overwrite(command)
    command.add_argument(
        "--figures", metavar="DIR", help="folder to write the figures to, as SVG and JPEG files"
    )
    command.add_argument(
        "--data", help="where the runs' images are now (default: where they were in training)"
    )
    command.add_argument("--data-dir", help="folder of prepared TensorFlow Datasets")
    _add_cache(command)


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="the workdir of a run")


def _add_statistics(command: argparse.ArgumentParser) -> None:
    _add_data(command)
    command.add_argument("--split", default="train", help="split of the data (default: train)")
    _add_skip_bad(
        command,
        "leave out files that are not images, and at most one percent of unreadable images",
    )


def _add_verify_data(command: argparse.ArgumentParser) -> None:
    _add_data(command)
    command.add_argument(
        "--out",
        default="bad-images.jsonl",
        help="the list to write, for train --exclude (default: bad-images.jsonl)",
    )


def _add_selfcheck(command: argparse.ArgumentParser) -> None:
    """Has no flags."""


def _add_data(flags: Flags, default: str | None = "digits", default_help: str = "digits") -> None:
    flags.add_argument(
        "data",
        nargs="?",
        default=default,
        metavar="DATA",
        help="digits, an image folder, an .npz file of arrays, or a name of TensorFlow Datasets "
        f"(default: {default_help})",
    )
    flags.add_argument("--data-dir", default=None, help="folder of prepared TensorFlow Datasets")
    flags.add_argument(
        "--download",
        action="store_true",
        default=False,
        help="let TensorFlow Datasets download and prepare the data",
    )


def _add_path(flags: Flags) -> None:
    flags.add_argument(
        "path",
        metavar="RUN_OR_WEIGHTS",
        help="the workdir of a run, a weight file, or a name such as torchvision/vgg16",
    )


def _add_overwrite(flags: Flags) -> None:
    flags.add_argument(
        "--overwrite", action="store_true", default=False, help="replace an existing file"
    )


def _add_net(flags: Flags) -> None:
    flags.add_argument(
        "--net",
        choices=tuple(CONFIGS),
        help="name of the net; only needed for A-LRN, which has the shapes of A",
    )


def _add_source(command: argparse.ArgumentParser) -> None:
    """Adds the flags that describe another library's file; commands.source_options reads them."""
    group = command.add_argument_group(
        "images and classes of another library's file",
        "Without these flags, the images are those that the library's own nets are trained with.",
    )
    group.add_argument(
        "--preprocessing",
        choices=("caffe", "torchvision"),
        help="images with a name: caffe (BGR less the authors' mean) or torchvision (RGB, divided "
        "by its standard deviation); files of Keras 3 need it",
    )
    group.add_argument(
        "--mean",
        type=Several(float),
        metavar="V...",
        help="mean that is subtracted from the images: one number, or one for each channel",
    )
    group.add_argument(
        "--std",
        type=Several(float),
        metavar="V...",
        help="standard deviation that the images are then divided by, likewise (default: 1)",
    )
    group.add_argument(
        "--range",
        choices=tuple(IMAGE_RANGES),
        help="scale of the images, of --mean and of --std (default: 0-255); images from -1 to 1 "
        "are --range 0-1 --mean 0.5 --std 0.5",
    )
    group.add_argument(
        "--channels",
        choices=CHANNEL_ORDERS,
        help="order of the channels in the images, in --mean and in --std (default: rgb)",
    )
    group.add_argument(
        "--classes",
        metavar="FILE",
        help="text file with the name of a class on each line, in the order of the net's outputs; "
        "it replaces those of a run or of a file",
    )
    group.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the images; only needed for a file whose fc6 reads one position: 32, or a "
        "larger size if fc6 reads the mean of pool5",
    )


def _add_protocol(flags: Flags, default_scales: str) -> None:
    flags.add_argument(
        "--protocol",
        default="dense",
        choices=PROTOCOLS,
        help="evaluation protocol (default: dense)",
    )
    flags.add_argument(
        "--scales",
        type=Several(int),
        default=[],
        metavar="Q...",
        help=f"test scales (default: {default_scales})",
    )


def _add_skip_bad(flags: Flags, help: str) -> None:
    flags.add_argument("--skip-bad", action="store_true", help=help)


def _add_cache(flags: Flags) -> None:
    flags.add_argument(
        "--compilation-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep compiled programs in the user's cache folder (default: on)",
    )


class _Group(NamedTuple):
    """Commands under one heading of `vgg-jax --help`."""

    example: str
    commands: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]]


_COMMANDS = {
    "Train": _Group(
        "vgg-jax train PHOTOS --net D",
        {
            "train": ("train a net, or resume a run", _add_train),
            "preview": ("draw the crops and labels that training gets", _add_preview),
            "statistics": (
                "print the mean and standard deviation of a data set's colours",
                _add_statistics,
            ),
            "verify-data": (
                "read every image once, and list the unreadable ones",
                _add_verify_data,
            ),
        },
    ),
    "Use": _Group(
        "vgg-jax predict runs/digits-A PHOTO.png",
        {
            "evaluate": ("compute a trained net's errors as the paper does", _add_evaluate),
            "fuse": ("average the posteriors of several evaluations", _add_fuse),
            "predict": ("print the most probable classes of images", _add_predict),
            "import": ("convert another library's weights to a .safetensors file", _add_import),
            "export": ("write a net as a file for another program", _add_export),
            "weights": ("list published weights, and which of them are here", _add_weights),
            "fetch": ("download published weights by name", _add_fetch),
        },
    ),
    "Inspect": _Group(
        "vgg-jax summary D",
        {
            "summary": ("print a net's layers, parameters and cost", _add_summary),
            "report": ("write an HTML page about one run or several", _add_report),
            "explain": ("show where a net looks in a photo", _add_explain),
            "config": ("print a run's configuration and the command that started it", _add_config),
            "verify": ("compare an exported file with its output at export", _add_verify),
            "selfcheck": (
                "check that this release of jax is right on these devices",
                _add_selfcheck,
            ),
        },
    ),
}
