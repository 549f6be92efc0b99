"""The first value of a step that is not finite has the right name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgg_jax import IMAGENET, TrainConfig
from vgg_jax.distributed.sharding import make_mesh, shard_batch
from vgg_jax.model import build_model
from vgg_jax.training.nan_check import first_nonfinite
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import init_state

pytestmark = pytest.mark.usefixtures("small_nets")

BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8),
    "colour_shift": np.zeros((4, 3), np.float32),
    "label": np.array([0, 1, 0, 1], np.int32),
    "mask": np.ones(4, bool),
}


def make_state(**changes):
    """A model of two classes and its initial state."""
    config = TrainConfig(
        net="shallow",
        fc=(8, 8),
        image_size=16,
        scale=(16,),
        batch_size=4,
        learning_rate=1e-3,
        **changes,
    )
    model = build_model(config, 2)
    return model, init_state(model, make_optimizer(config), 0, make_mesh(4))


def check(model, state):
    batch = shard_batch(BATCH, make_mesh(4))
    return first_nonfinite(state, batch, model=model, mean_rgb=IMAGENET.mean_rgb)


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["conv1_1", "bn1_1", "conv2_1", "fc6", "fc8"])
def test_first_nonfinite_names_output(layer):
    model, state = make_state(batch_norm=True)
    infinite = jax.tree.map(lambda x: x + jnp.inf, state.params[layer])
    params = {**state.params, layer: infinite}
    assert check(model, dataclasses.replace(state, params=params)) == f"the output of {layer}"


@pytest.mark.slow
def test_first_nonfinite_names_gradient_or_update():
    """The outputs after fc6 are 1e22 and those after fc7 are 1, so fc7's gradient overflows."""
    model, state = make_state(dropout_rate=0.0)
    params = dict(state.params)
    params["fc7"] = {"kernel": jnp.full_like(params["fc7"]["kernel"], 1e-20), "bias": jnp.zeros(8)}
    params["fc8"] = {"kernel": params["fc8"]["kernel"] * 1e30, "bias": jnp.zeros(2)}
    params["fc6"] = {"kernel": jnp.zeros_like(params["fc6"]["kernel"]), "bias": jnp.full(8, 1e-12)}
    assert check(model, dataclasses.replace(state, params=params)) == "the update"
    params["fc6"] = {"kernel": params["fc6"]["kernel"], "bias": jnp.full(8, 1e9)}
    assert check(model, dataclasses.replace(state, params=params)) == "the gradient of fc7"
