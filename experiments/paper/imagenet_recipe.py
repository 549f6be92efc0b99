"""The stages of training (§3.1) and the rows of Tables 3 to 6, as data for `imagenet.py`."""

import argparse
import os
from collections.abc import Collection, Iterable
from typing import NamedTuple

from vgg_jax.configs.models import CONFIGS
from vgg_jax.configs.train import TrainConfig

PAPER_SIZE = 224  # pixels; all sides below belong to crops of this size
JITTER = (256, 512)


class Stage(NamedTuple):
    """One run of training."""

    name: str  # also of its folder
    net: str
    scale: tuple[int, ...]  # S, or S_min and S_max
    init_from: str | None  # the stage whose layers are copied; None: random
    freeze: tuple[str, ...] = ()

    @property
    def is_fine_tuned(self) -> bool:
        """True if all layers come from a stage of the same net."""
        return len(self.scale) == 2 or self.scale[0] > 256


# From A, the layers of `vgg_jax.model.PAPER_INIT_LAYERS` are copied; from the same net, all are.
# A-LRN is no deeper than A, so it starts from random layers.
STAGES = {
    stage.name: stage
    for stage in (
        Stage("A-256", "A", (256,), None),
        Stage("A-LRN-256", "A-LRN", (256,), None),
        Stage("B-256", "B", (256,), "A-256"),
        Stage("C-256", "C", (256,), "A-256"),
        Stage("C-384", "C", (384,), "C-256"),
        Stage("C-jitter", "C", JITTER, "C-384"),
        Stage("D-256", "D", (256,), "A-256"),
        Stage("D-384", "D", (384,), "D-256"),
        Stage("D-jitter", "D", JITTER, "D-384"),
        # The jittered D of the submission, in the first row of Table 6.
        Stage("D-jitter-fc", "D", JITTER, "D-384", freeze=("conv",)),
        Stage("E-256", "E", (256,), "A-256"),
        Stage("E-384", "E", (384,), "E-256"),
        Stage("E-jitter", "E", JITTER, "E-384"),
    )
}


class Part(NamedTuple):
    """One evaluation of the whole validation split. Rows average the posteriors of parts."""

    stage: str
    protocol: str
    test_scale: int  # Q

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.protocol}-{self.test_scale}"


class Row(NamedTuple):
    """A row of a table, and the paper's errors on the validation split, in %."""

    table: int
    members: tuple[tuple[str, tuple[int, ...]], ...]  # stages, each with its test scales
    protocols: tuple[str, ...]
    top1: float
    top5: float

    @property
    def parts(self) -> list[Part]:
        """All test scales of a row have the same weight: its members have equally many."""
        return [
            Part(stage, protocol, scale)
            for protocol in self.protocols
            for stage, scales in self.members
            for scale in scales
        ]

    @property
    def nets(self) -> set[str]:
        return {STAGES[stage].net for stage, _ in self.members}

    @property
    def label(self) -> str:
        members = [f"{stage}, Q = {', '.join(map(str, scales))}" for stage, scales in self.members]
        return f"{'; '.join(members)}: {' & '.join(self.protocols)}"


DENSE, CROPS, BOTH = ("dense",), ("multi-crop",), ("dense", "multi-crop")
NEAR_256, NEAR_384, WIDE = (224, 256, 288), (352, 384, 416), (256, 384, 512)
TWO_NETS = (("D-jitter", WIDE), ("E-jitter", WIDE))
SUBMISSION = (
    ("D-256", NEAR_256),
    ("D-384", NEAR_384),
    ("D-jitter-fc", WIDE),
    ("C-256", NEAR_256),
    ("C-384", NEAR_384),
    ("E-256", NEAR_256),
    ("E-384", NEAR_384),
)

