"""The claims of the paper on docs/experiments.md: their tables, their plots, and all nets."""

import math
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

from tools.benchmarks_page import OURS, PEER, load, table
from tools.page_text import facts, percent

COLOURS = {"holds": "#2ca02c", "fails": OURS, "undecided": PEER}
GAIN_LIMIT = 5  # points that the plot of the gains shows on each side; larger means are numbers
STALLED = 0.01  # nats below the loss of guessing, within which a run has learned nothing

CLAIMS = """## Claims

Which claims of the paper hold for small nets on CIFAR-10? All nets were trained with half of their
widths on a GPU, most of them with three seeds. The claims that have fewer there were tested again
with an eighth of the widths, on a CPU. That needed {second} of the {number} nets.

{overview}

The numbers are gains in points of top-1 error: the first error minus the second. The nets are made
small by one rule:

- All widths of Table 1, and those of fc6 and fc7, are divided by one number.
- Images have 64 pixels instead of 224, enlarged from CIFAR-10's 32. All scales have the paper's
  ratio to them: S = 256 is 73, and 384 is 110.
- The learning rate falls along a cosine. The paper trains for 74 epochs, and these nets for far
  fewer.
- Dense evaluation sees the centre of an image, with sides that 32 divides. At Q = 256 that is one
  window, where the paper has four, and at Q = 512 nine, where it has 100.
- Nets with scale jitter start from random weights. The paper starts them from those of S = 384.
- The mean colour is that of the training images. All other settings are the paper's. Kernels
  start from Glorot's distribution where nothing else is said.

Errors are those of dense evaluation on all test images. Claims about crops use only the first test
images. Both nets of a claim have the same seed: the same order of images and the same crops. A row
has the seeds that all its nets have.

A claim holds if the gain is positive and the paired t-test over seeds has p < 0.05. It fails if
the gain is negative with p < 0.05. The claim that something does not help holds if the whole 95 %
interval of its gain is below 1 point. All others are undecided: three seeds decide only what is
large beside their spread, and two decide nothing. The p-values are not corrected for the number of
tests, of which one in twenty is expected to have p < 0.05 by chance. The nets are trained briefly,
so an outcome here says little about long training.
"""

PART = """### {title}

Here {holds} of {number} claims hold, {fails} fail, and {undecided} are undecided{few}.{not_run}
All widths are divided by {width_divisor}. Each net trains for {epochs} epochs on
{train_images:,} images, in batches of {batch_size}, with a first learning rate of {learning_rate}.
Claims about crops are tested on {crop_images:,} images, and all others on {test_images:,}.
"""

GAINS_TEXT = """![Gains with their 95 % intervals](images/{name}_gains.svg)

Each dot is a seed, and each line the 95 % interval of three. Gains beyond the frame have their mean
as a number. Claims that hold are green, those that fail red, and the others grey.
"""

NOTES_HALF = """- More layers than those of B do not help here, without batch normalisation: D is
  worse than B, and E worse than D and A.
- The two seeds of B-5x5 that learned are worse than B by 7 and 11 points, as in the paper.
- With each seed that was run, the nets with S = 384 or jitter have higher errors than those with
  S = 256. The reason is open. A crop at S = 384 sees a third of an image, and an object of CIFAR-10
  fills its image, where photos of ImageNet have space around the object. The nets with jitter have
  low training accuracies, so {epochs} epochs may be too few, and they start from random weights.
  The claims about crops and fusion use these nets.
- "D from A" trains for {epochs} epochs after those of A.
"""

NOTES_EIGHTH = """- As with half of the widths, the nets with jitter have higher errors than
  those with S = 256, now with three seeds.
- Batch normalisation lowers the error of D by 12 points here. With it, E is worse than D and A with
  each seed.
- Several test scales help, with a fixed training scale and with jitter. Fusion of D and E helps if
  dense and multi-crop posteriors are averaged. All nets here have errors of 30 to 67 %, so they
  have learned far less than the paper's.
"""

