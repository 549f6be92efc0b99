"""The training step on two devices, for every `MeshConfig`: its results, and what it exchanges."""

import collections
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_trees_close, log_compiles
from tests.helpers.tiny import SHALLOW
from vgg_jax import IMAGENET, VGG, InputError
from vgg_jax.configs.train import TrainConfig
from vgg_jax.distributed.sharding import (
    MODEL_PARALLEL_SPECS,
    MeshConfig,
    infer_shardings,
    make_mesh,
    shard_batch,
    to_host,
)
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import init_state, jit_steps, state_shapes

ROOT = Path(__file__).parents[2]
# fc6's kernel has 1024 x 1024 parameters, enough for `fsdp` to shard it.
SIZE, FC = 32, (1024, 64)
CONFIG = TrainConfig(
    image_size=SIZE, scale=(SIZE,), fc=FC, batch_size=8, learning_rate=1e-3, dropout_rate=0.5
)
LAYOUTS = {
    "data": MeshConfig(data=2),
    "model": MeshConfig(model=2),
    "fsdp": MeshConfig(fsdp=True),
    "bfloat16": MeshConfig(reduce="bfloat16"),
    "fsdp-bfloat16": MeshConfig(fsdp=True, reduce="bfloat16"),
}
NUM_METRIC_SUMS = 4


def make_model(batch_norm):
    config = dataclasses.replace(SHALLOW, fc=FC)
    return VGG(config, 5, batch_norm, dropout_rate=CONFIG.dropout_rate, image_size=SIZE)


def make_config(batch_norm, microbatch):
    return TrainConfig(**vars(CONFIG) | {"batch_norm": batch_norm, "microbatch": microbatch})


def make_batch(seed):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (8, SIZE, SIZE, 3), np.uint8),
        "colour_shift": rng.normal(0, 5, (8, 3)).astype(np.float32),
        "label": rng.integers(0, 5, 8).astype(np.int32),
        "mask": np.arange(8) < 8 - seed % 4,  # up to three examples are padding
    }


def ten_steps(mesh_config, num_devices, batch_norm, microbatch):
    """Trains ten steps and evaluates two batches.

    Returns the losses, the gradients of the first step, the last variables, and the metric sums.
    """
    config, model = make_config(batch_norm, microbatch), make_model(batch_norm)
    mesh = make_mesh(microbatch or 8, jax.devices()[:num_devices], mesh_config)
    step, evaluate = jit_steps(config, model, IMAGENET.mean_rgb, mesh, mesh_config)
    state, losses = init_state(model, make_optimizer(config), 0, mesh, mesh_config), []
    for number in range(10):
        state, sums = step(state, shard_batch(make_batch(number), mesh))
        losses.append(float(sums.loss))
        if number == 0:
            # The first momentum is the gradient.
            gradients = jax.tree.map(to_host, state.opt_state.inner_state[1][0].trace)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    evaluations = [
        jax.tree.map(float, evaluate(variables, shard_batch(make_batch(number), mesh)))
        for number in (10, 11)
    ]
    return losses, gradients, jax.tree.map(to_host, variables), evaluations


@pytest.mark.parametrize(
    ("batch_norm", "microbatch", "names"),
    [
        pytest.param(True, 4, ("fsdp",), marks=pytest.mark.slow),
        pytest.param(True, None, LAYOUTS, marks=pytest.mark.slow),
        pytest.param(False, 4, LAYOUTS, marks=pytest.mark.slow),
    ],
    ids=["fsdp", "all-batch_norm", "all-microbatch"],
)
def test_mesh_config_matches_one_device(batch_norm, microbatch, names, caplog):
    """With dropout and masked examples. Each `MeshConfig` compiles its step once."""
    with log_compiles(caplog) as count:
        expected = ten_steps(MeshConfig(), 1, batch_norm, microbatch)
        for name in names:
            outputs = ten_steps(LAYOUTS[name], 2, batch_norm, microbatch)
            if LAYOUTS[name].reduce == "bfloat16":
                assert_near_in_bfloat16(outputs, expected, name)
            else:
                assert_equal_up_to_rounding(outputs, expected, name)
        assert count("train_step") == 1 + len(names)


