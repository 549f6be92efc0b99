"""Do vgg_jax and PyTorch train alike from the same weights, on the same crops in the same order?

    python -m experiments.paper.parity first-steps cifar10.npz --device "2 cores of …" \\
        --out experiments/results/parity.json
    python -m experiments.paper.parity runs cifar10.npz --train-images 50000 --epochs 3 \\
        --learning-rate 0.01 --dropout 0.2 --device "2 cores of …" \\
        --out experiments/results/parity.json

cifar10.npz is made by `experiments.paper.cifar10_arrays`. Needs torch.

Answer for the first 50 steps, with an eighth of the widths: in float64, all three settings meet the
bound of 1e-4. The losses agree to 3e-13. In float32, none of the three meets the bound of 1e-2. The
losses differ by 0.11 and 0.10 with batch normalisation, and by 0.03 without it.

Rounding alone gives such differences in float32. Our own losses differ by more, 0.04 to 0.18,
between two starts that are one part in 1e7 apart. This control exceeds the bound after as many
steps as PyTorch: after 2 with batch normalisation, after 37 without. So the bound of 1e-2 cannot
tell an error from rounding here. At full width it is the same: 0.19 with batch normalisation and
0.06 without it, and 0.15 and 0.07 between our two starts. Float64 was not run at full width.

Answer for whole runs, with an eighth of the widths and three epochs of 45,000 images: the test
accuracies are 58.4 ± 0.3 % here and 58.2 ± 1.9 % in PyTorch, and differ by 0.2 points. That is
within the range of three seeds, 3.4 points in PyTorch. A run took three to six minutes on one core
of an AMD EPYC that did other work too.

Both train net D by SGD with a cosine schedule. PyTorch gets our initial weights, and the very crops
and colour shifts of our augmentation. It has its own convolutions, batch normalisation, SGD and
schedule.

- first-steps: the losses of the first steps of a run, with and without batch normalisation, in
  float64 and in float32. There is no dropout, because the two draw other masks. The loss on the
  held-out images after these steps is compared as well, because it depends on the running
  statistics. The learning rate is --learning-rate with batch normalisation, and the paper's 0.01
  with and without it. As a control, vgg_jax is compared with itself: from the same weights, and
  from weights changed by one part in 1e7, about the rounding error of a float32. The control has
  the dtype of its row. A difference between the frameworks in float32 of the control's size can
  come from rounding alone.
- runs: whole runs with batch normalisation and dropout, for each seed. Each framework draws its own
  dropout masks. The results are the curves of each epoch, and the loss and accuracy on the test
  images. The difference of the mean accuracies is "within the spread" if it is at most the larger
  range (highest minus lowest) of the accuracies of a framework.

A finished run is not repeated. The paper's widths and all images need --width-divisor 1
--train-images 50000 --epochs 60 --batch-size 128, and a GPU.
"""

import argparse
import statistics
import time
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.paper.framework_curves import FRAMEWORKS, means
from experiments.paper.jax_training import Crops, JaxTraining, perturb
from experiments.paper.result_file import ResultPart, Runs, log, make_header
from experiments.paper.scan_training import Data, build_small_model, load_data
from experiments.script import HelpFormatter, check_at_least_one, run
from vgg_jax import CONFIGS, VGG, TrainConfig, preset
from vgg_jax.errors import InputError
from vgg_jax.runtime.compilation_cache import enable_compilation_cache

BOUNDS = {"float32": 1e-2, "float64": 1e-4}  # of the difference of a loss
PAPER_RATE = 1e-2  # §3.1
FIRST_STEPS_KEY = ("batch_norm", "learning_rate", "dtype", "seed")


def start(framework: str, config: TrainConfig, model: VGG, data: Data, steps_per_epoch: int) -> Any:
    """Starts a training from the initial weights of vgg_jax.

    Raises:
        InputError: torch is not installed.
    """
    training = JaxTraining(config, model, data, steps_per_epoch)
    if framework == "jax":
        return training
    return start_torch(config, model, training.variables, data, steps_per_epoch)


def start_torch(
    config: TrainConfig, model: VGG, variables: dict[str, Any], data: Data, steps_per_epoch: int
) -> Any:
    """Starts a training in PyTorch from the variables of our net."""
    return import_torch().TorchTraining(
        config, model, variables, data.colours.mean_rgb, steps_per_epoch
    )


