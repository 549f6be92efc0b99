"""The command line: flags to arguments, and errors to one sentence.

Exit codes: 0 done, 1 a check that did not hold, 2 bad input, 4 diverged, 75 stopped and resumable, 130 interrupted.
"""

import argparse
import ctypes
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

from vgg_jax.configs import CHOICES, CONFIGS, PROTOCOLS, Protocol, TrainConfig
from vgg_jax.errors import InputError
from vgg_jax.presets import PRESETS, preset


def main(argv: Sequence[str] | None = None) -> int:
    arguments = vars(parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        if arguments.pop("compilation_cache", False):
            keep_compiled_programs()
        return command(**arguments)
    except InputError as error:
        print(f"vgg-jax: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("vgg_jax"):
            raise
        print(f"vgg-jax: this command needs {error.name}: pip install 'vgg-jax[train]'", file=sys.stderr)
        return 2
    except OSError as error:  # a disk that is full, a folder that may not be read: the message has the path
        print(f"vgg-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vgg-jax: interrupted", file=sys.stderr)
        return 130


def keep_compiled_programs() -> None:
    """Lets the next start find what this one compiles, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    import jax

    if not jax.config.values["jax_compilation_cache_dir"]:
        # A folder for each machine, since a home may be shared by several and a program for one processor need not run on another.
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.expanduser(cache), "vgg_jax", platform.node()))


def keep_memory() -> None:
    """Lets glibc keep the memory that one batch has freed for the next, instead of handing it back to Linux page by page.

    For commands whose memory is bounded, before any thread starts. Net A's dense evaluation of photos is 1.2 times as fast (2 cores).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        mallopt(m_arena_max, 1)
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def train(data: str, workdir: str | None, data_dir: str | None, download: bool, **given: Any) -> int:
    config = preset(data, **given)
    from vgg_jax.train import DivergedError, fit

    try:
        outcome = fit(config, workdir or f"runs/{plain(data)}-{config.net}", data_dir, download)
    except DivergedError as error:
        print(f"vgg-jax: {error}", file=sys.stderr)
        return 4
    return 75 if outcome.stopped else 0


def plain(data: str) -> str:
    """What data is called in the name of a folder."""
    return data.rstrip("/").replace("/", "-").replace(":", "-").strip(".-") or "data"


def summary(net: str, num_classes: int, batch_norm: bool, image_size: int) -> int:
    from vgg_jax.summary import table

    print(table(CONFIGS[net], num_classes, batch_norm, image_size))
    return 0


def statistics(data: str, split: str, data_dir: str | None, download: bool, skip_bad: bool) -> int:
    from vgg_jax.data import measure, open_split

    source = open_split(data, split, data_dir=data_dir, download=download, skip_bad=skip_bad)
    measured = measure(source)
    print(f"{source.name}: {measured.count} images, RGB on the 0-255 scale")
    for label, values in (
        ("mean over all pixels", measured.pixel_mean),
        ("std over all pixels", measured.pixel_std),
        ("mean of the images' means", measured.image_mean),
        ("mean of the images' stds", measured.image_std),
    ):
        print(f"{label:<26}" + "".join(f"{value:>10.3f}" for value in values))
    return 0


def import_(file: str, out: str, net: str | None, check: str | None) -> int:
    from vgg_jax.weights import read, save

    weights = read(file, net)
    save(out, weights)
    mean = ", ".join(f"{value:.3f}" for value in weights.preprocessing.mean_rgb)
    print(f"{file}: {weights}; images are RGB, 0-255, less ({mean}); written to {out}")
    if check is None:
        return 0
    from vgg_jax.weights.check import BOUND, against_torch

    differences = against_torch(weights)
    for layer, difference in differences.items():
        print(f"{layer:<10}{difference:>10.1e}")
    worst = max(differences, key=lambda layer: differences[layer])
    print(f"largest difference from PyTorch: {differences[worst]:.1e} of the largest value, in {worst}; bound {BOUND:.0e}")
    return 0 if differences[worst] < BOUND else 1


def export(net: str, out: str, layout: str, output: str, uint8: bool, fold_batch_norm: bool, bfloat16: bool, arch: str | None) -> int:
    from vgg_jax.export import Artefact, kind_of, with_folded_batch_norm, write
    from vgg_jax.weights import read

    of_weights = kind_of(out) == "safetensors"
    if of_weights and (output, uint8) != ("logits", True):
        raise InputError(f"{out} holds weights only: expected neither --output nor --no-uint8 with it; they are for .onnx and the others")
    if layout != "vgg_jax" and not of_weights:
        raise InputError(f"layout is {layout!r}: expected a .safetensors file with it; {out} is a program")
    weights = read(net, arch)
    write(out, Artefact(with_folded_batch_norm(weights) if fold_batch_norm else weights, output, uint8, bfloat16), layout)
    print(f"{out}: written; `vgg-jax verify {out}` asks it again")
    return 0


def verify(file: str) -> int:
    from vgg_jax.export.verify import verify

    said, difference, bound = verify(file)
    print(f"{file}: {said}; largest difference from the answer at export: {difference:.1e} of the largest value; bound {bound:.0e}")
    return 0 if difference < bound else 1


def predict(net: str, images: list[str], top: int, as_json: bool, protocol: str, scales: list[int]) -> int:
    keep_memory()
    from vgg_jax.predict import predict

    failed = False
    for file, best, error in predict(net, images, protocol=Protocol(protocol), scales=scales, top=top):
        failed = failed or error is not None
        if as_json:
            known = {"top": [{"class": name, "probability": probability} for name, probability in best]}
            print(json.dumps({"file": file} | (known if error is None else {"error": error})), flush=True)
        elif error is not None:
            print(f"vgg-jax: {error}; expected a JPEG, PNG, WebP, BMP or GIF image", file=sys.stderr)
        else:
            print(f"{file}: " + "; ".join(f"{name} {probability:.1%}" for name, probability in best), flush=True)
    return 2 if failed else 0


def evaluate(
    run: str,
    data: str | None,
    split: str,
    scales: list[int],
    protocol: str,
    flip: bool | None,
    softmax_first: bool,
    ceil: bool,
    out: str | None,
    **where: Any,
) -> int:
    keep_memory()
    from vgg_jax.evaluate import evaluate, report, save

    chosen = Protocol(protocol, flip, softmax_first, ceil)
    beside = run if os.path.isdir(run) else run + "-evaluated"
    if out is not None or os.path.isfile(run):
        os.makedirs(out or beside, exist_ok=True)  # now rather than when all is computed
    evaluation, facts = evaluate(run, data, split, protocol=chosen, scales=scales, **where)
    flags = [name for name, on in (("mirrored", facts["protocol"]["flip"]), ("softmax-first", softmax_first), ("ceil", ceil)) if on]
    folder = out or os.path.join(beside, "-".join([*([plain(data)] if data else []), split, protocol, *map(str, facts["scales"]), *flags]))
    save(folder, evaluation, facts)
    print(f"{', '.join([protocol, 'Q = ' + ', '.join(map(str, facts['scales'])), *flags])}: {report(facts)}")
    print(f"{facts['seconds']:.1f} s, {facts['images_per_second']:.1f} images/s; {folder}/evaluation.json, {folder}/posteriors.npz")
    return 0


def fuse(posteriors: list[str], out: str | None) -> int:
    from vgg_jax.evaluate import fuse, report, save

    fused = fuse(posteriors)
    facts = {"fused": posteriors} | fused.errors()
    if out is not None:
        save(out, fused, facts)
    print(f"mean of {len(posteriors)} posteriors: {report(facts)}")
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="vgg-jax", description="VGG (Simonyan & Zisserman, arXiv 1409.1556) in JAX/Flax.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add_train(commands.add_parser("train", help="train a network, or go on with a run", argument_default=argparse.SUPPRESS))

    command = commands.add_parser("evaluate", help="a trained network's errors, as the paper measures them")
    command.set_defaults(command=evaluate)
    command.add_argument("run", metavar="RUN_OR_WEIGHTS", help="the workdir of a run, or a file of weights")
    add_data(command, None, "the run's own")
    command.add_argument("--split", default="val", help="of the run's own data, val is what the run validated on (default: val)")
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
        "--flip", action=argparse.BooleanOptionalAction, help="the mean with the mirror image (default: as in training; off for center)"
    )
    command.add_argument("--softmax-first", action="store_true", help="dense: soft-max at every position, then the mean")
    command.add_argument("--ceil", action="store_true", help="pooling as in Caffe: an odd side is rounded up")
    command.add_argument("--skip-bad", action="store_true", help="leave out files that are no images")
    add_cache(command)
    command.add_argument("--pixels", type=int, default=400_000, help="computed at once; more is faster on an accelerator (default: 400000)")
    command.add_argument(
        "--out",
        help="folder for evaluation.json and posteriors.npz (default: SPLIT-PROTOCOL-SCALES-FLAGS in RUN, or in FILE-evaluated)",
    )

    command = commands.add_parser("fuse", help="the mean of the posteriors of several evaluations")
    command.set_defaults(command=fuse)
    command.add_argument("posteriors", nargs="+", metavar="POSTERIORS.npz")
    command.add_argument("--out", help="folder for evaluation.json and posteriors.npz (default: none is written)")

    command = commands.add_parser("predict", help="the most probable classes of images")
    command.set_defaults(command=predict)
    command.add_argument("net", metavar="RUN_OR_WEIGHTS", help="the workdir of a run, or a file of weights")
    command.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders and patterns")
    command.add_argument("--top", type=int, default=5, help="classes of each image (default: 5)")
    command.add_argument("--json", action="store_true", dest="as_json", help="one JSON object a line")
    command.add_argument("--protocol", default="dense", choices=PROTOCOLS, help="default: dense")
    command.add_argument("--scales", type=int, nargs="+", default=[], metavar="Q", help="test scales (default: as for evaluate)")
    add_cache(command)

    command = commands.add_parser("import", help="another library's weights into a .safetensors file in our names")
    command.set_defaults(command=import_)
    command.add_argument("file", metavar="FILE", help=".pth, .safetensors (torchvision, timm), .h5 (Keras, flaxmodels), .caffemodel, .mat")
    command.add_argument("out", metavar="OUT", help="the .safetensors file to write")
    command.add_argument("--net", choices=CHOICES["net"], help="where the shapes do not tell: A-LRN")
    command.add_argument("--check", choices=("torch",), help="print the largest difference from PyTorch after each layer")

    command = commands.add_parser("export", help="a net as a file that others run")
    command.set_defaults(command=export)
    command.add_argument("net", metavar="RUN_OR_WEIGHTS", help="the workdir of a run, or a file of weights")
    command.add_argument("out", metavar="FILE", help="ends in .safetensors, .onnx, .stablehlo, or .savedmodel (a folder)")
    command.add_argument("--layout", choices=("vgg_jax", "torchvision", "timm"), default="vgg_jax", help=".safetensors: whose names")
    command.add_argument(
        "--output",
        choices=("logits", "posteriors", "score_map"),
        default="logits",
        help="not .safetensors: logits of images of the net's size; posteriors or score maps of any size (default: logits)",
    )
    command.add_argument(
        "--uint8",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="images are uint8, preprocessed inside (default), or float32",
    )
    command.add_argument("--fold-batch-norm", action="store_true", help="batch normalisation multiplied into the convolutions")
    command.add_argument("--bfloat16", action="store_true", help="half the size: weights are stored in bfloat16")
    command.add_argument("--net", dest="arch", choices=CHOICES["net"], help="where a file's shapes do not tell: A-LRN")

    command = commands.add_parser("verify", help="ask an exported file again for the answer that it was exported with")
    command.set_defaults(command=verify)
    command.add_argument("file", metavar="FILE")

    command = commands.add_parser("summary", help="a network's layers, parameters and cost")
    command.set_defaults(command=summary)
    command.add_argument("net", choices=CHOICES["net"])
    command.add_argument("--num-classes", type=int, default=1000)
    command.add_argument("--batch-norm", action="store_true")
    command.add_argument("--image-size", type=int, default=224)

    command = commands.add_parser("statistics", help="mean and standard deviation of a data set's colours")
    command.set_defaults(command=statistics)
    add_data(command)
    command.add_argument("--split", default="train")
    command.add_argument("--skip-bad", action="store_true", help="leave out files that are no images")
    return top


def add_data(command: argparse.ArgumentParser, default: str | None = "digits", said: str = "digits") -> None:
    command.add_argument(
        "data",
        nargs="?",
        default=default,
        metavar="DATA",
        help=f"digits, an image folder, or a name of TensorFlow Datasets (default: {said})",
    )
    command.add_argument("--data-dir", default=None, help="where prepared TensorFlow Datasets lie")
    command.add_argument("--download", action="store_true", default=False, help="let TensorFlow Datasets download and prepare the data")


def add_cache(command: argparse.ArgumentParser) -> None:
    help = "keep compiled programs in the user's cache folder"
    command.add_argument("--compilation-cache", action=argparse.BooleanOptionalAction, default=True, help=f"{help} (default: on)")


def add_train(command: argparse.ArgumentParser) -> None:
    """A flag for each field of TrainConfig. What is not given stays out, so that the data set's preset decides."""
    default = TrainConfig()
    command.set_defaults(command=train)
    command.description = (
        f"Train a network. Running the same command again goes on where it stopped. The defaults below are the paper's; "
        f"{', '.join(PRESETS)} have their own."
    )
    add_data(command)
    add_cache(command)
    command.add_argument("--workdir", default=None, help="the run's folder (default: runs/DATA-NET)")

    def flag(name: str, help: str, **options: Any) -> None:
        value = getattr(default, name)
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        if name in CHOICES:
            options["choices"] = CHOICES[name]
        command.add_argument("--" + name.replace("_", "-"), help=help if value in (None, ()) else f"{help} (default: {shown})", **options)

    def switch(name: str, help: str) -> None:
        command.add_argument("--" + name.replace("_", "-"), action=argparse.BooleanOptionalAction, help=help)

    flag("net", "column of Table 1")
    switch("batch_norm", "batch normalisation behind every convolution")
    flag("fc", "widths of fc6 and fc7", type=int, nargs=2)
    flag("dropout_rate", "of fc6 and fc7", type=float)
    flag("initializer", "of the kernels")
    flag("initializer_std", "the deviation of --initializer paper", type=float)
    flag("init_from", "start with the layers of a run, or of a file of weights", metavar="RUN_OR_WEIGHTS")
    flag("freeze", "layers that stay as they are: names, or conv or fc", nargs="+", metavar="LAYER")
    flag("dtype", "of the computation; parameters are float32")
    flag("image_size", "side of the crop that the net reads", type=int)
    flag("scale", "S, or S_min S_max: the shorter side that images are rescaled to", type=int, nargs="+", metavar="S")
    switch("flip", "mirror half of the images")
    flag("colour_shift", "deviation of the random shift along the principal colours, 0 for none", type=float)
    flag("colour_convention", "what the shift is relative to: a component's deviation or its variance")
    switch("exif", "turn photos upright as their EXIF orientation says")
    flag("statistics", "mean RGB and principal colours")
    flag("validation_fraction", "of the training images, where the data has no validation split", type=float)
    switch("skip_bad", "leave out files that are no images, instead of refusing the folder")
    flag("batch_size", "images a step", type=int)
    flag("microbatch", "images whose activations are held at once; a step adds up their gradients", type=int)
    flag("learning_rate", "at the start (default: 0.01, or 0.001 for fewer than 100 classes)", type=float)
    flag("momentum", "of SGD", type=float)
    flag("weight_decay", "L2 penalty", type=float)
    switch("decay_biases", "decay biases and batch-norm parameters too")
    flag("schedule", "when the rate is divided by 10")
    flag("patience", "plateau: epochs without a better validation accuracy", type=int)
    flag("drops", "plateau: times the rate is divided; the next plateau ends the run", type=int)
    flag("drop_epochs", "step: the epochs after which it is", type=int, nargs="+", metavar="EPOCH")
    flag("epochs", "at most", type=int)
    flag("seed", "of everything random", type=int)