# The results, by their file: their title, and what stands out in them.
RESULTS = {
    "claims": ("Half of the widths, on a GPU", NOTES_HALF),
    "claims_cpu": ("An eighth of the widths, on a CPU", NOTES_EIGHTH),
}

STARTS_TEXT = """### Net D by its start

![Training losses of net D, by its start](images/claims_starts.svg)

These nets have half of the widths, and were trained on the GPU.
"Normal" is the paper's random initialisation, a normal distribution with a standard deviation of
0.01 at full width. In a small net it is larger, so that each layer changes the size of its signal
as in the full net. The dotted line is the loss of guessing, ln 10. "From A" copies the first
convolutions and the fully connected layers of net A, which was trained from the same
distribution.
"""


def claims_section() -> str:
    """All results about the claims, and the start of net D."""
    first, second = (load(name)["nets"] for name in RESULTS)
    trained = sum(map(bool, second.values()))
    text = CLAIMS.format(overview=overview_table(), number=len(first), second=trained)
    parts = [text, *map(claims_part, RESULTS), STARTS_TEXT]
    return "\n\n".join(part.strip() for part in parts)


def overview_table() -> str:
    """The gain and the outcome of each claim in each result."""
    first, second = ({row["claim"]: row for row in load(name)["claims"]} for name in RESULTS)
    rows = (
        (claim, row["section"], _outcome(row), _outcome(second[claim]))
        for claim, row in first.items()
    )
    return table(("claim", "§", *(title for title, _ in RESULTS.values())), rows)


def _outcome(row: dict[str, Any]) -> str:
    seeds = len(row["seeds"])
    if not seeds:
        return "not run"
    few = f" ({seeds} seed{'s' * (seeds > 1)})" if seeds < 3 else ""
    return f"{100 * row['gain']:+.1f}, {row['outcome']}{few}"


def claims_part(name: str) -> str:
    """One result: its table of claims, its plot, and its nets."""
    result = load(name)
    title, notes = RESULTS[name]
    rows = [row for row in result["claims"] if row["seeds"]]
    few = sum(len(row["seeds"]) < 3 for row in rows)
    not_run = len(result["claims"]) - len(rows)
    outcomes = Counter(row["outcome"] for row in rows)
    text = PART.format(
        title=title,
        number=len(result["claims"]),
        holds=outcomes["holds"],
        fails=outcomes["fails"],
        undecided=outcomes["undecided"],
        few=f", of which {few} have fewer than three seeds" if few else "",
        not_run=f" Claims that were not run: {not_run}." if not_run else "",
        **result["settings"],
    )
    cells = (
        (
            row["claim"],
            row["section"],
            _paper(row["paper"]),
            f"{percent(row['before'])} → {percent(row['after'])}",
            f"{100 * row['gain']:+.1f}",
            _p_value(row),
            len(row["seeds"]),
            f"**{row['outcome']}**",
        )
        for row in rows
    )
    header = ("claim", "§", "paper, %", "ours, %", "gain", "p", "seeds", "outcome")
    parts = [text, table(header, cells)]
    nets = result["nets"]
    untrained = [f"“{net}”" for net, runs in nets.items() if not runs]
    fewer = [f"“{net}” ({len(runs)})" for net, runs in nets.items() if 0 < len(runs) < 3]
    for text, listed in (
        ("Diverged", count_runs(nets, lambda run: run["diverged"])),
        ("Learned nothing, with a loss of ln 10", count_runs(nets, has_stalled)),
        ("Nets with fewer than three finished seeds", ", ".join(fewer)),
        ("Nets that were not trained", ", ".join(untrained)),
    ):
        if listed:
            parts.append(f"{text}: {listed}.")
    parts += [
        GAINS_TEXT.format(name=name),
        notes.format(**result["settings"]),
        facts(result),
        nets_table(result),
    ]
    return "\n\n".join(part.strip() for part in parts if part)