def import_torch() -> ModuleType:
    """Imports PyTorch's side.

    Raises:
        InputError: torch is not installed.
    """
    try:
        from experiments.paper import torch_training
    except ImportError as error:
        raise InputError(
            f"the comparison with PyTorch needs torch ({error}): pip install torch"
        ) from error
    return torch_training


def make_config(args: argparse.Namespace, seed: int, **changes: Any) -> TrainConfig:
    settings = {
        "net": args.net,
        "batch_norm": True,
        "schedule": "cosine",
        "learning_rate": args.learning_rate,
        "batch_size": args.batch_size,
        "epochs": args.epochs,
        "dropout_rate": args.dropout,
        "statistics": "measure",
        "seed": seed,
    }
    return preset("cifar10", **settings | changes)


def compare_first_steps(
    config: TrainConfig, model: VGG, data: Data, num_steps: int
) -> dict[str, Any]:
    """Compares the losses of the first steps of a run.

    Args:
        config: Settings of the run, without dropout.
        model: The net, in float32 or float64. float64 needs `jax.enable_x64`.
        data: The images.
        num_steps: Number of steps, at most those of an epoch.

    Returns:
        The "losses" of "jax", "torch" and the control, "perturbed": those that we get from weights
        changed by one part in 1e7. The largest difference of PyTorch's and of the control's from
        ours. The loss of each framework on the held-out images, and the difference.
    """
    steps_per_epoch = -(-data.train.size // config.batch_size)
    if not 0 < num_steps <= steps_per_epoch:
        raise InputError(
            f"{num_steps} steps are asked for: expected 1 to {steps_per_epoch}, those of an epoch; "
            "pass other --steps or more --train-images"
        )
    crops = Crops(config, data)
    batches, held_out = crops.train(0, num_steps), crops.centre(data.validation)
    ours = JaxTraining(config, model, data, steps_per_epoch)
    variables = ours.variables
    theirs = start_torch(config, model, variables, data, steps_per_epoch)
    losses, validation = {}, {}
    for framework, training in zip(FRAMEWORKS, (ours, theirs), strict=True):
        sums = training.train(batches)
        losses[framework] = sums["loss"] / sums["count"]
        validation[framework] = means(training.evaluate(held_out))["loss"]
    ours.restart(perturb(variables["params"]))
    sums = ours.train(batches)
    losses["perturbed"] = sums["loss"] / sums["count"]
    return {
        "losses": {name: values.tolist() for name, values in losses.items()},
        "largest_difference": _largest_difference(losses["jax"], losses["torch"]),
        "perturbed_difference": _largest_difference(losses["jax"], losses["perturbed"]),
        "validation_loss": validation,
        "validation_difference": abs(validation["jax"] - validation["torch"]),
    }


def _largest_difference(ours: np.ndarray, others: np.ndarray) -> float:
    return float(np.abs(ours - others).max())


def steps_within(ours: list[float], others: list[float], bound: float) -> int:
    """The number of first steps whose losses all differ by less than a bound."""
    over = np.abs(np.subtract(ours, others)) >= bound
    return int(over.argmax()) if over.any() else len(over)


def first_steps(args: argparse.Namespace, data: Data, results: ResultPart) -> None:
    """Compares the first steps in each setting."""
    settings = ((True, args.learning_rate), (True, PAPER_RATE), (False, PAPER_RATE))
    for dtype, bound in BOUNDS.items():
        for batch_norm, rate in dict.fromkeys(settings):
            config = make_config(
                args, args.seeds[0], batch_norm=batch_norm, learning_rate=rate, dropout_rate=0.0
            )
            key = {"batch_norm": batch_norm, "learning_rate": rate, "dtype": dtype}
            key["seed"] = config.seed
            if results.find(**key):
                continue
            model = build_small_model(config, args.width_divisor, len(data.train.classes))
            with jax.enable_x64(dtype == "float64"):
                model = model.clone(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
                outcome = compare_first_steps(config, model, data, args.steps)
            differences = (outcome["largest_difference"], outcome["validation_difference"])
            comparison = key | {"bound": bound}
            losses = outcome["losses"]
            comparison |= {
                "within_bound": max(differences) < bound,
                "steps_within_bound": {
                    name: steps_within(losses["jax"], losses[name], bound)
                    for name in ("torch", "perturbed")
                },
            }
            comparison |= outcome
            results.add(comparison)
            log(
                f"{key}: {differences[0]:.2g} in a step, {differences[1]:.2g} held out; "
                f"{outcome['perturbed_difference']:.2g} from perturbed weights"
            )


def whole_runs(args: argparse.Namespace, data: Data, results: ResultPart) -> None:
    """Trains with each framework and seed."""
    for seed in args.seeds:
        for framework in FRAMEWORKS:
            if not results.find(framework=framework, seed=seed):
                config = make_config(args, seed)
                model = build_small_model(config, args.width_divisor, len(data.train.classes))
                curves = whole_run(framework, config, model, data)
                results.add({"framework": framework, "seed": seed} | curves)


def whole_run(framework: str, config: TrainConfig, model: VGG, data: Data) -> dict[str, Any]:
    """Trains to the end, and evaluates the test images once.

    Returns:
        "epochs", with the loss and accuracy in training and on the held-out images; "test"; and
        the "seconds" of the training with its compilation, without the crops.
    """
    crops = Crops(config, data)
    training = start(framework, config, model, data, -(-data.train.size // config.batch_size))
    held_out, epochs, seconds = crops.centre(data.validation), [], 0.0
    for number in range(config.epochs):
        batches = crops.train(number)
        started = time.perf_counter()
        sums = training.train(batches)
        seconds += time.perf_counter() - started
        epochs.append({"train": means(sums), "validation": means(training.evaluate(held_out))})
        log(f"{framework}, seed {config.seed}, epoch {number + 1}: {epochs[-1]}")
    test = means(training.evaluate(crops.centre(data.test)))
    return {"epochs": epochs, "test": test, "seconds": round(seconds, 1)}


def summarize(runs: Runs) -> dict[str, Any] | None:
    """Compares the test accuracies of the seeds that both frameworks have finished.

    Returns:
        None for fewer than two seeds.
    """
    seeds = [{run["seed"] for run in runs if run["framework"] == name} for name in FRAMEWORKS]
    common = sorted(set.intersection(*seeds))
    if len(common) < 2:
        return None
    summary: dict[str, Any] = {"seeds": common}
    for framework in FRAMEWORKS:
        accuracies = [
            run["test"]["accuracy"]
            for seed in common
            for run in runs
            if (run["framework"], run["seed"]) == (framework, seed)
        ]
        summary[framework] = {
            "test_accuracies": accuracies,
            "mean": statistics.mean(accuracies),
            "deviation": statistics.stdev(accuracies),
            "range": max(accuracies) - min(accuracies),
        }
    ours, theirs = (summary[name] for name in FRAMEWORKS)
    difference = ours["mean"] - theirs["mean"]
    variances = ours["deviation"] ** 2 + theirs["deviation"] ** 2
    return summary | {
        "difference_of_means": difference,
        "standard_error": (variances / len(common)) ** 0.5,
        "within_spread": abs(difference) <= max(ours["range"], theirs["range"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("part", choices=("first-steps", "runs"))
    parser.add_argument("data", help="CIFAR-10, an .npz file")
    parser.add_argument("--out", required=True, help="the JSON file, which may have finished runs")
    parser.add_argument("--device", required=True, help="name of the device, for the results")
    parser.add_argument("--net", default="D", choices=CONFIGS)
    parser.add_argument("--width-divisor", type=int, default=8, help="1: the paper's widths")
    parser.add_argument(
        "--train-images", type=int, default=12000, help="a tenth of them is held out"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=0.05, help="the highest one")
    parser.add_argument("--dropout", type=float, default=0.5, help="runs: the rate after fc6, fc7")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=50, help="first-steps: number of steps")
    args = parser.parse_args()
    check_at_least_one(args, "width_divisor")
    enable_compilation_cache()
    import_torch()
    first = args.part == "first-steps"
    data = load_data(args.data, args.train_images)
    header = make_header(
        "experiments.paper.parity",
        args,
        packages=("jax", "torch"),
        # Runs of other seeds may be added.
        not_settings=("seeds", "dropout" if first else "steps"),
    )
    header |= {"data_digest": data.train.storage}
    if first:
        name = f"first_steps_{args.width_divisor}"
        results = ResultPart(args.out, name, header, key=FIRST_STEPS_KEY)
        first_steps(args, data, results)
    else:
        key = ("framework", "seed")
        results = ResultPart(args.out, "runs", header, key=key, summarize=summarize)
        whole_runs(args, data, results)


if __name__ == "__main__":
    run(main)