def assert_equal_up_to_rounding(outputs, expected, name):
    losses, gradients, variables, evaluations = outputs
    expected_losses, expected_gradients, expected_variables, expected_evaluations = expected
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, err_msg=name)
    # The bias before a batch normalisation has no gradient but rounding.
    assert_trees_close(gradients, expected_gradients, 1e-5, floor=0.1, name=name)
    floor = CONFIG.learning_rate
    assert_trees_close(variables, expected_variables, 1e-5, floor=floor, name=name)
    for sums, expected_sums in zip(evaluations, expected_evaluations, strict=True):
        assert sums.loss == pytest.approx(expected_sums.loss, rel=1e-5)
        counts = (sums.top1, sums.top5, sums.count)
        assert counts == (expected_sums.top1, expected_sums.top5, expected_sums.count)


def assert_near_in_bfloat16(outputs, expected, name):
    """Each gradient keeps three digits. Later steps amplify the rounding, so only two count."""
    losses, gradients, *_ = outputs
    expected_losses, expected_gradients, *_ = expected
    assert_trees_close(gradients, expected_gradients, 1e-2, floor=0.1, name=name)
    assert losses[:2] == pytest.approx(expected_losses[:2], rel=1e-2)
    # The sums were really rounded to bfloat16.
    assert losses[1:] != pytest.approx(expected_losses[1:], rel=1e-6)


COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collectives(mesh_config, batch_norm=False, microbatch=None):
    """Lists the collectives of a compiled step: the kind, and the number of values it returns."""
    config, model = make_config(batch_norm, microbatch), make_model(batch_norm)
    mesh = make_mesh(4, jax.devices(), mesh_config)
    step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh, mesh_config)
    # Shapes suffice, so the initialisation is not compiled.
    shapes = state_shapes(model, make_optimizer(config))
    state = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        infer_shardings(shapes, mesh, mesh_config),
    )
    text = step.lower(state, shard_batch(make_batch(0), mesh)).compile().as_text()
    return [
        (match[2], sum(map(num_values, re.findall(r"\w+\[([\d,]*)\]", match[1]))))
        for match in map(COLLECTIVE.search, text.splitlines())
        if match
    ]


def num_values(shape):
    """The number of values in a shape such as "3,3,8", or "" for a scalar."""
    return math.prod(int(size) for size in shape.split(",") if size)


