"""Writes docs/experiments.md and its plots from experiments/results/*.json.

    pip install -e '.[docs]'
    python -m tools.experiments_page

Run it after a result has changed. The page needs the results of claims (claims.json and
claims_cpu.json), parity, baseline and receptive_field.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from tools.benchmarks_page import OURS, PEER, ROOT, load, save_plots, table
from tools.claims_section import (
    RESULTS,
    claims_section,
    draw_gains,
    draw_starts,
    gains_data,
    starts_data,
)
from tools.page_text import facts, percent

PAGE = ROOT / "docs" / "experiments.md"
FRAMEWORKS = {"jax": "vgg_jax", "torch": "PyTorch"}

INTRODUCTION = """# The paper as experiments

`python -m tools.experiments_page` writes this page from the files in `experiments/results`.

Each program in `experiments/paper` asks one question about the paper. Each one can be stopped and
goes on with the same command. Numbers after ± are standard deviations over seeds.

| question | program | section |
|---|---|---|
| Which claims of the paper hold for small nets? | `claims.py` | [Claims](#claims) |
| Does a net train as in PyTorch, from the same weights? | `parity.py` | [Parity](#parity) |
| Does the usual VGG16 with batch normalisation? | `baseline.py` | [Baseline](#baseline) |
| Are three 3x3 layers better than one 7x7? | `receptive_field.py` | [Field](#receptive-field) |
| What does the whole recipe give on ImageNet? | `imagenet.py` | [ImageNet](#imagenet) |
"""

PARITY = """## Parity

Does net D train in vgg_jax as in PyTorch, from the same weights, on the same crops in the same
order?

### First steps

The largest difference of the losses in the first {steps} steps, and of the loss on the held-out
images after them. There is no dropout, because the two draw other masks. "Control" is the
difference of our own losses from those of a start that is changed by one part in 10 million: how
far rounding grows in these steps. In float32, PyTorch's losses differ from ours by about as much as
the control's, so the bound cannot tell an error from rounding there. "Steps within" counts the
first steps that stay within the bound, of PyTorch and of the control.
"""


BASELINE = """## Baseline

Does the usual VGG16 with batch normalisation learn in vgg_jax as in PyTorch? Ten classes, batches
of 4, images divided by the mean deviation of an image, no augmentation, and a rate that is
divided by 10 once. Both frameworks start from the same weights, and see the same images in the
same order. Dropout differs. Losses are in nats. The limit is Student's 95 % quantile for the
difference of two means over the seeds: one quantity in twenty exceeds it by chance.
"""

RECEPTIVE_FIELD = """## Receptive field

Are stacks of 3x3 layers better than one large layer with the same field (§2.3)? The field is
measured: the side of the square of pixels on which one output depends. "Operations", "forward" and
"with gradients" are ratios: the large layer's multiply-adds or time, divided by those of the stack.
On a CPU the 3x3 layers run as Winograd's, and the large ones as XLA's convolutions, so the times
compare these too.
"""


def parity_section() -> str:
    """The first steps and whole runs of both frameworks."""
    result = load("parity")
    steps = [part for name, part in result.items() if name.startswith("first_steps")]
    parts = [PARITY.format(steps=len(steps[0]["runs"][0]["losses"]["jax"]))]
    for part in steps:
        parts += [f"Net D, {_widths(part['settings'])}:", first_steps_table(part), facts(part)]
    if result.get("runs", {}).get("summary"):
        parts.append(whole_runs(result["runs"]))
    return "\n\n".join(part.strip() for part in parts)


def first_steps_table(part: dict[str, Any]) -> str:
    """The differences of the first steps in each setting."""
    rows = (
        (
            "with" if run["batch_norm"] else "without",
            run["dtype"],
            run["learning_rate"],
            f"{run['largest_difference']:.1e}",
            f"{run['validation_difference']:.1e}",
            f"{run['bound']:g}",
            "yes" if run["within_bound"] else "**no**",
            f"{run['perturbed_difference']:.1e}",
            " / ".join(str(run["steps_within_bound"][name]) for name in ("torch", "perturbed")),
        )
        for run in part["runs"]
    )
    header = (
        "batch normalisation",
        "dtype",
        "rate",
        "in a step",
        "held out",
        "bound",
        "within it",
        "control",
        "steps within",
    )
    return table(header, rows)


def whole_runs(part: dict[str, Any]) -> str:
    """Whole runs of both frameworks, and their test accuracies."""
    settings, summary = part["settings"], part["summary"]
    text = (
        f"### Whole runs\n\nNet {settings['net']} with batch normalisation, widths divided by "
        f"{settings['width_divisor']}, {settings['train_images']:,} images of which a tenth is "
        f"held out, {settings['epochs']} epochs. Dropout differs."
    )
    rows = (
        (name, percent(summary[key]["test_accuracies"]), len(summary["seeds"]))
        for key, name in FRAMEWORKS.items()
    )
    outcome = "lies" if summary["within_spread"] else "does not lie"
    difference = (
        f"The difference of the means, {100 * summary['difference_of_means']:+.2f} points, "
        f"{outcome} within the range of the seeds."
    )
    return "\n\n".join(
        (
            text,
            "![Losses of both frameworks](images/parity.svg)",
            table(("framework", "test accuracy, %", "seeds"), rows),
            difference,
            facts(part),
        )
    )


def parity_data() -> dict[str, Any]:
    """The losses of each epoch by split and framework, one curve for each seed."""
    runs = load("parity").get("runs", {}).get("runs", [])
    return {
        split: loss_curves(runs, lambda epoch, split=split: epoch[split]["loss"])
        for split in ("train", "validation")
    }


def draw_frameworks(data: dict[str, Any], axes: Any) -> None:
    """Draws losses by epoch: ours and PyTorch's, training and held-out images."""
    styles = dict(zip(data, ("-", "--"), strict=True))
    for split, frameworks in data.items():
        for (name, curves), colour in zip(frameworks.items(), (OURS, PEER), strict=True):
            for k, curve in enumerate(curves):
                label = None if k else f"{name}, {split}"
                epochs = range(1, len(curve) + 1)
                axes.plot(epochs, curve, color=colour, ls=styles[split], lw=1.2, label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def baseline_section() -> str:
    """VGG16 with batch normalisation and batches of 4, in both frameworks."""
    parts = [BASELINE]
    for name, part in load("baseline").items():
        settings = part["settings"]
        text = (
            f"### {part['data']}, {part['optimizer'].upper()}, {_widths(settings)}\n\n"
            f"{settings['train_images']:,} images to train on and {settings['valid_images']:,} "
            f"held out, {settings['epochs']} epochs, learning rate {settings['learning_rate']:g}."
        )
        parts += [text, f"![Losses of both frameworks](images/baseline_{name}.svg)"]
        if part["summary"]:
            parts.append(last_epoch(part["summary"][-1]))
        parts.append(facts(part))
    return "\n\n".join(part.strip() for part in parts)


def _widths(settings: dict[str, Any]) -> str:
    divisor = settings["width_divisor"]
    return "full width" if divisor == 1 else f"widths / {divisor}"


def last_epoch(row: dict[str, Any]) -> str:
    """The means over seeds of both frameworks, and whether they differ by more than the noise."""
    rows = []
    for quantity in ("train_loss", "valid_loss", "train_accuracy", "valid_accuracy"):
        cell = row[quantity]
        noise = ("–", "one seed")
        if cell["limit"] is not None:
            noise = (f"{cell['limit']:.4f}", "yes" if cell["within_noise"] else "**no**")
        means = (f"{cell[framework]:.4f}" for framework in FRAMEWORKS)
        rows.append((quantity.replace("_", " "), *means, f"{cell['difference']:+.4f}", *noise))
    header = ("last epoch", *FRAMEWORKS.values(), "difference", "limit", "within it")
    return table(header, rows)


def baseline_data() -> dict[str, Any]:
    """The losses of each epoch, for each data set and optimiser."""
    return {
        f"baseline_{name}": {
            split: loss_curves(part["runs"], lambda epoch, split=split: epoch[f"{split}_loss"])
            for split in ("train", "valid")
        }
        for name, part in load("baseline").items()
    }


def loss_curves(runs: list[dict[str, Any]], loss: Callable[[dict[str, Any]], float]) -> Any:
    """The losses of all epochs by framework, one curve for each seed."""
    return {
        name: [
            [loss(epoch) for epoch in run["epochs"]]
            for run in runs
            if run["framework"] == framework
        ]
        for framework, name in FRAMEWORKS.items()
    }


def receptive_field_section() -> str:
    """Stacks of small kernels against large ones, alone and in nets."""
    result = load("receptive_field")
    parts = [RECEPTIVE_FIELD]
    if "layers" in result:
        parts += [layers_table(result["layers"]), facts(result["layers"])]
    if "nets" in result:
        parts += [nets_with_large_kernels(result["nets"]), facts(result["nets"])]
    else:
        parts.append("Nets with these layers were not trained yet.")
    return "\n\n".join(part.strip() for part in parts)


def layers_table(part: dict[str, Any]) -> str:
    """Parameters, operations, field and time of the layers alone."""
    rows = []
    for run in part["runs"]:
        small, large = (run[name] for name in run["pair"].split(", "))
        ratios = run["ratios"]
        rows.append(
            (
                run["pair"],
                f"{run['side']}x{run['side']}x{run['channels']}",
                f"{small['params']:,} → {large['params']:,}",
                f"{ratios['macs']:.2f}",
                f"{small['receptive_field']['height']} → {large['receptive_field']['height']}",
                f"{ratios['forward_seconds']:.2f}",
                f"{ratios['gradients_seconds']:.2f}",
            )
        )
    header = ("layers", "maps", "parameters", "operations", "field", "forward", "with gradients")
    return table(header, rows)


def nets_with_large_kernels(part: dict[str, Any]) -> str:
    """Accuracies of nets with small and with large kernels."""
    settings, rows = part["settings"], []
    for pair, summary in (part["summary"] or {}).items():
        small, large = pair.split(" - ")
        first = {
            name: next(run for run in part["runs"] if run["net"] == name) for name in (small, large)
        }
        counts = (
            " → ".join(f"{first[name][number]:,}" for name in (large, small))
            for number in ("params", "macs")
        )
        accuracies = " → ".join(percent(summary["accuracies"][name]) for name in (large, small))
        difference = percent(summary["differences"])
        p = f"{summary['p']:.2f}"
        seeds = len(summary["seeds"])
        rows.append((f"{large} → {small}", *counts, accuracies, difference, p, seeds))
    text = (
        "### In nets\n\nD-7x7 is D with one 7x7 layer in place of the three 3x3 layers of stages 3 "
        f"to 5. Widths are divided by {settings['width_divisor']}, all nets have batch "
        f"normalisation, {settings['epochs']} epochs of {settings['train_images']:,} images of "
        "CIFAR-10, of which a tenth is held out. Accuracies are on the 10,000 test images. A "
        "positive difference is in favour of 3x3 layers. The p-value is that of the paired t-test "
        "over seeds: at 0.05 or more, the difference is not shown.\n\n"
    )
    header = ("nets", "parameters", "multiply-adds", "accuracy, %", "difference", "p", "seeds")
    return text + table(header, rows)


IMAGENET = """## ImageNet

What does the whole recipe give on ImageNet? Nobody has run it at full size: the tests run all its
stages in miniature.

```text
python -m experiments.paper.imagenet --plan
python -m experiments.paper.imagenet IMAGENET --out runs/imagenet --dtype bfloat16
```

- `--plan` trains nothing. It prints the stages, and the hours that one GPU, eight GPUs and a TPU
  pod are expected to take. Only the rates of D and E on one GPU were measured.
- A and A-LRN start from random layers. B, C, D and E start from seven layers of A, at S = 256. S
  = 384 continues from S = 256 at a tenth of the rate, and jitter from S = 384 with all layers.
  The submission's D, in Table 6, has jitter for its fully connected layers only.
- Each stage is a run of `vgg-jax train`, in `OUT/STAGE`. The rate drops when the validation
  accuracy stops improving.
- No evaluation is computed twice. `OUT/tables.json` has the rows of Tables 3 to 6, with the
  paper's errors beside ours.
- Ctrl-C and SIGTERM end the program with exit code 75. The same command goes on. `--nets A` and
  later `--nets A D` is a smaller start.
- Several processes train together as `vgg-jax train` does. Run the same command in one process
  then, which evaluates.

Try the program first, with small crops. S and Q keep their ratio to `--image-size`:

```text
python -m experiments.paper.imagenet PHOTOS --out runs/try --nets A D --image-size 32 \\
    --fc 16 16 --batch-size 8 --epochs 2 --fine-tune-epochs 1
```

The paper does not say how long the later stages are, and at which rate jitter starts. Here S =
384 and jitter start at 0.001 and end after two drops, at the last rate of S = 256.
`--fine-tune-epochs` and `--jitter-rate` change this.
"""

PLOTS = {
    **{f"{name}_gains": (partial(gains_data, name), draw_gains, 6.5) for name in RESULTS},
    "claims_starts": (starts_data, draw_starts, 3.2),
    "parity": (parity_data, draw_frameworks, 3.2),
}


def page() -> str:
    """The whole page."""
    sections = (
        INTRODUCTION,
        claims_section(),
        parity_section(),
        baseline_section(),
        receptive_field_section(),
        IMAGENET,
    )
    return "\n\n".join(text.strip() for text in sections if text) + "\n"


def plots() -> dict[str, Any]:
    """The data of all plots by name."""
    return {name: data() for name, (data, _, _) in PLOTS.items()} | baseline_data()


def draw(name: str, data: Any) -> Any:
    """Draws a plot as a matplotlib figure."""
    import matplotlib.pyplot as plt

    _, draw_axes, height = PLOTS.get(name, PLOTS["parity"])
    figure, axes = plt.subplots(figsize=(7.5, height), layout="constrained")
    draw_axes(data, axes)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Writes the page and the plots."""
    save_plots(plots(), draw)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
