"""Where a run starts from another net: which of its layers come along."""

import dataclasses
from typing import Any

import jax

from vgg_jax.configs.train import TrainConfig
from vgg_jax.distributed.sharding import put_global
from vgg_jax.errors import InputError
from vgg_jax.model import PAPER_INIT_LAYERS, VGG, copy_matching_layers
from vgg_jax.training.step import TrainState


def init_from_pretrained(
    source: tuple[VGG, dict[str, Any], dict[str, Any]],
    config: TrainConfig,
    state: TrainState,
    mean_rgb: tuple[float, float, float],
) -> TrainState:
    """The state with the layers of what `load` gave: all that fit where the nets are equal, else the paper's seven (§3.1).

    Prints what came, what is new and why, and what was left. Raises InputError where nothing came.
    """
    model, variables, metadata = source
    same = model.config.stages == config.vgg.stages
    layers = tuple(state.params) if same else PAPER_INIT_LAYERS
    params, copied = copy_matching_layers(variables["params"], state.params, layers)
    batch_stats, _ = copy_matching_layers(
        variables.get("batch_stats", {}), state.batch_stats, copied
    )
    if not copied:
        raise InputError(
            f"no layer of {config.init_from} fits {config.net}: expected layers of equal names and shapes; pass another --init-from"
        )
    print(
        describe_transfer(config.init_from, variables["params"], state.params, copied), flush=True
    )
    mean = metadata["preprocessing"]["mean_rgb"]
    if any(abs(theirs - ours) > 1 for theirs, ours in zip(mean, mean_rgb, strict=True)):
        means = [", ".join(f"{value:.2f}" for value in each) for each in (mean, mean_rgb)]
        print(
            f"its images were less the mean ({means[0]}), those of this run are less ({means[1]})",
            flush=True,
        )
    old_ones = {"params": state.params, "batch_stats": state.batch_stats}
    placed = jax.tree.map(
        lambda new, old: new if new is old else put_global(new, old.sharding),
        {"params": params, "batch_stats": batch_stats},
        old_ones,
    )
    return dataclasses.replace(state, **placed)


def describe_transfer(source: str | None, there: Any, here: Any, copied: tuple[str, ...]) -> str:
    """What came, what is new, with the shapes of a kernel that did not fit, and what was left."""
    new = []
    for name in (name for name in here if name not in copied):
        shapes = [
            layers[name]["kernel"].shape
            for layers in (there, here)
            if "kernel" in layers.get(name, {})
        ]
        new.append(
            f"{name} (its kernel is {shapes[0]} there and {shapes[1]} here)"
            if len(set(shapes)) == 2
            else name
        )
    left = [name for name in there if name not in copied and name not in here]
    parts = ("", copied), ("new: ", new), ("left: ", left)
    return f"from {source}: " + "; ".join(
        words + (", ".join(names) or "nothing") for words, names in parts
    )
