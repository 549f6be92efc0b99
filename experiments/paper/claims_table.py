"""The claims of the paper as data, and the test that decides each one.

A measure is a top-1 error: of one net or of several, at test scales of the paper, with the
posteriors averaged (§3.2, §4). A claim compares two measures over seeds. Scales are the paper's,
for images of 224 pixels; `imagenet_recipe.scaled` gives those of small images.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

SIGNIFICANCE = 0.05  # of the two-sided paired t-test over seeds
MARGIN = 0.01  # largest gain in top-1 error that still counts as none


class Part(NamedTuple):
    """Posteriors of a net."""

    net: str
    protocol: str  # "dense" or "multi-crop"
    scale: int  # the paper's Q


Measure = tuple[Part, ...]


class Claim(NamedTuple):
    """A claim of the paper.

    Attributes:
        text: The claim.
        section: Where the paper has it.
        before: The first measure.
        after: The second one.
        paper: The paper's top-1 errors of both in %, or its words, or None where it has neither.
        kind: "lower": the second error is lower. "not lower": the second error is not lower.
    """

    text: str
    section: str
    before: Measure
    after: Measure
    paper: tuple[float, float] | str | None = None
    kind: str = "lower"


def measure(
    nets: str | Sequence[str], scales: Sequence[int], protocols: Sequence[str] = ("dense",)
) -> Measure:
    """The mean of the posteriors of all nets, protocols and test scales."""
    names = (nets,) if isinstance(nets, str) else nets
    return tuple(itertools.starmap(Part, itertools.product(names, protocols, scales)))


def at_256(net: str) -> Measure:
    """A net trained at S = 256, at the test scale Q = 256 (Table 3)."""
    return measure(net, (256,))


AROUND_256, AROUND_384, JITTERED = (224, 256, 288), (352, 384, 416), (256, 384, 512)
BOTH = ("dense", "multi-crop")

CLAIMS = (
    Claim("More layers help: B (13) over A (11)", "4.1", at_256("A"), at_256("B"), (29.6, 28.7)),
    Claim("1x1 layers help: C over B", "4.1", at_256("B"), at_256("C"), (28.7, 28.1)),
    Claim("3x3 layers beat 1x1 layers: D over C", "4.1", at_256("C"), at_256("D"), (28.1, 27.0)),
    Claim("More layers help: D (16) over B (13)", "4.1", at_256("B"), at_256("D"), (28.7, 27.0)),
    Claim("More layers help: E (19) over A (11)", "4.1", at_256("A"), at_256("E"), (29.6, 27.3)),
    Claim(
        "The error saturates at 19 layers: E does not beat D by a point",
        "4.1",
        at_256("D"),
        at_256("E"),
        (27.0, 27.3),
        "not lower",
    ),
    Claim(
        "Local response normalisation does not help: A-LRN does not beat A by a point",
        "4.1",
        at_256("A"),
        at_256("A-LRN"),
        (29.6, 29.7),
        "not lower",
    ),
    Claim(
        "Two 3x3 layers beat one 5x5: B over B-5x5",
        "4.1",
        at_256("B-5x5"),
        at_256("B"),
        "7 points, on a centre crop",
    ),
    Claim(
        "Net D needs A's weights: from A over a normal start",
        "3.1",
        at_256("D, normal"),
        at_256("D, from A"),
        '"bad initialisation can stall learning"',
    ),
    Claim(
        "Glorot's initialisation trains net D: over a normal start",
        "3.1",
        at_256("D, normal"),
        at_256("D"),
        "a note after submission",
    ),
    Claim(
        "Glorot's initialisation needs no other net: D from A does not beat it by a point",
        "3.1",
        at_256("D"),
        at_256("D, from A"),
        "a note after submission",
        "not lower",
    ),
    Claim(
        "Scale jitter beats S = 256, at one test scale",
        "4.1",
        at_256("D"),
        measure("D, jitter", (384,)),
        (27.0, 25.6),
    ),
    Claim(
        "Scale jitter beats S = 384, at one test scale",
        "4.1",
        measure("D, S=384", (384,)),
        measure("D, jitter", (384,)),
        (26.8, 25.6),
    ),
    Claim(
        "Scale jitter beats S = 256, at three test scales",
        "4.2",
        measure("D", AROUND_256),
        measure("D, jitter", JITTERED),
        (26.6, 24.8),
    ),
    Claim(
        "Scale jitter beats S = 384, at three test scales",
        "4.2",
        measure("D, S=384", AROUND_384),
        measure("D, jitter", JITTERED),
        (26.5, 24.8),
    ),
    Claim(
        "Three test scales help a net with S = 256",
        "4.2",
        at_256("D"),
        measure("D", AROUND_256),
        (27.0, 26.6),
    ),
    Claim(
        "Three test scales help a net with jitter",
        "4.2",
        measure("D, jitter", (384,)),
        measure("D, jitter", JITTERED),
        (25.6, 24.8),
    ),
    Claim(
        "Multi-crop evaluation beats dense evaluation",
        "4.3",
        measure("D, jitter", JITTERED),
        measure("D, jitter", JITTERED, ("multi-crop",)),
        (24.8, 24.6),
    ),
    Claim(
        "Both together beat dense evaluation",
        "4.3",
        measure("D, jitter", JITTERED),
        measure("D, jitter", JITTERED, BOTH),
        (24.8, 24.4),
    ),
    Claim(
        "Both together beat multi-crop evaluation",
        "4.3",
        measure("D, jitter", JITTERED, ("multi-crop",)),
        measure("D, jitter", JITTERED, BOTH),
        (24.6, 24.4),
    ),
    Claim(
        "Fusion of D and E beats D, dense",
        "4.4",
        measure("D, jitter", JITTERED),
        measure(("D, jitter", "E, jitter"), JITTERED),
        (24.8, 24.0),
    ),
    Claim(
        "Fusion of D and E beats D, dense and multi-crop",
        "4.4",
        measure("D, jitter", JITTERED, BOTH),
        measure(("D, jitter", "E, jitter"), JITTERED, BOTH),
        (24.4, 23.7),
    ),
    *(
        Claim(f"With batch normalisation: {text}", "not in the paper", at_256(a), at_256(b))
        for text, a, b in (
            ("B over A", "A, BN", "B, BN"),
            ("C over B", "B, BN", "C, BN"),
            ("D over C", "C, BN", "D, BN"),
            ("E over A", "A, BN", "E, BN"),
            ("E over D", "D, BN", "E, BN"),
            ("B over B-5x5", "B-5x5, BN", "B, BN"),
            ("D with it over D without it", "D", "D, BN"),
        )
    ),
)


class Verdict(NamedTuple):
    """The outcome of a claim.

    Attributes:
        outcome: "holds", "fails" or "undecided".
        gain: Mean of the first error minus the second, over seeds.
        interval: 95 % interval of the gain.
        p: Two-sided p-value of the paired t-test. 1 if all gains are 0.
    """

    outcome: str
    gain: float
    interval: tuple[float, float]
    p: float


def decide(before: Sequence[float], after: Sequence[float], kind: str) -> Verdict:
    """Decides a claim by the paired t-test over seeds.

    A claim "lower" holds if the second error is lower with p < `SIGNIFICANCE`, and fails if it is
    higher. A claim "not lower" holds if the whole interval of the gain lies below `MARGIN`, or if
    the second error is higher, and fails if it is lower. All others are undecided.

    Args:
        before: Top-1 errors of the first measure, one for each seed.
        after: Those of the second one, with the same seeds.
        kind: "lower" or "not lower".

    Returns:
        The verdict. With fewer than three seeds it is undecided.
    """
    gains = np.subtract(before, after)
    gain = float(gains.mean())
    if len(gains) < 3:
        return Verdict("undecided", gain, (float("-inf"), float("inf")), 1.0)
    if np.ptp(gains) == 0:
        p, interval = float(gain == 0), (gain, gain)
    else:
        test = stats.ttest_rel(before, after)
        p, interval = float(test.pvalue), tuple(map(float, test.confidence_interval()))
    is_lower, is_higher = p < SIGNIFICANCE and gain > 0, p < SIGNIFICANCE and gain < 0
    if kind == "lower":
        outcome = "holds" if is_lower else "fails" if is_higher else "undecided"
    else:
        is_none = is_higher or interval[1] < MARGIN
        outcome = "holds" if is_none else "fails" if is_lower else "undecided"
    return Verdict(outcome, gain, (interval[0], interval[1]), p)


def top1_error(posteriors: Sequence[np.ndarray], labels: np.ndarray) -> float:
    """The error of the mean of posteriors, over the images that all of them have.

    Args:
        posteriors: Arrays (N, K). Some may have only the first images.
        labels: The labels, (N,).
    """
    count = min(map(len, posteriors))
    mean = np.mean([each[:count] for each in posteriors], axis=0)
    return float((mean.argmax(1) != labels[:count]).mean())


def claim_row(
    claim: Claim,
    seeds: Sequence[int],
    load: Callable[[Part, int], np.ndarray | None],
    labels: np.ndarray,
) -> dict[str, Any]:
    """A row of the table, over the seeds that have all the posteriors.

    Args:
        claim: The claim.
        seeds: The seeds.
        load: Returns the posteriors of a part and a seed, or None where they are missing.
        labels: Labels of the test images.

    Returns:
        The claim, the paper's errors, ours for each seed, and the verdict.
    """
    used, before, after, count = [], [], [], 0
    for seed in seeds:
        loaded = [load(part, seed) for part in (*claim.before, *claim.after)]
        parts = [part for part in loaded if part is not None]
        if len(parts) < len(loaded):
            continue
        # Both errors are of the same images, those that multi-crop evaluation has.
        count = min(map(len, parts))
        parts = [part[:count] for part in parts]
        used.append(seed)
        before.append(top1_error(parts[: len(claim.before)], labels))
        after.append(top1_error(parts[len(claim.before) :], labels))
    row: dict[str, Any] = {
        "claim": claim.text,
        "section": claim.section,
        "kind": claim.kind,
        "paper": claim.paper,
        "seeds": used,
        "before": [round(error, 5) for error in before],
        "after": [round(error, 5) for error in after],
    }
    if not used:
        return row | {"outcome": "not run"}
    verdict = decide(before, after, claim.kind)
    return row | {
        "images": count,
        "gain": round(verdict.gain, 5),
        "interval": [round(bound, 5) for bound in verdict.interval] if len(used) > 2 else None,
        "p": round(verdict.p, 5) if len(used) > 2 else None,
        "outcome": verdict.outcome,
    }
