"""Initialisation of a run from another net."""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax

from vgg_jax.configs.train import TrainConfig
from vgg_jax.distributed.sharding import put_global
from vgg_jax.errors import InputError
from vgg_jax.model import PAPER_INIT_LAYERS, VGG, copy_matching_layers
from vgg_jax.training.step import TrainState

logger = logging.getLogger(__name__)

Pretrained = tuple[VGG, dict[str, Any], dict[str, Any]]  # model, variables, metadata


def init_from_pretrained(
    pretrained: Pretrained,
    config: TrainConfig,
    state: TrainState,
    mean_rgb: tuple[float, float, float],
) -> TrainState:
    """Copies layers of a pretrained net into a state.

    All matching layers are copied if both nets have the same stages, else the paper's seven
    (§3.1). Logs the names of the copied, the newly initialised and the unused layers.

    Args:
        pretrained: Model, variables and metadata, as `vgg_jax.load` returns them.
        config: Settings of the run.
        state: A state on the devices.
        mean_rgb: The mean colour that this run subtracts, on the 0-255 scale.

    Returns:
        The state with the copied layers, placed like the old ones.

    Raises:
        InputError: No layer matches.
    """
    model, variables, metadata = pretrained
    same_stages = model.config.stages == config.vgg.stages
    target = {"params": state.params, "batch_stats": state.batch_stats}
    try:
        merged, copied = copy_matching_layers(
            source=variables, target=target, layers=None if same_stages else PAPER_INIT_LAYERS
        )
    except InputError as error:
        raise InputError(f"{config.init_from}: {error}; pass another --init-from") from error
    transfer = describe_transfer(variables["params"], state.params, copied)
    logger.info(f"from {config.init_from}: {transfer}")
    source_mean = metadata["preprocessing"]["mean_rgb"]
    if any(abs(source - target) > 1 for source, target in zip(source_mean, mean_rgb, strict=True)):
        logger.info(
            f"{config.init_from} was trained with mean colour {_format_colour(source_mean)}; "
            f"this run subtracts {_format_colour(mean_rgb)}"
        )

    placed = jax.tree.map(
        lambda new, old: new if new is old else put_global(new, old.sharding),
        merged,
        target,
    )
    return dataclasses.replace(state, **placed)


def describe_transfer(
    source: Mapping[str, Any], target: Mapping[str, Any], copied: tuple[str, ...]
) -> str:
    """Lists the copied, the newly initialised and the unused layers.

    Args:
        source: Parameters of the pretrained net, by layer.
        target: Parameters of the run's net, by layer.
        copied: Names of the copied layers.

    Returns:
        For example "copied: conv1_1; newly initialised: fc8 (kernel (16, 5) in the source,
        (16, 2) here); unused: bn1_1".
    """
    new = [_describe_new_layer(name, source, target) for name in target if name not in copied]
    unused = [name for name in source if name not in copied and name not in target]
    copied_text, new_text, unused_text = (
        ", ".join(names) or "nothing" for names in (copied, new, unused)
    )
    return f"copied: {copied_text}; newly initialised: {new_text}; unused: {unused_text}"


def _describe_new_layer(name: str, source: Mapping[str, Any], target: Mapping[str, Any]) -> str:
    """The name of a layer, with both kernel shapes if they differ."""
    kernels = [layers.get(name, {}).get("kernel") for layers in (source, target)]
    if any(kernel is None for kernel in kernels) or kernels[0].shape == kernels[1].shape:
        return name
    return f"{name} (kernel {kernels[0].shape} in the source, {kernels[1].shape} here)"


def _format_colour(colour: tuple[float, float, float]) -> str:
    return "({})".format(", ".join(f"{value:.2f}" for value in colour))