ROWS = (
    # One test scale: S, or the middle of the jitter's range (§4.1).
    Row(3, (("A-256", (256,)),), DENSE, 29.6, 10.4),
    Row(3, (("A-LRN-256", (256,)),), DENSE, 29.7, 10.5),
    Row(3, (("B-256", (256,)),), DENSE, 28.7, 9.9),
    Row(3, (("C-256", (256,)),), DENSE, 28.1, 9.4),
    Row(3, (("C-384", (384,)),), DENSE, 28.1, 9.3),
    Row(3, (("C-jitter", (384,)),), DENSE, 27.3, 8.8),
    Row(3, (("D-256", (256,)),), DENSE, 27.0, 8.8),
    Row(3, (("D-384", (384,)),), DENSE, 26.8, 8.7),
    Row(3, (("D-jitter", (384,)),), DENSE, 25.6, 8.1),
    Row(3, (("E-256", (256,)),), DENSE, 27.3, 9.0),
    Row(3, (("E-384", (384,)),), DENSE, 26.9, 8.7),
    Row(3, (("E-jitter", (384,)),), DENSE, 25.5, 8.0),
    # Several test scales (§4.2).
    Row(4, (("B-256", NEAR_256),), DENSE, 28.2, 9.6),
    Row(4, (("C-256", NEAR_256),), DENSE, 27.7, 9.2),
    Row(4, (("C-384", NEAR_384),), DENSE, 27.8, 9.2),
    Row(4, (("C-jitter", WIDE),), DENSE, 26.3, 8.2),
    Row(4, (("D-256", NEAR_256),), DENSE, 26.6, 8.6),
    Row(4, (("D-384", NEAR_384),), DENSE, 26.5, 8.6),
    Row(4, (("D-jitter", WIDE),), DENSE, 24.8, 7.5),
    Row(4, (("E-256", NEAR_256),), DENSE, 26.9, 8.7),
    Row(4, (("E-384", NEAR_384),), DENSE, 26.7, 8.6),
    Row(4, (("E-jitter", WIDE),), DENSE, 24.8, 7.5),
    # Techniques of evaluation (§4.3).
    Row(5, (("D-jitter", WIDE),), DENSE, 24.8, 7.5),
    Row(5, (("D-jitter", WIDE),), CROPS, 24.6, 7.5),
    Row(5, (("D-jitter", WIDE),), BOTH, 24.4, 7.2),
    Row(5, (("E-jitter", WIDE),), DENSE, 24.8, 7.5),
    Row(5, (("E-jitter", WIDE),), CROPS, 24.6, 7.4),
    Row(5, (("E-jitter", WIDE),), BOTH, 24.4, 7.1),
    # Fusion (§4.4).
    Row(6, SUBMISSION, DENSE, 24.7, 7.5),
    Row(6, TWO_NETS, DENSE, 24.0, 7.1),
    Row(6, TWO_NETS, CROPS, 23.9, 7.2),
    Row(6, TWO_NETS, BOTH, 23.7, 6.8),
)


def select_rows(nets: Collection[str]) -> list[Row]:
    """Selects the rows that need none but these nets."""
    return [row for row in ROWS if row.nets <= set(nets)]


def select_stages(rows: Iterable[Row]) -> list[Stage]:
    """Selects the stages of rows and those that they start from, in the order of training."""
    needed: set[str] = set()
    names = [part.stage for row in rows for part in row.parts]
    while names:
        name = names.pop()
        needed.add(name)
        if (source := STAGES[name].init_from) is not None:
            names.append(source)
    return [stage for stage in STAGES.values() if stage.name in needed]


def scaled(side: int, image_size: int) -> int:
    """Converts a side in the paper, S or Q, to the same ratio to smaller crops."""
    return round(side * image_size / PAPER_SIZE)


def train_config(stage: Stage, args: argparse.Namespace) -> TrainConfig:
    """Builds the configuration of a stage from the flags of `imagenet.py`."""
    rate, drops, epochs = args.learning_rate, 3, args.epochs
    if stage.is_fine_tuned:
        # 1e-3 at S = 384 (§3.1). One drop less ends at the same rate.
        rate, drops, epochs = args.learning_rate / 10, 2, args.fine_tune_epochs
    if len(stage.scale) == 2 and args.jitter_rate is not None:
        rate = args.jitter_rate
    return TrainConfig(
        data=args.data,
        net=stage.net,
        fc=tuple(args.fc),
        # No effect on copied layers.
        initializer=args.initializer,
        init_from=None if stage.init_from is None else os.path.join(args.out, stage.init_from),
        freeze=stage.freeze,
        dtype=args.dtype,
        image_size=args.image_size,
        scale=tuple(scaled(side, args.image_size) for side in stage.scale),
        batch_size=args.batch_size,
        microbatch=args.microbatch,
        learning_rate=rate,
        drops=drops,
        patience=args.patience,
        epochs=epochs,
        seed=args.seed,
    )


NETS = tuple(name for name in CONFIGS if any(stage.net == name for stage in STAGES.values()))
