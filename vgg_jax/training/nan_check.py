"""Search for the first layer of a training step whose values are infinite or NaN."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.metrics import compute_sums
from vgg_jax.model import VGG, select_layers
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.training.step import Batch, TrainState


def first_nonfinite(
    state: TrainState,
    batch: Batch,
    *,
    model: VGG,
    mean_rgb: tuple[float, float, float],
    start_after: str | None = None,
) -> str:
    """Names the first non-finite value of one training step, in computation order.

    Compiles and runs the step once more. Micro-batches are computed as one batch, so dropout
    draws other masks than `train_step` did.

    Args:
        state: The state before the step.
        batch: The batch of the step, on the devices.
        model: The net.
        mean_rgb: The mean colour to subtract, on the 0-255 scale.
        start_after: As for `vgg_jax.training.step.train_step`.

    Returns:
        "the output of conv3_1", "the loss" or "the gradient of fc7". "the update" if the
        outputs, the loss and the gradients are finite.
    """
    layers = select_layers(model.layers(), ("fc8",), start_after)
    names = tuple(layer.name for layer in layers)
    step = jax.jit(
        partial(
            _finite_parts, model=model, mean_rgb=mean_rgb, names=names, start_after=start_after
        ),
        compiler_options=compiler_options(dtype=model.dtype),
    )
    outputs, loss, gradients = jax.device_get(step(state, batch))
    for name in names:
        if not outputs[name]:
            return f"the output of {name}"
    if not loss:
        return "the loss"
    for name in reversed(names):
        if name in gradients and not np.all(jax.tree.leaves(gradients[name])):
            return f"the gradient of {name}"
    return "the update"


def _finite_parts(
    state: TrainState,
    batch: Batch,
    *,
    model: VGG,
    mean_rgb: tuple[float, float, float],
    names: tuple[str, ...],
    start_after: str | None,
) -> tuple[dict, jax.Array, dict]:
    """Tells for each output, the loss and each gradient of a step if all values are finite."""
    if start_after is None:
        inputs = subtract_mean(batch["image"], mean_rgb, batch["colour_shift"])
    else:
        inputs = batch["features"]

    def loss_fn(params: Any) -> tuple[jax.Array, dict]:
        # All outputs are requested, so that no layer is fused: a fused ReLU hides minus infinity.
        outputs: Any
        outputs, _ = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            inputs,
            names,
            start_after=start_after,
            train=True,
            mask=batch["mask"],
            rngs={"dropout": jax.random.fold_in(state.key, state.step)},
            mutable=["batch_stats"],
            method="_forward",
        )
        logits = outputs["fc8"][:, 0, 0]
        return compute_sums(logits, batch["label"], batch["mask"]).loss, outputs

    (loss, outputs), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return (
        jax.tree.map(_all_finite, outputs),
        _all_finite(loss),
        jax.tree.map(_all_finite, gradients),
    )


def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()
