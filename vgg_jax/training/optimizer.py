"""SGD with momentum and weight decay, and the schedules of its learning rate (§3.1)."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax import Array

from vgg_jax.configs.train import TrainConfig


def sgd(config: TrainConfig) -> optax.GradientTransformation:
    """v = momentum · v + gradient + weight_decay · w; w -= rate · v. The rate lies in the state: see `set_learning_rate`.

    Caffe, which the paper used, has the rate inside the velocity, the same thing while the rate is constant. When it drops, such a
    velocity runs on at the old rate with a tenth of the correction: on the digits that doubled the training loss of the epoch behind.
    """

    @optax.inject_hyperparams
    def transformation(learning_rate: Array) -> optax.GradientTransformation:
        return optax.chain(
            optax.add_decayed_weights(
                config.weight_decay, mask=functools.partial(_decay_mask, config)
            ),
            optax.sgd(learning_rate, config.momentum),
        )

    return transformation(learning_rate=jnp.float32(_initial_lr(config)))


def _initial_lr(config: TrainConfig) -> float:
    assert config.learning_rate is not None, "fill it in by presets.with_learning_rate"
    return config.learning_rate


def _decay_mask(config: TrainConfig, params: dict) -> dict:
    """Which parameters decay; a frozen one does not, and has no gradient: its velocity stays 0, and it the same to the bit."""
    frozen = config.frozen

    def decays(path: tuple, _: Array) -> bool:
        return (config.decay_biases or path[-1].key == "kernel") and path[0].key not in frozen

    return jax.tree_util.tree_map_with_path(decays, params)


def set_learning_rate(
    opt_state: optax.InjectHyperparamsState, rate: float
) -> optax.InjectHyperparamsState:
    old = opt_state.hyperparams["learning_rate"]
    new = jax.device_put(
        jnp.asarray(rate, old.dtype), old.sharding
    )  # the same kind of array: nothing is compiled again
    return opt_state._replace(hyperparams={**opt_state.hyperparams, "learning_rate": new})


def next_epoch_lr(config: TrainConfig, accuracies: Sequence[float]) -> float | None:
    """The rate of the epoch after those with these validation accuracies, or None where the run ends.

    "plateau": a tenth of it each time that `patience` epochs bring no better accuracy, `drops` times, then the end (§3.1).
    "step": a tenth of it at each of `drop_epochs`. "constant": always the same.
    """
    if len(accuracies) >= config.epochs:
        return None
    drops = 0
    if config.schedule == "step":
        drops = sum(epoch <= len(accuracies) for epoch in config.drop_epochs)
    elif config.schedule == "plateau":
        best, waited = float("-inf"), 0
        for accuracy in accuracies:
            best, waited = max(best, accuracy), 0 if accuracy > best else waited + 1
            if waited == config.patience:
                drops, waited = drops + 1, 0
        if drops > config.drops:
            return None
    return _initial_lr(config) / 10**drops
