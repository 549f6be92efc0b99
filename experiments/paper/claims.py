"""Which claims of the paper hold for small nets on CIFAR-10?

    python -m experiments.paper.cifar10_arrays cifar10.npz --data-dir DIR
    python -m experiments.paper.claims cifar10.npz --out runs/claims --width-divisor 2 \\
        --epochs 12 --crop-images 5000 --device "one NVIDIA H200"
    python -m experiments.paper.claims cifar10.npz --out runs/claims_cpu --width-divisor 8 \\
        --epochs 4 --device "one core of an AMD EPYC" --nets D E "D, jitter" "E, jitter" \\
        "D, S=384" "A, BN" "B, BN" "B-5x5, BN" "C, BN" "D, BN" "E, BN"

Answer, with half of the widths and 12 epochs: a normal start leaves net D at ln 10, and the layers
of A or Glorot's distribution train it. E does not beat D, and three test scales help a net with
S = 256. Depth beyond B does not help: D is worse than B, and E worse than D and A. B beats B-5x5
with each seed, but one seed of B-5x5 learns nothing, so the t-test does not decide. Claims on
scale jitter have two seeds, and so have those with batch normalisation: they are undecided.

With an eighth of the widths and 4 epochs, the nets with jitter do worse than those with S = 256.
Three test scales help. Fusion of D and E helps if dense and multi-crop posteriors are averaged.
Batch normalisation lowers the error of D by 12 points. With it, E does worse than D and A.

One NVIDIA H200 trained and evaluated 49 of the 57 nets in 12 minutes, in eight processes at once.
The second command took 2.7 hours of two cores of an AMD EPYC, in two processes: 5 to 11 minutes
for a net, and 13 or 14 with jitter.

Each net of the paper is trained with each seed, and each claim is tested on pairs of nets with the
same seed: the same order of images and the same crops. The nets are made small by one rule:

- All widths of Table 1, and those of fc6 and fc7, are divided by --width-divisor.
- Images have 64 pixels instead of 224, enlarged from 32. All scales have the paper's ratio to them:
  S = 256 is 73.
- Dense evaluation sees the centre of an image, with sides that 32 divides: 64 of 73 pixels.
- Each net is trained for --epochs, with a cosine instead of the plateaus. Nets with scale jitter
  start from random weights, not from those of S = 384.
- The "normal" initialiser has a deviation of 0.01 in the full net. In a small one it is larger, so
  that each layer changes the size of its signal as in the full net.

The program is resumable. --out keeps each finished net, and the state of an unfinished one after
each epoch, from which the same command goes on. The train_seconds of such a net count from its last
start. Another machine may go on with the same --out: each net records its own --device. Several
processes may share --out, also on one GPU, each with a part of its memory
(XLA_PYTHON_CLIENT_MEM_FRACTION=.11). --collect trains nothing and writes the table of what is
finished.
"""

import argparse
import dataclasses
import itertools
import json
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.paper.claims_table import CLAIMS, Part, claim_row
from experiments.paper.imagenet_recipe import scaled
from experiments.paper.result_file import command_line, log
from experiments.paper.scan_training import (
    Data,
    Result,
    build_small_model,
    keep_gains,
    load_data,
    posteriors,
    train,
)
from experiments.script import HelpFormatter, run
from vgg_jax.arrays import ArraySource
from vgg_jax.configs.models import CONFIGS
from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError
from vgg_jax.model import PAPER_INIT_LAYERS, VGG, copy_matching_layers
from vgg_jax.runs.files import LockedError, atomic_write, workdir_lock
from vgg_jax.runtime.compilation_cache import enable_compilation_cache

IMAGE_SIZE = 64
MAX_DIVISOR = 64  # the narrowest convolution then has one channel


class Net(NamedTuple):
    """A net to train with each seed."""

    settings: Mapping[str, Any]  # fields of TrainConfig
    scale: tuple[int, ...] = (256,)  # the paper's S, or S_min and S_max
    start: str | None = None  # the net whose first layers and fully connected layers it copies


PLAIN = ("A", "A-LRN", "B", "B-5x5", "C", "D", "E")
NETS: dict[str, Net] = {
    **{name: Net({"net": name}) for name in PLAIN},
    "D, jitter": Net({"net": "D"}, (256, 512)),
    "E, jitter": Net({"net": "E"}, (256, 512)),
    "D, S=384": Net({"net": "D"}, (384,)),
    "A, normal": Net({"net": "A", "initializer": "paper"}),
    "D, normal": Net({"net": "D", "initializer": "paper"}),
    "D, from A": Net({"net": "D", "initializer": "paper"}, start="A, normal"),
    **{f"{name}, BN": Net({"net": name, "batch_norm": True}) for name in PLAIN if name != "A-LRN"},
}