def parameter_sizes(batch_norm=False):
    shapes = jax.eval_shape(
        lambda key: make_model(batch_norm).init(key, jnp.zeros((1, SIZE, SIZE, 3)))["params"],
        jax.random.key(0),
    )
    return {
        f"{layer}/{name}": x.size for layer, params in shapes.items() for name, x in params.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("microbatch", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_data_axis_sums_gradients_once(microbatch):
    """One sum holds all gradients and the metric sums, for any number of micro-batches."""
    assert collectives(MeshConfig(), microbatch=microbatch) == [
        ("all-reduce", sum(parameter_sizes().values()) + NUM_METRIC_SUMS)
    ]


@pytest.mark.slow
def test_batch_norm_exchanges_statistics():
    """Forward: the count, the means and the variances. Backward: gradients of the last two."""
    exchanges = collectives(MeshConfig(), batch_norm=True)
    assert {kind for kind, _ in exchanges} == {"all-reduce"}
    num_gradients = sum(parameter_sizes(batch_norm=True).values())
    num_statistics = sum(size for _, size in exchanges) - num_gradients - NUM_METRIC_SUMS
    # All layers have the same count of examples.
    assert num_statistics == 2 * 2 * (8 + 16) + 1


@pytest.mark.slow
def test_model_axis_exchanges_activations_only():
    """Forward: fc7's output (N, 64). Backward: the gradient of fc6's input (N, 1024)."""
    exchanges = collectives(MeshConfig(model=2))
    assert sorted(exchanges) == [("all-reduce", 8 * 64), ("all-reduce", 8 * 1024)]


@pytest.mark.integration
def test_data_and_model_axes_exchange_no_whole_fc6():
    """On four devices, each sums its half of the sharded gradients with one other device."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.programs.count_collectives"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert process.returncode == 0, process.stderr
    exchanges, sizes = json.loads(process.stdout.splitlines()[-1])
    num_gradients = sum(
        size / 2 if name in MODEL_PARALLEL_SPECS else size for name, size in sizes.items()
    )
    assert sorted(exchanges) == [
        ["all-reduce", 4 * 64],
        ["all-reduce", 4 * 1024],
        ["all-reduce", num_gradients + NUM_METRIC_SUMS],
    ]


@pytest.mark.slow
def test_adamw_matches_one_device():
    """With a cosine schedule and smoothed labels. Adam divides rounding by itself, so few steps."""
    config = dataclasses.replace(
        CONFIG, optimizer="adamw", schedule="cosine", epochs=5, label_smoothing=0.1
    )
    model, losses = make_model(batch_norm=False), {}
    for name, num_devices in (("one", 1), ("data", 2), ("model", 2), ("fsdp", 2)):
        mesh_config = LAYOUTS.get(name, MeshConfig())
        mesh = make_mesh(8, jax.devices()[:num_devices], mesh_config)
        step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh, mesh_config, steps_per_epoch=1)
        state = init_state(model, make_optimizer(config, 1), 0, mesh, mesh_config)
        losses[name] = []
        for number in range(3):
            state, sums = step(state, shard_batch(make_batch(number), mesh))
            losses[name].append(float(sums.loss))
        if name in ("model", "fsdp"):
            second = state.opt_state.inner_state[0].nu["fc6"]["kernel"]
            sizes = [shard.data.size for shard in second.addressable_shards]
            assert sizes == [second.size // 2] * 2
    for name, values in losses.items():
        assert values == pytest.approx(losses["one"], rel=1e-3), name
    assert len({round(value, 2) for value in losses["one"]}) == 3


@pytest.mark.slow
def test_fsdp_gathers_fc6_once():
    """Its gradient stays sharded."""
    kernel_size = parameter_sizes()["fc6/kernel"]
    exchanges = collections.Counter(collectives(MeshConfig(fsdp=True)))
    assert exchanges == {
        ("all-gather", kernel_size): 1,
        ("reduce-scatter", kernel_size // 2): 1,
        ("all-reduce", sum(parameter_sizes().values()) - kernel_size + NUM_METRIC_SUMS): 1,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh_config", [MeshConfig(fsdp=True), MeshConfig(model=2)], ids=["fsdp", "model"]
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_init_state_shards_params_and_momentum(optimizer, mesh_config):
    mesh, model = make_mesh(8, mesh_config=mesh_config), make_model(batch_norm=False)
    config = dataclasses.replace(CONFIG, optimizer=optimizer)
    state = init_state(model, make_optimizer(config), 0, mesh, mesh_config)
    inner = state.opt_state.inner_state
    moments = (inner[0].mu, inner[0].nu) if optimizer == "adamw" else (inner[1][0].trace,)
    for tree in (state.params, *moments):
        kernel = tree["fc6"]["kernel"]
        assert [shard.data.size for shard in kernel.addressable_shards] == [kernel.size // 2] * 2
        assert tree["conv1_1"]["kernel"].sharding.is_fully_replicated
    one_device = init_state(model, make_optimizer(CONFIG), 0, make_mesh(8, jax.devices()[:1]))
    np.testing.assert_array_equal(
        to_host(state.params["fc6"]["kernel"]), to_host(one_device.params["fc6"]["kernel"])
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": 0}, "data=0"),
        ({"model": -1}, "model=-1"),
        ({"reduce": "float16"}, "'float16'.*float32, bfloat16"),
    ],
)
def test_mesh_config_rejects(fields, message):
    with pytest.raises(InputError, match=message):
        MeshConfig(**fields)


@pytest.mark.parametrize(
    ("mesh_config", "message"),
    [
        (MeshConfig(data=4), "data=4, model=1, of 4 devices: expected all of the 2"),
        (MeshConfig(model=2, reduce="bfloat16"), "on CPUs expected only one of them"),
    ],
)
def test_make_mesh_rejects_mesh_config(mesh_config, message):
    with pytest.raises(InputError, match=message):
        make_mesh(8, mesh_config=mesh_config)


def test_infer_shardings_rejects_indivisible_layer():
    mesh_config = MeshConfig(model=2)
    shapes = {"fc6": {"kernel": jax.ShapeDtypeStruct((12, 3), jnp.float32)}}
    message = r"fc6/kernel is \(12, 3\), and the mesh has model=2: expected a divisor of 3"
    with pytest.raises(InputError, match=message):
        infer_shardings(shapes, make_mesh(8, mesh_config=mesh_config), mesh_config)
