"""One step, without PyTorch; `test_parity` compares twenty of them with it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers.tiny import SHALLOW
from vgg_jax import IMAGENET, VGG, TrainConfig, summary
from vgg_jax.distributed.sharding import make_mesh, shard_batch
from vgg_jax.metrics import finalize
from vgg_jax.preprocessing import preprocess
from vgg_jax.training import memory_estimate
from vgg_jax.training.memory_estimate import estimate_step_memory
from vgg_jax.training.optimizer import sgd
from vgg_jax.training.step import init_state, jit_steps

CONFIG = TrainConfig(image_size=32, scale=(32,), batch_size=8, learning_rate=1e-3)
MODEL = VGG(SHALLOW, 5, image_size=32, dropout_rate=0.0)
MESH = make_mesh(8)
RUNTIME = memory_estimate.XLA_RUNTIME_BYTES if jax.default_backend() == "cpu" else 0


def batch(n=8, real=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8),
        "colour_shift": rng.normal(size=(n, 3)).astype(np.float32),
        "label": rng.integers(5, size=n).astype(np.int32),
        "mask": np.arange(n) < real,
    }


def after_a_step(config, model, examples):
    state = init_state(model, sgd(config), 0, MESH)
    step, _ = jit_steps(config, model, IMAGENET.mean_rgb, MESH)
    state, sums = step(state, shard_batch(examples, MESH))
    return jax.tree.map(np.asarray, state.params), finalize(jax.tree.map(float, sums))


def test_images_are_shifted_and_the_mean_is_taken_off():
    image = np.full((1, 2, 2, 3), (10, 20, 30), np.uint8)
    np.testing.assert_allclose(
        preprocess(image, (1.0, 2.0, 3.0), np.float32([[0.5, 0, -0.5]]))[0, 1, 1], [9.5, 18, 26.5]
    )
    np.testing.assert_allclose(preprocess(image, (1.0, 2.0, 3.0))[0, 0, 1], [9, 18, 27])


def test_parameters_are_drawn_from_the_seed():
    one, same, other = (
        init_state(MODEL, sgd(CONFIG), seed, MESH).params["fc6"]["kernel"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01


@pytest.mark.slow
def test_memory_of_a_step():
    """At least the state, gradients of the parameters and the batch's first layer; less with micro-batches."""
    config = dataclasses.replace(
        CONFIG, net="A", fc=(16, 16), image_size=64, scale=(64,), batch_size=128
    )
    whole, parts = (
        estimate_step_memory(each, 5)
        for each in (config, dataclasses.replace(config, microbatch=8))
    )
    parameters = summary.totals(summary.summarize(config.vgg, 5, image_size=64))["params"]
    assert (
        whole["state"] == parts["state"] == pytest.approx(2 * 4 * parameters, abs=100)
    )  # and the rate and a count of steps
    first_layer = 128 * 64 * 64 * 64 * 4
    assert whole["total"] > whole["state"] + 4 * parameters + first_layer
    assert whole["total"] - parts["total"] > first_layer


@pytest.mark.slow
@pytest.mark.skipif(
    jax.default_backend() != "cpu" or not Path("/proc/self/clear_refs").exists(),
    reason="measured on a CPU, as Linux tells it",
)
def test_memory_of_a_step_is_what_it_takes():
    """Of a small step, of which XLA's runtime takes the largest share."""
    command = [
        sys.executable,
        "-m",
        "experiments.benchmarks.check_memory",
        "--net",
        "A",
        "--image-size",
        "32",
        "--batch",
        "8",
    ]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["ratio"] == pytest.approx(1, abs=0.15)


@pytest.mark.usefixtures("small_nets")
def test_memory_of_drawing_the_parameters_where_it_is_more_than_a_steps():
    """One image's step takes little but parameters, momentum and gradients; drawing fc6, nearly all of the parameters here, takes more."""
    config = dataclasses.replace(
        CONFIG, net="shallow", fc=(4096, 16), image_size=128, scale=(128,), batch_size=1
    )
    found = estimate_step_memory(config, 5)
    assert found["total"] - RUNTIME == pytest.approx(
        2 * found["state"], rel=0.1
    )  # the step by itself: 1.5 times


def test_microbatches_make_the_step_of_the_whole_batch():
    whole, whole_averages = after_a_step(CONFIG, MODEL, batch(real=7))
    parts, parts_averages = after_a_step(
        dataclasses.replace(CONFIG, microbatch=2), MODEL, batch(real=7)
    )
    assert parts_averages == pytest.approx(whole_averages, rel=1e-5)
    assert whole_averages["count"] == 7
    start = init_state(MODEL, sgd(CONFIG), 0, MESH).params
    for name in start:
        moved = np.abs(whole[name]["kernel"] - start[name]["kernel"]).max()
        assert moved > 0
        assert np.abs(parts[name]["kernel"] - whole[name]["kernel"]).max() < 1e-4 * moved


def test_bfloat16_computes_and_float32_is_kept():
    """Parameters, momentum and running statistics; the loss is near the one of float32."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        config = dataclasses.replace(CONFIG, dtype=dtype, batch_norm=True)
        model = VGG(
            SHALLOW, 5, batch_norm=True, image_size=32, dropout_rate=0.0, dtype=np.dtype(dtype)
        )
        state = init_state(model, sgd(config), 0, MESH)
        step, _ = jit_steps(config, model, IMAGENET.mean_rgb, MESH)
        for _ in range(3):
            state, sums = step(state, shard_batch(batch(), MESH))
        losses.append(float(sums.loss))
        kept = jax.tree.leaves((state.params, state.batch_stats, state.opt_state))
        assert {x.dtype for x in kept if jax.numpy.issubdtype(x.dtype, jax.numpy.floating)} == {
            np.dtype("float32")
        }
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_padding_counts_nowhere():
    """Neither in a step nor in evaluation: other pixels and labels in masked places, the same result."""
    one, other = batch(real=5), batch(real=5, seed=1)
    mixed = {name: np.concatenate([one[name][:5], other[name][5:]]) for name in one}
    (a, a_averages), (b, b_averages) = (
        after_a_step(CONFIG, MODEL, examples) for examples in (one, mixed)
    )
    assert a_averages == b_averages
    jax.tree.map(np.testing.assert_array_equal, a, b)
    _, eval_step = jit_steps(CONFIG, MODEL, IMAGENET.mean_rgb, MESH)
    variables = {"params": init_state(MODEL, sgd(CONFIG), 0, MESH).params, "batch_stats": {}}
    sums = [
        jax.tree.map(float, eval_step(variables, shard_batch(examples, MESH)))
        for examples in (one, mixed)
    ]
    assert sums[0] == sums[1]
    assert sums[0].count == 5
