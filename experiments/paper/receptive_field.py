"""Are stacks of 3x3 convolutions better than one large convolution with the same field (§2.3)?

    python -m experiments.paper.receptive_field layers --device "2 cores of …" \\
        --out experiments/results/receptive_field.json
    python -m experiments.paper.receptive_field nets cifar10.npz --device "2 cores of …" \\
        --learning-rate 0.01 --batch-size 64 --epochs 5 \\
        --out experiments/results/receptive_field.json

cifar10.npz is made by `experiments.paper.cifar10_arrays`.

Answer for layers: the fields are equal, 5 and 7 pixels as measured. One 5x5 layer has 1.39 times
the parameters and multiply-adds of two 3x3, and takes 1.6 to 2.5 times as long. One 7x7 has 1.81
times those of three 3x3, and takes 2.2 to 3.1 times as long. Two cores of an AMD EPYC, 80 seconds
with --rounds 10. On a CPU the 3x3 layers run as Winograd's, and the large ones as XLA's
convolutions.

Answer for nets, with an eighth of the widths and five epochs: undecided. B and B-5x5 differ by less
than the spread over three seeds. D is worse than D-7x7 with each seed, by 5 to 15 points, with
p = 0.08. D has six layers more than D-7x7, and five epochs may be too few for it. A run takes three
to four minutes on one core of an AMD EPYC. The recorded seconds include pauses for other work.
Seed 2 ran in a second process with --seeds 2. B and B-5x5 with seed 0 ran before the products on
small maps changed, which changed the rounding.

- layers: two 3x3 layers against one 5x5, and three 3x3 against one 7x7, each with C channels and a
  ReLU after each layer. Parameters, multiply-adds, the receptive field as measured by gradients,
  and the seconds of a forward pass, and of one with the gradients of input and parameters. The two
  stacks of a pair are timed in turn, in both orders.
- nets: net B against B-5x5, and net D against D-7x7, which has one 7x7 layer instead of the three
  3x3 layers of stages 3 to 5. All have batch normalisation and the same images, order and crops.
  The results are the test accuracies for each seed, by dense evaluation, and the mean and deviation
  of the differences over the seeds that both nets of a pair have.

A finished run is not repeated.
"""

import argparse
import dataclasses
import statistics
import time
from typing import Any

from scipy import stats

from experiments.paper.convolution_stacks import PAIRS, compare_layers
from experiments.paper.result_file import ResultPart, Runs, log, make_header
from experiments.paper.scan_training import (
    Data,
    build_small_model,
    divide_widths,
    load_data,
    posteriors,
    train,
)
from experiments.script import HelpFormatter, check_at_least_one, run
from vgg_jax import CONFIGS, Conv, VGGConfig, preset
from vgg_jax.errors import InputError
from vgg_jax.runtime.compilation_cache import enable_compilation_cache
from vgg_jax.summary import summarize, totals

NETS: dict[str, VGGConfig] = {name: CONFIGS[name] for name in ("B", "B-5x5", "D")}
NETS["D-7x7"] = dataclasses.replace(
    CONFIGS["D"],
    stages=(
        *CONFIGS["D"].stages[:2],
        *((Conv(stage[0].features, 7),) for stage in CONFIGS["D"].stages[2:]),
    ),
)
NET_PAIRS = (("B", "B-5x5"), ("D", "D-7x7"))


def run_layers(args: argparse.Namespace, results: ResultPart) -> None:
    """Compares the stacks at each size."""
    if len(args.channels) != len(args.sides):
        raise InputError(
            f"there are {len(args.channels)} --channels and {len(args.sides)} --sides: "
            "expected a side for each number of channels"
        )
    for channels, side in zip(args.channels, args.sides, strict=True):
        for pair in PAIRS:
            key = {"pair": pair, "channels": channels, "side": side}
            if not results.find(**key):
                results.add(key | compare_layers(**key, batch_size=args.batch, rounds=args.rounds))
                log(f"{key}: ratios {results.runs[-1]['ratios']}")


