"""The update against a loop, and the schedules against lists written by hand."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vgg_jax import TrainConfig
from vgg_jax.training.optimizer import make_optimizer, next_epoch_lr, set_learning_rate


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
