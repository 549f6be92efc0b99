"""Statistics of the layers in a training step, against a plain gradient and the activations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import SHALLOW
from vgg_jax import IMAGENET, VGG, TrainConfig
from vgg_jax.distributed import sharding
from vgg_jax.distributed.sharding import MeshConfig, make_mesh, put_global, shard_batch
from vgg_jax.training.layer_statistics import layer_statistics, name_statistics
from vgg_jax.training.memory_estimate import peak_bytes
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import init_state, jit_steps, state_shapes

SIZE, EVERY, NUM_REAL = 32, 2, 6
CONFIG = TrainConfig(image_size=SIZE, scale=(SIZE,), batch_size=8, learning_rate=1e-3)
MODEL = VGG(SHALLOW, 5, image_size=SIZE, dropout_rate=0.0)
DEAD = {"conv1_1": [0, 3], "conv2_1": [5], "fc6": [1, 2, 9], "fc7": [7]}
RELUS = ("conv1_1", "conv2_1", "fc6", "fc7")  # the layers before a ReLU


def make_batch(seed=0):
    """A random batch of 8 examples, of which two are padding."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (8, SIZE, SIZE, 3)).astype(np.uint8),
        "colour_shift": rng.normal(size=(8, 3)).astype(np.float32),
        "label": rng.integers(5, size=8).astype(np.int32),
        "mask": np.arange(8) < NUM_REAL,
    }


def make_state(model, config, mesh, mesh_config):
    """An initial state in which the channels of DEAD never pass their ReLU."""
    state = init_state(model, make_optimizer(config), 0, mesh, mesh_config)
    params = dict(state.params)
    for name, units in DEAD.items():
        layer = name.replace("conv", "bn") if model.batch_norm and "conv" in name else name
        old = params[layer]["bias"]
        bias = np.array(old)
        bias[units] = -1e3
        params[layer] = {**params[layer], "bias": put_global(bias, old.sharding)}
    return dataclasses.replace(state, params=params)


def real_images(batch):
    images = np.float32(batch["image"]) + batch["colour_shift"][:, None, None]
    return (images - np.float32(IMAGENET.mean_rgb).reshape(1, 1, 1, 3))[:NUM_REAL]


def plain_gradients(model, state, batch):
    """Gradients of the mean loss of the real images, without masks and without the step."""
    images, labels = real_images(batch), batch["label"][:NUM_REAL]

    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()

    return jax.jit(jax.grad(loss))(state.params)


def norm(layer):
    return np.sqrt(sum((np.float64(x) ** 2).sum() for x in layer.values()))


def relu_inputs(model, state, batch):
    """What each ReLU reads, by layer, in the mode of the training."""
    variables, images = (
        {"params": state.params, "batch_stats": state.batch_stats},
        real_images(batch),
    )
    if not model.batch_norm:
        return model.apply(variables, images, tuple(RELUS), method="features")
    _, updated = model.apply(
        variables,
        images,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )
    outputs = updated["intermediates"]
    return {name: outputs[name.replace("conv", "bn")]["__call__"][0] for name in RELUS}


CASES = {
    "plain": ({}, {}, 1, MeshConfig()),
    "two_devices": ({}, {}, 2, MeshConfig()),
    "fsdp": ({}, {}, 2, MeshConfig(fsdp=True)),
    "microbatch": ({}, {"microbatch": 2}, 1, MeshConfig()),
    "frozen": ({"frozen": ("conv1_1", "fc7")}, {"freeze": ("conv1_1", "fc7")}, 1, MeshConfig()),
    "batch_norm": ({"batch_norm": True}, {"batch_norm": True}, 1, MeshConfig()),
}


