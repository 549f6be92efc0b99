"""The updates against loops and PyTorch, and the schedules against lists written by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vgg_jax import TrainConfig
from vgg_jax.training.optimizer import (
    make_optimizer,
    next_epoch_lr,
    set_learning_rate,
    step_learning_rates,
)


@pytest.mark.parametrize("decay_biases", [False, True])
def test_sgd_equals_loop(decay_biases):
    """v = m v + g + decay w; w -= lr v, also after a change of the learning rate."""
    config = TrainConfig(learning_rate=0.1, decay_biases=decay_biases)
    optimizer = make_optimizer(config)
    rng = np.random.default_rng(0)
    # "scale" is a parameter of batch normalisation.
    w = {name: rng.normal(size=n) for name, n in (("kernel", 3), ("bias", 2), ("scale", 4))}
    params = {"fc8": {name: jnp.float32(value) for name, value in w.items()}}
    state = optimizer.init(params)
    velocity = {name: np.zeros_like(value) for name, value in w.items()}
    for lr in (0.1, 0.1, 0.01):
        state = set_learning_rate(state, lr)
        gradient = {name: rng.normal(size=value.shape) for name, value in w.items()}
        updates, state = optimizer.update(
            {"fc8": {name: jnp.float32(g) for name, g in gradient.items()}}, state, params
        )
        params = optax.apply_updates(params, updates)
        for name in w:
            decay = 5e-4 if decay_biases or name == "kernel" else 0.0
            velocity[name] = 0.9 * velocity[name] + gradient[name] + decay * w[name]
            w[name] -= lr * velocity[name]
            np.testing.assert_allclose(params["fc8"][name], w[name], rtol=1e-5)


def random_parameters(seed=0):
    """float64. "scale" is a parameter of batch normalisation."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=n) for name, n in (("kernel", 3), ("bias", 2), ("scale", 4))}


ADAMW = {"optimizer": "adamw", "learning_rate": 0.1, "weight_decay": 0.2}
ADAMW_RATES = (0.1, 0.1, 0.01, 0.01)


def adamw_steps(config):
    """The parameters after each step, on the gradients `random_parameters(1)` and so on."""
    optimizer = make_optimizer(config)
    params = {"fc8": {name: jnp.float32(value) for name, value in random_parameters().items()}}
    state, steps = optimizer.init(params), []
    for number, lr in enumerate(ADAMW_RATES, 1):
        state = set_learning_rate(state, lr)
        gradient = {k: jnp.float32(g) for k, g in random_parameters(number).items()}
        updates, state = optimizer.update({"fc8": gradient}, state, params)
        params = optax.apply_updates(params, updates)
        steps.append(params["fc8"])
    return steps


@pytest.mark.parametrize("decay_biases", [False, True])
def test_adamw_equals_loop(decay_biases):
    """The decay is apart from the moments, of kernels only, and has the learning rate."""
    w = random_parameters()
    first, second = ({name: np.zeros_like(x) for name, x in w.items()} for _ in range(2))
    steps = adamw_steps(TrainConfig(**ADAMW, decay_biases=decay_biases))
    for number, (lr, actual) in enumerate(zip(ADAMW_RATES, steps, strict=True), 1):
        for name, gradient in random_parameters(number).items():
            decay = 0.2 if decay_biases or name == "kernel" else 0.0
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9**number), second[name] / (1 - 0.999**number)
            w[name] -= lr * (mean / (np.sqrt(square) + 1e-8) + decay * w[name])
            np.testing.assert_allclose(actual[name], w[name], rtol=1e-4)


