"""Which layer of a training step is the first whose values are infinite or NaN."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.configs.models import layer_table
from vgg_jax.metrics import compute_sums
from vgg_jax.model import VGG
from vgg_jax.preprocessing import preprocess
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.training.step import Batch, TrainState


def first_nonfinite(
    state: TrainState, batch: Batch, *, model: VGG, mean_rgb: tuple[float, float, float]
) -> str:
    """Of the step that `train_step` makes of this state and batch: "the output of conv3_1", or, where all outputs and the loss are finite,
    "the gradient of fc7", in the order in which they are computed; "the update" where all gradients are finite, too.

    Compiles and runs the step once more. Micro-batches are computed at once: dropout then draws otherwise.
    """
    names = tuple(
        layer.name
        for layer in layer_table(
            model.config, model.num_classes, model.batch_norm, model.image_size
        )
    )
    run = jax.jit(
        partial(_step, model=model, mean_rgb=mean_rgb, names=names),
        compiler_options=compiler_options(dtype=model.dtype),
    )
    outputs, gradients = jax.device_get(run(state, batch))
    for name in names:
        if not _finite(outputs[name]):
            return f"the output of {name}"
    if not _finite(outputs["loss"]):
        return "the loss"
    for name in (name for name in reversed(names) if name in gradients):
        if not _finite(gradients[name]):
            return f"the gradient of {name}"
    return "the update"


def _step(
    state: TrainState,
    batch: Batch,
    *,
    model: VGG,
    mean_rgb: tuple[float, float, float],
    names: tuple[str, ...],
) -> tuple[dict, dict]:
    def loss(params: Any) -> tuple[jax.Array, dict]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        images = preprocess(batch["image"], mean_rgb, batch["colour_shift"])
        rngs = {"dropout": jax.random.fold_in(state.key, state.step)}
        # Of each layer by itself: of a ReLU, done along with a convolution, no minus infinity comes out.
        layers: Any
        layers, _ = model.apply(
            variables,
            images,
            names,
            train=True,
            mask=batch["mask"],
            rngs=rngs,
            mutable=["batch_stats"],
            method="_forward",
        )
        total = compute_sums(layers["fc8"][:, 0, 0], batch["label"], batch["mask"]).loss
        return total, layers | {"loss": total}

    gradients, outputs = jax.grad(loss, has_aux=True)(state.params)
    return jax.tree.map(_all_finite, outputs), jax.tree.map(_all_finite, gradients)


def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _finite(found: Any) -> bool:
    return bool(np.all(jax.tree.leaves(found)))