def needed_parts(net: str) -> list[Part]:
    """All posteriors of a net that the claims need, without repetition."""
    parts = (part for claim in CLAIMS for part in (*claim.before, *claim.after))
    return list(dict.fromkeys(part for part in parts if part.net == net))


def make_config(net: Net, args: argparse.Namespace, seed: int) -> TrainConfig:
    """The settings of a run."""
    return TrainConfig(
        data=args.data,
        image_size=IMAGE_SIZE,
        scale=tuple(scaled(scale, IMAGE_SIZE) for scale in net.scale),
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        schedule="cosine",
        epochs=args.epochs,
        seed=seed,
        **net.settings,
    )


def run_folder(args: argparse.Namespace, name: str, seed: int) -> Path:
    return Path(args.out) / f"{name.replace(', ', '-').replace('=', '')}-{seed}"


def is_finished(args: argparse.Namespace, name: str, seed: int) -> bool:
    return (run_folder(args, name, seed) / "curves.json").exists()


def train_net(args: argparse.Namespace, data: Data, name: str, seed: int) -> None:
    """Trains and evaluates a net, and keeps its curves, posteriors and parameters."""
    net, folder, started = NETS[name], run_folder(args, name, seed), time.monotonic()
    config = make_config(net, args, seed)
    model = build_small_model(config, args.width_divisor, len(data.train.classes))

    def start_from(variables: dict[str, Any]) -> dict[str, Any]:
        if config.initializer == "paper":
            full = VGG(CONFIGS[config.net], batch_norm=config.batch_norm)
            variables = keep_gains(model, full, variables)
        if net.start is None:
            return variables
        source = load_variables(run_folder(args, net.start, seed))
        return copy_matching_layers(source=source, target=variables, layers=PAPER_INIT_LAYERS)[0]

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "state.npz"
    result = train(
        config,
        model,
        data,
        start_from,
        lambda line: log(f"{name}, {seed}: {line}"),
        checkpoint=checkpoint,
    )
    trained = time.monotonic()
    arrays = {}
    for part in () if result.diverged else needed_parts(name):
        images = data.test if part.protocol == "dense" else first(data.test, args.crop_images)
        scale = scaled(part.scale, IMAGE_SIZE)
        arrays[f"{part.protocol} {part.scale}"] = posteriors(
            model, result.variables, data._replace(test=images), part.protocol, scale
        )
    save(folder, result, arrays)
    curves = {
        "device": args.device,
        "jax": jax.__version__,
        "train_seconds": round(trained - started, 1),
        "evaluate_seconds": round(time.monotonic() - trained, 1),
        "diverged": result.diverged,
        "epochs": [] if result.diverged else result.epochs,
        "losses": [] if result.diverged else thin(result.losses),
    }
    atomic_write(folder / "curves.json", json.dumps(curves).encode())  # it ends the run
    checkpoint.unlink(missing_ok=True)


def first(source: ArraySource, count: int) -> ArraySource:
    """The first images of a source."""
    return dataclasses.replace(source, indices=source.indices[:count])


def thin(losses: list[float], points: int = 60) -> list[list[float]]:
    """The mean losses of `points` parts of the run: [number of the last step, loss]."""
    parts = np.array_split(np.arange(len(losses)), min(points, len(losses)))
    return [
        [int(part[-1]) + 1, round(float(np.mean([losses[i] for i in part])), 4)] for part in parts
    ]


def save(folder: Path, result: Result, arrays: dict[str, np.ndarray]) -> None:
    """Writes posteriors.npz and variables.npz."""
    np.savez(folder / "posteriors.npz", **{name: np.float32(x) for name, x in arrays.items()})
    leaves = jax.tree_util.tree_leaves_with_path(result.variables)
    flat = {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}
    np.savez(folder / "variables.npz", **flat)


def load_variables(folder: Path) -> dict[str, Any]:
    """Reads the variables of a finished net."""
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    with np.load(folder / "variables.npz") as file:
        for name in file.files:
            collection, layer, parameter = name.split("/")
            variables[collection].setdefault(layer, {})[parameter] = file[name]
    return variables