def count_runs(nets: dict[str, Any], predicate: Callable[[dict[str, Any]], bool]) -> str:
    """The nets that have runs of a kind, and how many: “D, normal” (3 of 3)."""
    counts = {name: sum(map(predicate, seeds.values())) for name, seeds in nets.items()}
    return ", ".join(f"“{name}” ({n} of {len(nets[name])})" for name, n in counts.items() if n)


def has_stalled(run: dict[str, Any]) -> bool:
    """Tells if the last loss of a run is that of guessing one of ten classes."""
    return not run["diverged"] and run["epochs"][-1]["train"]["loss"] > math.log(10) - STALLED


def _p_value(row: dict[str, Any]) -> str:
    """The p-value of a gain. A claim that something does not help is decided by the interval."""
    if row["p"] is None or row["kind"] == "not lower":
        return "–"
    return "< 0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"


def _paper(paper: Any) -> str:
    if isinstance(paper, list):
        return " → ".join(map(str, paper))
    return paper or "–"


def nets_table(result: dict[str, Any]) -> str:
    """The last epoch of all nets."""
    rows = []
    for name, seeds in result["nets"].items():
        last = [run["epochs"][-1] for run in seeds.values() if not run["diverged"]]
        if last:
            accuracies = (
                percent([epoch[split]["accuracy"] for epoch in last])
                for split in ("train", "validation")
            )
            loss = statistics.mean(epoch["train"]["loss"] for epoch in last)
            rows.append((name, f"{loss:.3f}", *accuracies, len(last)))
    header = ("net", "training loss", "training accuracy, %", "held-out accuracy, %", "seeds")
    text = "The last epoch of each net. Training has dropout and random crops.\n\n"
    return text + table(header, rows)


STARTS = {
    "D, normal": "normal, 0.01",
    "D, from A": "from A",
    "D": "Glorot",
    "D, BN": "Glorot, batch normalisation",
}


def starts_data() -> dict[str, Any]:
    """The losses of net D by its start, one curve for each seed."""
    nets = load("claims")["nets"]
    return {
        label: [run["losses"] for run in nets[name].values() if run["losses"]]
        for name, label in STARTS.items()
    }


def draw_starts(data: dict[str, Any], axes: Any) -> None:
    """Draws the losses of net D by its start."""
    for number, (label, runs) in enumerate(data.items()):
        for k, losses in enumerate(runs):
            steps, values = zip(*losses, strict=True)
            axes.plot(steps, values, color=f"C{number}", lw=1, label=None if k else label)
    axes.axhline(math.log(10), color="black", lw=1, ls=":")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def gains_data(name: str) -> list[Any]:
    """The claims of a result: the gain of each seed in points, their interval, and the outcome."""
    return [
        [
            row["claim"],
            [100 * (b - a) for b, a in zip(row["before"], row["after"], strict=True)],
            row.get("interval") and [100 * bound for bound in row["interval"]],
            row["outcome"],
        ]
        for row in load(name)["claims"]
        if row["seeds"]
    ]


def draw_gains(data: list[Any], axes: Any) -> None:
    """Draws the gains of all claims with their intervals."""
    for number, (_, gains, interval, outcome) in enumerate(reversed(data)):
        colour, mean = COLOURS[outcome], statistics.mean(gains)
        if interval:
            axes.plot(interval, (number, number), color=colour, lw=2)
        axes.plot(gains, [number] * len(gains), "o", color=colour, ms=3)
        if abs(mean) > GAIN_LIMIT:
            axes.annotate(
                f"{mean:+.0f}",
                (GAIN_LIMIT if mean > 0 else -GAIN_LIMIT, number),
                ha="right" if mean > 0 else "left",
                va="bottom",
                color=colour,
                size=8,
            )
    axes.set_yticks(range(len(data)), [row[0] for row in reversed(data)], size=8)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_xlim(-GAIN_LIMIT, GAIN_LIMIT)
    axes.set_xlabel("gain in points of top-1 error")
