"""The training step on two devices, by every layout, beside one device; and what its compiled program exchanges."""

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
from vgg_jax.training.optimizer import sgd
from vgg_jax.training.step import init_state, jit_steps

SIZE, WIDTHS = 32, (1024, 64)  # of fc6's 1024 x 1024 parameters `fsdp` takes notice
CONFIG = TrainConfig(
    image_size=SIZE, scale=(SIZE,), fc=WIDTHS, batch_size=8, learning_rate=1e-3, dropout_rate=0.5
)
LAYOUTS = {
    "data": MeshConfig(data=2),
    "model": MeshConfig(model=2),
    "fsdp": MeshConfig(fsdp=True),
    "bfloat16": MeshConfig(reduce="bfloat16"),
    "fsdp-bfloat16": MeshConfig(fsdp=True, reduce="bfloat16"),
}


def model_of(batch_norm: bool) -> VGG:
    return VGG(
        dataclasses.replace(SHALLOW, fc=WIDTHS),
        5,
        batch_norm,
        dropout_rate=CONFIG.dropout_rate,
        image_size=SIZE,
    )


def batch(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (8, SIZE, SIZE, 3), np.uint8),
        "colour_shift": rng.normal(0, 5, (8, 3)).astype(np.float32),
        "label": rng.integers(0, 5, 8).astype(np.int32),
        "mask": np.arange(8) < 8 - seed % 4,  # up to three are padding
    }


def ten_steps(
    layout: MeshConfig, devices: int, batch_norm: bool, microbatch: int | None
) -> tuple[list, dict, dict, list]:
    """The losses, the gradients of the first step, the variables behind the last, and what is counted with them."""
    config = TrainConfig(**vars(CONFIG) | {"batch_norm": batch_norm, "microbatch": microbatch})
    model, mesh = model_of(batch_norm), make_mesh(microbatch or 8, jax.devices()[:devices], layout)
    step, evaluate = jit_steps(config, model, IMAGENET.mean_rgb, mesh, layout)
    state, losses = init_state(model, sgd(config), 0, mesh, layout), []
    for number in range(10):
        state, sums = step(state, shard_batch(batch(number), mesh))
        losses.append(float(sums.loss))
        if number == 0:
            gradients = jax.tree.map(
                to_host, state.opt_state.inner_state[1][0].trace
            )  # momentum, which began at 0
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    found = [
        jax.tree.map(float, evaluate(variables, shard_batch(batch(number), mesh)))
        for number in (10, 11)
    ]
    return losses, gradients, jax.tree.map(to_host, variables), found


@pytest.mark.parametrize(
    ("batch_norm", "microbatch", "layouts"),
    [
        (True, 4, ("fsdp",)),
        pytest.param(True, None, LAYOUTS, marks=pytest.mark.slow),
        pytest.param(False, 4, LAYOUTS, marks=pytest.mark.slow),
    ],
    ids=["fsdp", "all-batch_norm", "all-microbatch"],
)
def test_ten_steps_of_a_layout_are_those_of_one_device(batch_norm, microbatch, layouts, caplog):
    """With dropout and masked examples, and what `evaluate` counts then is the same. Each compiles its step once."""
    jax.config.update("jax_log_compiles", True)
    try:
        compare(batch_norm, microbatch, layouts)
    finally:
        jax.config.update("jax_log_compiles", False)
    assert sum(
        record.getMessage().startswith("Compiling jit(train_step)") for record in caplog.records
    ) == 1 + len(layouts)


def compare(batch_norm, microbatch, layouts):
    expected, gradients, variables, counts = ten_steps(MeshConfig(), 1, batch_norm, microbatch)
    for name in layouts:
        layout = LAYOUTS[name]
        losses, other_gradients, others, found = ten_steps(layout, 2, batch_norm, microbatch)
        if (
            layout.reduce == "bfloat16"
        ):  # three digits of each gradient come through, and ten steps multiply the rest
            check_close(other_gradients, gradients, 1e-2, name, 0.1)
            assert losses[:2] == pytest.approx(expected[:2], rel=1e-2) and losses[
                1
            ] != pytest.approx(expected[1], rel=1e-6)
            continue
        np.testing.assert_allclose(losses, expected, rtol=1e-5, err_msg=name)
        check_close(other_gradients, gradients, 1e-5, name, 0.1)
        check_close(others, variables, 1e-5, name, CONFIG.learning_rate)
        for one, other in zip(counts, found, strict=True):
            assert (other.top1, other.top5, other.count) == (one.top1, one.top5, one.count)
            assert other.loss == pytest.approx(one.loss, rel=1e-5)


def check_close(tree, expected, rtol, name, least):
    """To so much of each array's largest value, or of `least`: the bias before a batch normalisation has no gradient but rounding."""
    for path, one in jax.tree_util.tree_leaves_with_path(expected):
        other = tree
        for key in path:
            other = other[key.key]
        scale = max(np.abs(one).max(), least)
        np.testing.assert_allclose(
            other, one, rtol=0, atol=rtol * scale, err_msg=f"{name} {jax.tree_util.keystr(path)}"
        )


COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def exchanged(
    layout: MeshConfig, batch_norm: bool = False, microbatch: int | None = None
) -> list[tuple[str, int]]:
    """Each exchange in a compiled step, by its kind and the number of values that it gives."""
    config = TrainConfig(**vars(CONFIG) | {"batch_norm": batch_norm, "microbatch": microbatch})
    model, mesh = model_of(batch_norm), make_mesh(4, jax.devices(), layout)
    step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh, layout)
    state = init_state(model, sgd(config), 0, mesh, layout)
    text = step.lower(state, shard_batch(batch(0), mesh)).compile().as_text()
    found = [match.groups() for match in map(COLLECTIVE.search, text.splitlines()) if match]
    shapes = [(kind, re.findall(r"\w+\[([\d,]*)\]", shape)) for shape, kind in found]
    return [
        (kind, sum(math.prod(map(int, filter(None, each.split(",")))) for each in some))
        for kind, some in shapes
    ]


def parameters(batch_norm: bool = False) -> dict[str, int]:
    shapes = jax.eval_shape(
        lambda key: model_of(batch_norm).init(key, jnp.zeros((1, SIZE, SIZE, 3)))["params"],
        jax.random.key(0),
    )
    return {f"{layer}/{name}": x.size for layer, each in shapes.items() for name, x in each.items()}


SUMS = 4


@pytest.mark.parametrize("microbatch", [None, 4])
def test_data_parallel_exchanges_each_gradient_once(microbatch):
    """One sum of all gradients and the four sums, whatever the number of micro-batches."""
    assert exchanged(MeshConfig(), microbatch=microbatch) == [
        ("all-reduce", sum(parameters().values()) + SUMS)
    ]


def test_batch_norm_exchanges_its_statistics():
    """Forward the count, the mean and the variance of each layer; backward the gradients of the last two, some of them with the others."""
    found = exchanged(MeshConfig(), batch_norm=True)
    assert {kind for kind, _ in found} == {"all-reduce"}
    extra = sum(size for _, size in found) - sum(parameters(True).values()) - SUMS
    assert extra == 2 * 2 * (8 + 16) + 1  # the count of examples is the same for all layers


def test_a_model_axis_exchanges_activations_and_no_parameter_of_fc6():
    """Forward fc7's output (N, 64), backward the gradient of fc6's input (N, 1024): its rows on the way, no kernel."""
    found = exchanged(MeshConfig(model=2))
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert sorted(size for _, size in found) == [8 * 64, 8 * 1024]


def test_a_model_axis_beside_data_exchanges_no_whole_parameter_of_fc6():
    """On four devices: the same rows between two of them, and of each device's half of the gradients one sum over the other two."""
    program = """
import json, jax
jax.config.update("jax_num_cpu_devices", 4)
from tests.distributed.test_scaling import exchanged, parameters
from vgg_jax.distributed.sharding import MeshConfig
print(json.dumps([exchanged(MeshConfig(data=2, model=2)), parameters()]))
"""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root)}
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=root,
    )
    assert ran.returncode == 0, ran.stderr
    found, sizes = json.loads(ran.stdout.splitlines()[-1])
    halves = sum(size / 2 if name in MODEL_PARALLEL_SPECS else size for name, size in sizes.items())
    assert sorted(found) == [
        ["all-reduce", 4 * 64],
        ["all-reduce", 4 * 1024],
        ["all-reduce", halves + SUMS],
    ]


def test_fsdp_puts_fc6_together_once_and_leaves_its_gradient_spread():
    kernel = parameters()["fc6/kernel"]
    found = collections.Counter(exchanged(MeshConfig(fsdp=True)))
    assert found == {
        ("all-gather", kernel): 1,
        ("reduce-scatter", kernel // 2): 1,
        ("all-reduce", sum(parameters().values()) - kernel + SUMS): 1,
    }


@pytest.mark.parametrize(
    "layout", [MeshConfig(fsdp=True), MeshConfig(model=2)], ids=["fsdp", "model"]
)
def test_a_spread_parameter_takes_its_share_of_memory_and_so_does_its_momentum(layout):
    mesh = make_mesh(8, layout=layout)
    state = init_state(model_of(False), sgd(CONFIG), 0, mesh, layout)
    for tree in (state.params, state.opt_state.inner_state[1][0].trace):
        kernel = tree["fc6"]["kernel"]
        assert [shard.data.size for shard in kernel.addressable_shards] == [kernel.size // 2] * 2
        assert tree["conv1_1"]["kernel"].sharding.is_fully_replicated
    alone = init_state(model_of(False), sgd(CONFIG), 0, make_mesh(8, jax.devices()[:1]))
    np.testing.assert_array_equal(
        to_host(state.params["fc6"]["kernel"]), to_host(alone.params["fc6"]["kernel"])
    )


def test_what_cannot_be_laid_out_is_said():
    for given, message in (
        ({"data": 0}, "data=0"),
        ({"model": -1}, "model=-1"),
        ({"reduce": "float16"}, "'float16'.*float32, bfloat16"),
    ):
        with pytest.raises(InputError, match=message):
            MeshConfig(**given)
    with pytest.raises(InputError, match="data=4, model=1, of 4 devices: expected all of the 2"):
        make_mesh(8, layout=MeshConfig(data=4))
    with pytest.raises(InputError, match="on CPUs expected one of the two alone"):
        make_mesh(8, layout=MeshConfig(model=2, reduce="bfloat16"))
    shapes = {"fc6": {"kernel": jax.ShapeDtypeStruct((12, 3), jnp.float32)}}
    with pytest.raises(
        InputError,
        match=r"fc6/kernel is \(12, 3\), and the mesh has model=2: expected a divisor of 3",
    ):
        infer_shardings(shapes, make_mesh(8, layout=MeshConfig(model=2)), MeshConfig(model=2))