def settings(args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """All that the nets in a folder have in common."""
    names = ("width_divisor", "epochs", "batch_size", "learning_rate", "crop_images")
    return {
        **{name: getattr(args, name) for name in names},
        "train_images": data.train.size,
        "test_images": data.test.size,
        "images": [data.train.storage, data.test.storage],
    }


def check_settings(args: argparse.Namespace, data: Data) -> None:
    """Compares the settings with those of the nets in the folder, or records them there."""
    path = Path(args.out) / "settings.json"
    if not path.exists():
        if args.collect:
            raise InputError(
                f"no settings.json in {args.out}: expected the folder of an earlier call"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--out {args.out} cannot be made ({error.strerror}): expected a folder"
            ) from error
        atomic_write(path, json.dumps(settings(args, data), indent=1).encode())
        return
    try:
        recorded = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: expected JSON; pass another --out") from error
    for name, value in settings(args, data).items():
        if recorded.get(name) != value:
            raise InputError(
                f"{name} is {value}, and {recorded.get(name)} in {path}: expected the same; pass "
                "another --out"
            )


def check(args: argparse.Namespace) -> None:
    """Raises InputError for a number that no net can be trained with."""
    for name, least, most in (
        ("width_divisor", 1, MAX_DIVISOR),
        ("epochs", 1, None),
        ("batch_size", 1, None),
        ("train_images", 10, None),
        ("test_images", 1, None),
        ("crop_images", 1, args.test_images),
    ):
        value = getattr(args, name)
        if value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"{least} to {most}"
            flag = name.replace("_", "-")
            raise InputError(f"--{flag} is {value}: expected {limits}")


def train_all(args: argparse.Namespace, data: Data) -> None:
    """Trains the nets that are neither finished nor taken by another process."""
    for seed in args.seeds:
        for name in args.nets:
            start = NETS[name].start
            if is_finished(args, name, seed):
                continue
            if start is not None and not is_finished(args, start, seed):
                log(f"{name}, {seed}: skipped, since {start} is not finished")
                continue
            try:
                with workdir_lock(run_folder(args, name, seed)):
                    if not is_finished(args, name, seed):  # another process may have been faster
                        train_net(args, data, name, seed)
            except LockedError:
                log(f"{name}, {seed}: skipped, since another process trains it")


def read_finished(path: Path, read: Callable[[Path], Any]) -> Any:
    """Reads a file of a finished net.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        return read(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is missing or damaged: expected the file of a finished net; remove its folder "
            "and run the command again"
        ) from error


def _read_part(path: Path, part: Part) -> np.ndarray | None:
    with np.load(path) as file:
        return file.get(f"{part.protocol} {part.scale}")


def collect(args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """The table of all claims, and the curves of the finished nets."""
    nets: dict[str, dict[int, Any]] = {name: {} for name in NETS}
    for name, seed in itertools.product(NETS, args.seeds):
        if is_finished(args, name, seed):
            path = run_folder(args, name, seed) / "curves.json"
            nets[name][seed] = read_finished(path, lambda path: json.loads(path.read_text()))

    def load(part: Part, seed: int) -> np.ndarray | None:
        if seed not in nets[part.net] or nets[part.net][seed]["diverged"]:
            return None
        path = run_folder(args, part.net, seed) / "posteriors.npz"
        return read_finished(path, lambda path: _read_part(path, part))

    return {
        "command": command_line("experiments.paper.claims", args.data).replace(" --collect", ""),
        "device": recorded(nets, "device"),
        "versions": {"jax": recorded(nets, "jax")},
        "settings": settings(args, data),
        "claims": [claim_row(claim, args.seeds, load, data.test.labels) for claim in CLAIMS],
        "nets": nets,
    }


def recorded(nets: Mapping[str, Mapping[int, Any]], key: str) -> str:
    """What the finished nets have under a key, each value once."""
    values = (
        curves.get(key, "not recorded") for seeds in nets.values() for curves in seeds.values()
    )
    return "; ".join(dict.fromkeys(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("data", help="CIFAR-10 as an .npz file")
    parser.add_argument("--out", required=True, help="folder of the finished nets")
    parser.add_argument("--collect", action="store_true", help="train nothing, print the table")
    parser.add_argument("--device", required=True, help="name of the machine, for the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    names = ", ".join(f"'{name}'" for name in NETS)
    parser.add_argument(
        "--nets",
        nargs="+",
        default=list(NETS),
        choices=NETS,
        metavar="NET",
        help=f"default: all of {names}",
    )
    parser.add_argument("--width-divisor", type=int, default=8, help="1: the paper's widths")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--train-images", type=int, default=50_000, help="a tenth is held out")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--crop-images", type=int, default=2_000, help="for multi-crop evaluation")
    args = parser.parse_args()
    args.seeds = list(dict.fromkeys(args.seeds))  # one seed twice would be one sample twice
    check(args)
    enable_compilation_cache()
    data = load_data(args.data, args.train_images, args.test_images)
    check_settings(args, data)
    if not args.collect:
        train_all(args, data)
    print(json.dumps(collect(args, data), indent=1))


if __name__ == "__main__":
    run(main)