@pytest.mark.parametrize(
    "case",
    [
        name if name == "batch_norm" else pytest.param(name, marks=pytest.mark.slow)
        for name in CASES
    ],
)
def test_statistics_equal_plain_gradients_and_activations(case, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_BYTES", 1000)
    fields, settings, num_devices, mesh_config = CASES[case]
    model, config = MODEL.clone(**fields), dataclasses.replace(CONFIG, **settings)
    mesh = make_mesh(config.microbatch or 8, jax.devices()[:num_devices], mesh_config)
    step, _ = jit_steps(
        config, model, IMAGENET.mean_rgb, mesh, mesh_config, donate=False, measure_every=EVERY
    )
    batch, state = make_batch(), make_state(model, config, mesh, mesh_config)
    next_state, _, statistics = step(state, shard_batch(batch, mesh))
    assert all(x.dtype == np.float32 for x in statistics.values())
    values = name_statistics(model, statistics)

    gradients, frozen = plain_gradients(model, state, batch), settings.get("freeze", ())
    for name in state.params:
        if name in frozen:
            assert f"gradient_norm/{name}" not in values
        else:
            expected = norm(gradients[name])
            assert values[f"gradient_norm/{name}"] == pytest.approx(expected, rel=1e-4), name
            assert expected > 0
        expected = norm(next_state.params[name])
        assert values[f"weight_norm/{name}"] == pytest.approx(expected, rel=1e-5), name

    inputs, num_relus = relu_inputs(model, state, batch), 0
    for name in RELUS:
        if name in frozen:
            assert f"dead_relus/{name}" not in values
            continue
        is_dead = (np.asarray(inputs[name]) <= 0).all((0, 1, 2))
        assert is_dead[DEAD[name]].all() and not is_dead.all()
        assert values[f"dead_relus/{name}"] == pytest.approx(is_dead.mean(), abs=1e-6), name
        num_relus += 1
    assert len(values) == 2 * len(state.params) - len(frozen) + num_relus


@pytest.mark.slow
def test_statistics_come_at_steps_that_measure_and_change_no_bit():
    """Two steps in three have zeros. The parameters equal those without statistics."""
    mesh = make_mesh(8)
    steps = [
        jit_steps(CONFIG, MODEL, IMAGENET.mean_rgb, mesh, measure_every=measure_every)[0]
        for measure_every in (None, 3)
    ]
    states = [init_state(MODEL, make_optimizer(CONFIG), 0, mesh) for _ in steps]
    measured = []
    for number in range(5):
        batch = shard_batch(make_batch(number), mesh)
        states[0], sums = steps[0](states[0], batch)
        states[1], same_sums, statistics = steps[1](states[1], batch)
        assert jax.tree.map(float, sums) == jax.tree.map(float, same_sums)
        measured.append(all((x > 0).all() for x in list(statistics.values())[1:]))
        if not measured[-1]:
            assert not any(np.asarray(x).any() for x in statistics.values())
    assert measured == [True, False, False, True, False]
    jax.tree.map(
        np.testing.assert_array_equal,
        (states[0].params, states[0].opt_state),
        (states[1].params, states[1].opt_state),
    )


@pytest.mark.slow
def test_statistics_hold_no_copy_of_the_gradients():
    """fc6 holds nearly all parameters of this net."""
    model = VGG(dataclasses.replace(SHALLOW, fc=(4096, 16)), 5, image_size=SIZE)
    config = dataclasses.replace(CONFIG, batch_size=2)
    mesh = make_mesh(1, jax.devices()[:1])
    state = state_shapes(model, make_optimizer(config))
    batch = {
        name: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype) for name, x in make_batch().items()
    }
    plain, measured = (
        peak_bytes(
            jit_steps(config, model, IMAGENET.mean_rgb, mesh, measure_every=measure_every)[0]
            .lower(state, batch)
            .compile()
        )
        for measure_every in (None, EVERY)
    )
    gradient_bytes = state.params["fc6"]["kernel"].size * 4
    # jax 0.10.1 on a CPU copies the parameters, and only the gradients' memory was free for that.
    num_copies = 0 if jax.__version_info__ >= (0, 12) else 1
    assert measured - plain < (num_copies + 0.05) * gradient_bytes < plain


def test_dead_relus_are_those_of_the_batch_normalisation():
    """The gradient of the convolution's bias is rounding noise, or exactly 0."""
    model = MODEL.clone(batch_norm=True)
    params = jax.tree.map(
        lambda x: np.ones(x.shape, np.float32), state_shapes(model, make_optimizer(CONFIG)).params
    )
    gradients = {name: dict(layer) for name, layer in params.items()}
    gradients["conv1_1"]["bias"] = np.zeros(8, np.float32)
    gradients["bn1_1"]["bias"] = np.float32([0, 1, 1e-30, 0, 1, 1, 1, 1])
    values = name_statistics(model, layer_statistics(model, gradients, params, jnp.float32(4)))
    dead = {name: value for name, value in values.items() if name.startswith("dead_relus/")}
    assert dead == {f"dead_relus/{name}": 0.25 if name == "conv1_1" else 0 for name in RELUS}
    assert values["gradient_norm/fc8"] == pytest.approx(np.sqrt(16 * 5 + 5) / 4)
