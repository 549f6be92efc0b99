"""Initialisation of a run from another net."""

import dataclasses
import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from vgg_jax.configs.train import TrainConfig
from vgg_jax.distributed.sharding import put_global
from vgg_jax.errors import InputError
from vgg_jax.model import PAPER_INIT_LAYERS, VGG, build_model, copy_matching_layers
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.training.step import TrainState, init_variables

logger = logging.getLogger(__name__)

Colour = tuple[float, float, float]


class Pretrained(NamedTuple):
    """A net whose layers start a run, as `vgg_jax.load` returns it."""

    model: VGG
    variables: dict[str, Any]
    metadata: dict[str, Any]


def has_new_head(pretrained: Pretrained, config: TrainConfig, num_classes: int) -> bool:
    """Tells if a run's fc6 is new, and reads the activations of pretrained convolutions.

    Args:
        pretrained: The net that the run starts from.
        config: Settings of the run.
        num_classes: Number of classes of its data.

    Returns:
        True if all convolutions are copied and fc6 is not, and both nets compute the same
        activations from them: their normalisations are the same.

    Raises:
        InputError: No layer matches.
    """
    model = build_model(config, num_classes)
    target = jax.eval_shape(partial(init_variables, model), jax.random.key(0))
    _, copied = _copy_layers(pretrained, config, target)
    trunk, source_trunk = (
        [(layer.name, layer.type) for layer in net.layers() if layer.type in ("conv", "bn", "lrn")]
        for net in (model, pretrained.model)
    )
    is_copied = {name for name, kind in trunk if kind == "conv"} <= set(copied)
    is_same = trunk == source_trunk and model.pool == pretrained.model.pool
    return is_copied and is_same and "fc6" not in copied


def measure_activations(
    pretrained: Pretrained, batch: Mapping[str, np.ndarray], mean_rgb: Colour
) -> float | None:
    """Measures the activations after the last pooling, which fc6 reads.

    Args:
        pretrained: The net.
        batch: Training images, as `vgg_jax.data.train_batches` makes them.
        mean_rgb: The mean colour to subtract, on the 0-255 scale.

    Returns:
        Their root mean square over the images in the mask. None if it is 0 or not finite.
    """
    model = pretrained.model
    layer = f"pool{len(model.config.stages)}"

    @partial(jax.jit, compiler_options=compiler_options())
    def mean_squares(variables: dict[str, Any], images: np.ndarray) -> jax.Array:
        features: Any = model.apply(variables, images, (layer,), method="features")
        return (features[layer] ** 2).mean((1, 2, 3))

    images = subtract_mean(batch["image"], mean_rgb, batch["colour_shift"])
    squares = np.asarray(mean_squares(pretrained.variables, images), np.float64)
    rms = float(np.sqrt(squares[batch["mask"]].mean()))
    return rms if 0 < rms < math.inf else None


def init_from_pretrained(
    pretrained: Pretrained,
    config: TrainConfig,
    state: TrainState,
    mean_rgb: Colour,
    activation_rms: float | None = None,
) -> TrainState:
    """Copies layers of a pretrained net into a state.

    All matching layers are copied if both nets have the same stages, else the paper's seven
    (§3.1). Logs the names of the copied, the newly initialised and the unused layers.

    A new fc6 on pretrained activations is divided by their root mean square. Its outputs then have
    the scale that the initialiser is made for
    (docs/performance.md#new-head-on-pretrained-convolutions).

    Args:
        pretrained: The net.
        config: Settings of the run, with a learning rate.
        state: A state on the devices.
        mean_rgb: The mean colour that this run subtracts, on the 0-255 scale.
        activation_rms: Root mean square of the activations that a new fc6 reads. None leaves fc6
            as it is.

    Returns:
        The state with the copied layers, placed like the old ones.

    Raises:
        InputError: No layer matches.
    """
    target = {"params": state.params, "batch_stats": state.batch_stats}
    merged, copied = _copy_layers(pretrained, config, target)
    transfer = describe_transfer(pretrained.variables["params"], state.params, copied)
    logger.info(f"from {config.init_from}: {transfer}")
    source_mean = pretrained.metadata["preprocessing"]["mean_rgb"]
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
    if activation_rms is not None:
        logger.info(
            f"new head: fc6 reads activations of root mean square {activation_rms:.3g}; its "
            f"initial kernel is divided by it, and the learning rate is {config.learning_rate:g}"
        )
        fc6 = placed["params"]["fc6"]
        fc6 = {**fc6, "kernel": fc6["kernel"] / activation_rms}
        placed["params"] = {**placed["params"], "fc6": fc6}
    return dataclasses.replace(state, **placed)


def _copy_layers(
    pretrained: Pretrained, config: TrainConfig, target: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Copies layers into the variables of the run's net. Returns these and the copied names."""
    same_stages = pretrained.model.config.stages == config.vgg.stages
    try:
        return copy_matching_layers(
            source=pretrained.variables,
            target=target,
            layers=None if same_stages else PAPER_INIT_LAYERS,
        )
    except InputError as error:
        raise InputError(f"{config.init_from}: {error}; pass another --init-from") from error


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


def _format_colour(colour: Colour) -> str:
    return "({})".format(", ".join(f"{value:.2f}" for value in colour))
