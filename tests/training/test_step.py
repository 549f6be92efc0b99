"""One training step, without PyTorch; tests/integration/test_parity.py compares twenty with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import SHALLOW
from vgg_jax import IMAGENET, VGG, TrainConfig
from vgg_jax.distributed.sharding import make_mesh, shard_batch
from vgg_jax.metrics import finalize
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import init_state, jit_steps

SIZE = 32
CONFIG = TrainConfig(image_size=SIZE, scale=(SIZE,), batch_size=8, learning_rate=1e-3)
MODEL = VGG(SHALLOW, 5, image_size=SIZE, dropout_rate=0.0)
MESH = make_mesh(8)


def make_batch(num_real=8, seed=0):
    """A random batch of 8 examples; those after the first `num_real` are masked."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (8, SIZE, SIZE, 3)).astype(np.uint8),
        "colour_shift": rng.normal(size=(8, 3)).astype(np.float32),
        "label": rng.integers(5, size=8).astype(np.int32),
        "mask": np.arange(8) < num_real,
    }


@pytest.fixture(scope="module")
def steps():
    """The jitted steps of CONFIG: (train_step, eval_step)."""
    return jit_steps(CONFIG, MODEL, IMAGENET.mean_rgb, MESH)


def run_step(train_step, batch, config=CONFIG):
    """Parameters and averages after one step from the initial state."""
    state = init_state(MODEL, make_optimizer(config), 0, MESH)
    state, sums = train_step(state, shard_batch(batch, MESH))
    return jax.tree.map(np.asarray, state.params), finalize(jax.tree.map(float, sums))


def test_subtract_mean_adds_shift():
    image = np.full((1, 2, 2, 3), (10, 20, 30), np.uint8)
    shift = np.float32([[0.5, 0, -0.5]])
    shifted = subtract_mean(image, (1.0, 2.0, 3.0), shift)
    np.testing.assert_allclose(shifted[0, 1, 1], [9.5, 18, 26.5])
    np.testing.assert_allclose(subtract_mean(image, (1.0, 2.0, 3.0))[0, 0, 1], [9, 18, 27])


def test_init_state_depends_on_seed_only():
    first, same, other = (
        init_state(MODEL, make_optimizer(CONFIG), seed, MESH).params["fc6"]["kernel"]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert np.abs(first - other).max() > 0.01


def test_train_step_by_micro_batches_equals_whole(steps):
    batch = make_batch(num_real=7)
    config = dataclasses.replace(CONFIG, microbatch=2)
    micro_step, _ = jit_steps(config, MODEL, IMAGENET.mean_rgb, MESH)
    whole, whole_averages = run_step(steps[0], batch)
    micro, micro_averages = run_step(micro_step, batch, config)
    assert micro_averages == pytest.approx(whole_averages, rel=1e-5)
    assert whole_averages["count"] == 7
    start = init_state(MODEL, make_optimizer(CONFIG), 0, MESH).params
    for name in start:
        moved = np.abs(whole[name]["kernel"] - start[name]["kernel"]).max()
        assert moved > 0
        assert np.abs(micro[name]["kernel"] - whole[name]["kernel"]).max() < 1e-4 * moved


@pytest.mark.slow
def test_train_step_in_bfloat16_keeps_float32_state():
    """Parameters, momentum and running statistics stay float32; the loss is close to float32's."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(CONFIG, dtype=dtype, batch_norm=True)
        model = MODEL.clone(batch_norm=True, dtype=jnp.dtype(dtype))
        state = init_state(model, make_optimizer(config), 0, MESH)
        train_step, _ = jit_steps(config, model, IMAGENET.mean_rgb, MESH)
        for _ in range(3):
            state, sums = train_step(state, shard_batch(make_batch(), MESH))
        losses.append(float(sums.loss))
        leaves = jax.tree.leaves((state.params, state.batch_stats, state.opt_state))
        dtypes = {leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)}
        assert dtypes == {np.dtype("float32")}
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_steps_ignore_masked_examples(steps):
    """Other pixels and labels in masked places change neither training nor evaluation."""
    train_step, eval_step = steps
    batch, other = make_batch(num_real=5), make_batch(num_real=5, seed=1)
    mixed = {name: np.concatenate([batch[name][:5], other[name][5:]]) for name in batch}
    params, averages = run_step(train_step, batch)
    mixed_params, mixed_averages = run_step(train_step, mixed)
    assert averages == mixed_averages
    jax.tree.map(np.testing.assert_array_equal, params, mixed_params)
    variables = {
        "params": init_state(MODEL, make_optimizer(CONFIG), 0, MESH).params,
        "batch_stats": {},
    }
    sums, mixed_sums = (
        jax.tree.map(float, eval_step(variables, shard_batch(examples, MESH)))
        for examples in (batch, mixed)
    )
    assert sums == mixed_sums
    assert sums.count == 5
