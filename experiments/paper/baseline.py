"""Does VGG16 with batch normalisation learn alike in vgg_jax and in PyTorch, with batches of 4?

    python -m experiments.paper.cifar10_arrays cifar10.npz --data-dir DIR
    python -m experiments.paper.baseline digits --width-divisor 8 --epochs 5 --step-size 4 \\
        --device "1 core of …"
    python -m experiments.paper.baseline digits --width-divisor 8 --epochs 5 --step-size 4 \\
        --optimizer adam --device "1 core of …"
    python -m experiments.paper.baseline cifar10.npz --width-divisor 8 --train-images 10000 \\
        --epochs 4 --step-size 3 [--optimizer adam] --device "1 core of …"

Answer: yes, with an eighth of the widths. On the digits and on 9,000 images of CIFAR-10, by SGD and
by Adam, the losses and accuracies of the last epoch differ by less than the noise over three seeds.
The full width was not run. A run by SGD took 20 to 80 seconds on the digits and 90 to 220 on
CIFAR-10, in both frameworks, on one core of an AMD EPYC that did other work too. The code was
edited since then. A run of each framework on the digits was repeated, and has the same curves. The
seconds of CIFAR-10 by Adam include pauses of up to 20 minutes.

The net, the summary and the epoch line are those of a review's baseline in PyTorch: ten classes,
SGD or Adam, StepLR. The images are resized and not augmented. Public versions of it take the mean
over five crops of larger images. The mean and the deviation are those of the training images: the
mean over images of the images' means, and of their deviations. They are measured before resizing.
Losses are means over the images. The review's are four times smaller: it adds up the means of
batches, and divides by the number of images.

Both frameworks start from the same weights, and see the same images in the same order. Dropout
differs. Each run is saved when it ends, and a second call skips it. Writes --out, prints what
the two frameworks differ in as one JSON line, and draws two PNG files into --figures. Needs torch,
or pass --frameworks jax. The first epoch in JAX has the time of compiling in it.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.paper.baseline_images import Rgb, load_images
from experiments.paper.framework_curves import FRAMEWORKS, QUANTITIES, compare, epoch_line, plot
from experiments.paper.result_file import ResultPart, Runs, command_line, log
from experiments.paper.scan_training import Data, build_small_model, divide_widths, train
from experiments.script import HelpFormatter, run
from vgg_jax.configs.models import CONFIGS
from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError
from vgg_jax.reporting.output import require_matplotlib
from vgg_jax.reporting.style import figure_bytes
from vgg_jax.runs.files import atomic_write
from vgg_jax.runtime.compilation_cache import enable_compilation_cache
from vgg_jax.summary import summarize, table, totals

NET = "D"
LEARNING_RATES = {"sgd": 1e-3, "adam": 1e-4}
MAX_DIVISOR = 64  # the narrowest convolution then has one channel


def make_config(args: argparse.Namespace, seed: int) -> TrainConfig:
    """The settings of a run in vgg_jax's terms. Adam is AdamW without weight decay."""
    drops = tuple(range(args.step_size, args.epochs, args.step_size))
    return TrainConfig(
        data=Path(args.data).stem,
        net=NET,
        batch_norm=True,
        dropout_rate=args.dropout_rate,
        image_size=args.image_size,
        scale=(args.image_size,),
        crop="centre",
        flip=False,
        colour_shift=0.0,
        statistics="measure",
        batch_size=args.batch_size,
        optimizer={"sgd": "sgd", "adam": "adamw"}[args.optimizer],
        learning_rate=args.learning_rate,
        weight_decay=0.0,
        schedule="step" if drops else "constant",
        drop_epochs=drops,
        epochs=args.epochs,
        seed=seed,
    )


def settings(args: argparse.Namespace, data: Data, std: Rgb) -> dict[str, Any]:
    """All that the curves depend on besides framework and seed."""
    names = ("image_size", "batch_size", "dropout_rate", "width_divisor", "epochs", "learning_rate")
    return {name: getattr(args, name) for name in names} | {
        "step_size": args.step_size,
        "train_images": data.train.size,
        "valid_images": data.validation.size,
        "mean": list(data.colours.mean_rgb),
        "deviation": list(std),
    }