def test_adamw_equals_pytorch():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    w = {name: torch.tensor(x, requires_grad=True) for name, x in random_parameters().items()}
    groups = [
        {"params": [w["kernel"]], "weight_decay": 0.2},
        {"params": [w["bias"], w["scale"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    steps = adamw_steps(TrainConfig(**ADAMW))
    for number, (lr, actual) in enumerate(zip(ADAMW_RATES, steps, strict=True), 1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, gradient in random_parameters(number).items():
            w[name].grad = torch.tensor(gradient)
        optimizer.step()
        for name in w:
            np.testing.assert_allclose(actual[name], w[name].detach().numpy(), rtol=1e-4)


def learning_rates(config, accuracies):
    return [next_epoch_lr(config, accuracies[:n]) for n in range(len(accuracies) + 1)]


def test_next_epoch_lr_plateau():
    config = TrainConfig(learning_rate=1.0, patience=2)
    accuracies = [0.1, 0.2, 0.2, 0.1, 0.3, 0.3, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4]
    expected = [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001, 0.001, None]
    assert learning_rates(config, accuracies) == pytest.approx(expected)


def test_next_epoch_lr_step_and_constant():
    step = TrainConfig(learning_rate=1.0, schedule="step", drop_epochs=(2, 3), epochs=5)
    assert learning_rates(step, [0.0] * 5) == pytest.approx([1, 1, 0.1, 0.01, 0.01, None])
    constant = TrainConfig(learning_rate=1.0, schedule="constant", epochs=3)
    assert learning_rates(constant, [0.0] * 3) == [1, 1, 1, None]


COSINE = {"schedule": "cosine", "learning_rate": 1.0, "epochs": 4}
# Two steps an epoch: two of the warm-up, and half a cosine in the six others.
WARM_COSINE = (0.0, 0.5, 1.0, (2 + 3**0.5) / 4, 0.75, 0.5, 0.25, (2 - 3**0.5) / 4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_cosine_rates(optimizer):
    """The update of a constant gradient is the rate of the step, and a halving halves it."""
    config = TrainConfig(**COSINE, warmup_epochs=1, optimizer=optimizer, weight_decay=0.0)
    if optimizer == "sgd":
        config = dataclasses.replace(config, momentum=0.0)
    transformation = make_optimizer(config, 2)
    params = {"fc8": {"kernel": jnp.ones(1)}}
    state, updates = transformation.init(params), []
    for step in range(8):
        if step == 5:
            state = set_learning_rate(state, 0.5)
        update, state = transformation.update(params, state, params)
        updates.append(-float(update["fc8"]["kernel"][0]))
    expected = [rate / (1 if step < 5 else 2) for step, rate in enumerate(WARM_COSINE)]
    assert updates == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cosine_rates_in_64_bit_mode(dtype):
    """The rates of a float64 net are float64. Those rounded to float32 are wrong by up to 6e-8."""
    config = TrainConfig(**COSINE, warmup_epochs=1, momentum=0.0, weight_decay=0.0)
    with jax.enable_x64(True):
        transformation = make_optimizer(config, 2)
        params = {"fc8": {"kernel": jnp.ones(1, dtype)}}
        state, updates = transformation.init(params), []
        for _ in range(8):
            update, state = transformation.update(params, state, params)
            assert update["fc8"]["kernel"].dtype == dtype
            updates.append(-float(update["fc8"]["kernel"][0]))
    tolerance = 2e-7 if dtype == "float32" else 1e-15
    assert updates == pytest.approx(WARM_COSINE, rel=tolerance, abs=tolerance)


def test_step_learning_rates():
    config = TrainConfig(**COSINE, warmup_epochs=1)
    rates = [rate for epoch in range(1, 5) for rate in step_learning_rates(config, 3.0, epoch, 2)]
    assert rates == pytest.approx([3 * rate for rate in WARM_COSINE], rel=1e-5)
    assert learning_rates(config, [0.0] * 4) == [1, 1, 1, 1, None]
    assert step_learning_rates(TrainConfig(), 1e-3, 5, 2) == [1e-3, 1e-3]


def test_cosine_equals_pytorch():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule, expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12), []
    for _ in range(12):
        expected += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    config = TrainConfig(**COSINE)
    rates = [rate for epoch in range(1, 5) for rate in step_learning_rates(config, 1.0, epoch, 3)]
    assert rates == pytest.approx(expected, rel=1e-5)
    assert rates[6] == pytest.approx((1 + math.cos(math.pi / 2)) / 2)


def test_cosine_needs_the_steps_of_an_epoch():
    with pytest.raises(ValueError, match="steps_per_epoch is None"):
        make_optimizer(TrainConfig(**COSINE))