def train_net(net: str, seed: int, args: argparse.Namespace, data: Data) -> dict[str, Any]:
    """Trains a net, and evaluates the test images.

    Returns:
        Parameters and multiply-adds, the curves, the "test_accuracy", and the "seconds" of the
        training with its compilation.

    Raises:
        InputError: The loss is not finite.
    """
    config = preset(
        "cifar10",
        net="D",
        batch_norm=True,
        schedule="cosine",
        learning_rate=args.learning_rate,
        batch_size=args.batch_size,
        epochs=args.epochs,
        statistics="measure",
        seed=seed,
    )
    narrow = divide_widths(dataclasses.replace(NETS[net], fc=config.fc), args.width_divisor)
    classes = len(data.train.classes)
    model = build_small_model(config, args.width_divisor, classes).clone(config=narrow)
    counts = totals(summarize(narrow, classes, True, config.image_size), config.image_size)
    started = time.perf_counter()
    result = train(config, model, data, log=lambda line: log(f"{net}, seed {seed}, {line}"))
    seconds = time.perf_counter() - started
    if result.diverged:
        raise InputError(
            f"the training loss of {net}, seed {seed}, is {result.losses[-1]} with the learning "
            f"rate {args.learning_rate}: expected a number; pass a smaller --learning-rate"
        )
    guesses = posteriors(model, result.variables, data, "dense", config.test_scale).argmax(1)
    return {
        "net": net,
        "seed": seed,
        "params": counts["params"],
        "macs": counts["macs"],
        "epochs": result.epochs,
        "test_accuracy": float((guesses == data.test.labels).mean()),
        "seconds": round(seconds, 1),
    }


def run_nets(args: argparse.Namespace, data: Data, results: ResultPart) -> None:
    """Trains every net with every seed."""
    for seed in args.seeds:
        for net in NETS:
            if not results.find(net=net, seed=seed):
                results.add(train_net(net, seed, args, data))


def compare_nets(runs: Runs) -> dict[str, Any]:
    """Compares the test accuracies of each pair, for the seeds that both nets have finished.

    Returns:
        For each pair the "seeds" and the "accuracies" of both nets in the order of the seeds; and
        the "differences" (the 3x3 layers minus the large one) with their mean, their deviation and
        the p-value of the paired t-test. Pairs with fewer than two common seeds are left out.
    """
    accuracies = {(run["net"], run["seed"]): run["test_accuracy"] for run in runs}
    summary = {}
    for small, large in NET_PAIRS:
        seeds = sorted(
            seed for net, seed in accuracies if net == small and (large, seed) in accuracies
        )
        if len(seeds) < 2:
            continue
        common = {net: [accuracies[net, seed] for seed in seeds] for net in (small, large)}
        differences = [ours - theirs for ours, theirs in zip(*common.values(), strict=True)]
        summary[f"{small} - {large}"] = {
            "seeds": seeds,
            "accuracies": common,
            "differences": differences,
            "mean": statistics.mean(differences),
            "deviation": statistics.stdev(differences),
            "p": float(stats.ttest_rel(*common.values()).pvalue),
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("part", choices=("layers", "nets"))
    parser.add_argument("data", nargs="?", help="nets: CIFAR-10, an .npz file")
    parser.add_argument("--out", required=True, help="the JSON file, which may have finished runs")
    parser.add_argument("--device", required=True, help="name of the device, for the results")
    layers = parser.add_argument_group("layers")
    layer_flags = (
        layers.add_argument("--channels", type=int, nargs="+", default=[64, 256, 512]),
        layers.add_argument(
            "--sides", type=int, nargs="+", default=[56, 28, 14], help="of the maps"
        ),
        layers.add_argument("--batch", type=int, default=8, help="images of a timed call"),
        layers.add_argument("--rounds", type=int, default=20, help="timed calls of each stack"),
    )
    nets = parser.add_argument_group("nets")
    net_flags = (
        nets.add_argument("--width-divisor", type=int, default=8, help="1: the paper's widths"),
        nets.add_argument("--train-images", type=int, default=45000, help="a tenth is held out"),
        nets.add_argument("--batch-size", type=int, default=128),
        nets.add_argument("--epochs", type=int, default=3),
        nets.add_argument("--learning-rate", type=float, default=0.05, help="the highest one"),
        nets.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2]),
    )
    args = parser.parse_args()
    is_layers = args.part == "layers"
    if not is_layers and args.data is None:
        raise InputError("no data: expected an .npz file after nets")
    check_at_least_one(args, "width_divisor", "batch", "rounds", "train_images")
    enable_compilation_cache()
    log(f"finished runs are kept in {args.out} and not repeated")
    other_flags = net_flags if is_layers else layer_flags
    # Runs of other seeds and sizes may be added.
    added = ("channels", "sides", "seeds")
    header = make_header(
        "experiments.paper.receptive_field",
        args,
        packages=("jax",),
        not_settings=(*added, *(flag.dest for flag in other_flags)),
    )
    if is_layers:
        run_layers(args, ResultPart(args.out, "layers", header, key=("pair", "channels", "side")))
        return
    data = load_data(args.data, args.train_images)
    header |= {"data_digest": data.train.storage}
    key = ("net", "seed")
    run_nets(args, data, ResultPart(args.out, "nets", header, key=key, summarize=compare_nets))


if __name__ == "__main__":
    run(main)