def record(args: argparse.Namespace, framework: str, seed: int, data: Data, std: Rgb) -> dict:
    """Trains once, and returns the curves.

    Raises:
        InputError: The loss is not finite.
    """
    epochs: list[dict[str, float]] = []
    clock = time.perf_counter()

    def on_epoch(means: dict[str, Any]) -> None:
        nonlocal clock
        now = time.perf_counter()
        entry = {"seconds": round(now - clock, 2)}
        for quantity in QUANTITIES:
            split, _, name = quantity.partition("_")
            entry[quantity] = means["validation" if split == "valid" else split][name]
        epochs.append(entry)
        clock = now
        log(epoch_line(f"{framework} seed {seed}", len(epochs), entry))
        if not np.isfinite(entry["train_loss"]):
            raise InputError(
                f"the training loss of {framework}, seed {seed}, is {entry['train_loss']} with the "
                f"learning rate {args.learning_rate}: expected a number; pass a smaller "
                "--learning-rate"
            )

    config = make_config(args, seed)
    model = build_small_model(config, args.width_divisor, len(data.train.classes))
    if framework == "torch":
        from experiments.paper import torch_baseline

        torch_baseline.train(config, model, data, std, on_epoch)
    else:
        train(config, model, data, std_rgb=std, on_epoch=on_epoch)
    versions = {"python": platform.python_version()}
    versions |= {framework: importlib.metadata.version(framework)}
    return {"framework": framework, "seed": seed, "versions": versions, "epochs": epochs}


def summaries(args: argparse.Namespace, num_classes: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """The tables and totals of the review's summary, and of the net that is trained."""
    nets = {
        "imagenet": (CONFIGS[NET], 1000, True, 224),
        "trained": (
            divide_widths(CONFIGS[NET], args.width_divisor),
            num_classes,
            True,
            args.image_size,
        ),
    }
    return {
        name: (table(*net), totals(summarize(*net), image_size=net[-1]))
        for name, net in nets.items()
    }


def check(args: argparse.Namespace) -> None:
    """Raises InputError for a value that TrainConfig does not see, and for a missing package."""
    for name, largest in (("step_size", None), ("width_divisor", MAX_DIVISOR)):
        value = getattr(args, name)
        if value < 1 or (largest is not None and value > largest):
            expected = "at least 1" if largest is None else f"1 to {largest}"
            raise InputError(f"{name} is {value}: expected {expected}")
    if "torch" in args.frameworks and importlib.util.find_spec("torch") is None:
        raise InputError(
            "the framework 'torch' is not installed: run pip install torch, or pass --frameworks "
            "jax"
        )
    if args.figures is not None:
        require_matplotlib()


def save_figures(folder: Path, prefix: str, runs: Runs) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("loss", "accuracy"):
        content = figure_bytes(plot(runs, kind), "png")
        atomic_write(folder / f"{prefix}-{kind}.png", content)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("data", help="digits, or an .npz file of cifar10_arrays")
    parser.add_argument("--device", required=True)
    parser.add_argument("--optimizer", choices=LEARNING_RATES, default="sgd")
    parser.add_argument("--learning-rate", type=float, help=f"default: {LEARNING_RATES}")
    parser.add_argument("--step-size", type=int, default=2, help="epochs before StepLR divides it")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--train-images", type=int, help="before a tenth is held out; default: all")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--dropout-rate", type=float, default=0.5)
    parser.add_argument(
        "--width-divisor", type=int, default=1, help="divides all widths of the net"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--frameworks", nargs="+", choices=FRAMEWORKS, default=FRAMEWORKS)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/baseline.json"))
    parser.add_argument("--figures", type=Path, help="folder for the PNG files")
    args = parser.parse_args(arguments)
    if args.learning_rate is None:
        args.learning_rate = LEARNING_RATES[args.optimizer]
    return args


def main() -> None:
    args = parse(sys.argv[1:])
    check(args)
    make_config(args, args.seeds[0])  # raises for a wrong value before the images are read
    data, std = load_images(args.data, args.train_images)
    tables = summaries(args, len(data.train.classes))
    name = Path(args.data).stem
    results = ResultPart(
        args.out,
        f"{name}_{args.optimizer}_{args.width_divisor}",
        {
            "data": name,
            "optimizer": args.optimizer,
            "command": command_line("experiments.paper.baseline", args.data),
            "device": args.device,
            "settings": settings(args, data, std),
            "data_digest": data.train.storage,
            "nets": {net: numbers for net, (_, numbers) in tables.items()},
        },
        key=("framework", "seed"),
        summarize=compare,
    )
    for text, _ in tables.values():
        log(text)
    enable_compilation_cache()
    for seed in dict.fromkeys(args.seeds):
        for framework in dict.fromkeys(args.frameworks):
            if results.find(framework=framework, seed=seed):
                log(f"{framework} seed {seed}: skipped, because it is saved")
            else:
                results.add(record(args, framework, seed, data, std))
    if args.figures is not None:
        save_figures(args.figures, f"{name}-{args.optimizer}", results.runs)
    print(json.dumps(compare(results.runs)))


if __name__ == "__main__":
    run(main)
