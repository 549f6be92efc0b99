"""The optimizers, and the schedules of their learning rate. The paper has SGD (§3.1)."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from vgg_jax.configs.train import TrainConfig


def make_optimizer(
    config: TrainConfig, steps_per_epoch: int | None = None
) -> optax.GradientTransformation:
    """Makes the optimizer of a run, SGD or AdamW.

    SGD is v = momentum · v + gradient + weight_decay · w; w -= learning_rate · v (§3.1).
    The paper used Caffe, which multiplies the learning rate into the velocity. Both are equal
    while the learning rate is constant. After a drop, Caffe's velocity keeps the old learning
    rate, but new gradients have the new one (docs/performance.md#velocity-and-learning-rate).

    AdamW has Optax's and PyTorch's default β₁, β₂ and ε.

    Args:
        config: Settings of the run, with a learning rate.
        steps_per_epoch: Steps of an epoch. Only the schedule "cosine" needs them.

    Returns:
        The optimizer. Its state holds the learning rate, see `set_learning_rate`. With "cosine",
        this is the highest one, and the state also counts the steps.
    """
    mask = functools.partial(_decay_mask, config)
    factor = _cosine_factor(config, steps_per_epoch) if config.schedule == "cosine" else None

    @optax.inject_hyperparams
    def transformation(learning_rate: Array) -> optax.GradientTransformation:
        rate: Any = learning_rate if factor is None else lambda step: learning_rate * factor(step)
        if config.optimizer == "adamw":
            return optax.adamw(rate, weight_decay=config.weight_decay, mask=mask)
        return optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=mask),
            optax.sgd(rate, config.momentum),
        )

    return transformation(learning_rate=jnp.float32(_initial_lr(config)))


def _cosine_factor(config: TrainConfig, steps_per_epoch: int | None) -> optax.Schedule:
    """The share of the highest learning rate that each step has, counted from 0."""
    if steps_per_epoch is None:
        raise ValueError("steps_per_epoch is None: the schedule 'cosine' needs it")
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=1.0,
        warmup_steps=config.warmup_epochs * steps_per_epoch,
        decay_steps=config.epochs * steps_per_epoch,
    )
    # `float` is float64 in 64-bit mode: rates in float32 would be wrong by up to 6e-8.
    return lambda step: schedule(jnp.asarray(step, float))


def _initial_lr(config: TrainConfig) -> float:
    if config.learning_rate is None:
        raise ValueError("learning_rate is None: fill it in by presets.resolve_learning_rate")
    return config.learning_rate


def _decay_mask(config: TrainConfig, params: dict) -> dict:
    """True for each parameter that decays.

    A frozen parameter has neither gradient nor decay, so its velocity, or its moments, stay 0 and
    it never moves.
    """
    frozen = config.frozen

    def decays(path: tuple, _: Array) -> bool:
        return (config.decay_biases or path[-1].key == "kernel") and path[0].key not in frozen

    return jax.tree_util.tree_map_with_path(decays, params)


def set_learning_rate(
    opt_state: optax.InjectHyperparamsState, lr: float
) -> optax.InjectHyperparamsState:
    """Replaces the learning rate in the optimizer's state.

    Args:
        opt_state: State of the optimizer that `make_optimizer` returns.
        lr: The new learning rate.

    Returns:
        The state with the new learning rate.
    """
    old = opt_state.hyperparams["learning_rate"]
    # The same dtype and sharding, so that no step is compiled again.
    new = jax.device_put(jnp.asarray(lr, old.dtype), old.sharding)
    return opt_state._replace(hyperparams={**opt_state.hyperparams, "learning_rate": new})


def next_epoch_lr(config: TrainConfig, accuracies: Sequence[float]) -> float | None:
    """The learning rate of the next epoch, or None at the end of the run.

    "plateau" divides it by 10 each time that `patience` epochs in a row bring no better accuracy,
    `drops` times; the next plateau ends the run (§3.1). "step" divides it by 10 after each epoch of
    `drop_epochs`. "constant" keeps it. "cosine" has its highest learning rate here, which
    `make_optimizer` lowers in each step (`step_learning_rates`).

    Args:
        config: Settings of the run, with a learning rate.
        accuracies: Validation accuracies of the finished epochs.

    Returns:
        The learning rate before any halving after a divergence. None at the end of the run.
    """
    if len(accuracies) >= config.epochs:
        return None
    num_drops = 0
    if config.schedule == "step":
        num_drops = sum(epoch <= len(accuracies) for epoch in config.drop_epochs)
    elif config.schedule == "plateau":
        num_drops = _count_plateaus(accuracies, config.patience)
        if num_drops > config.drops:
            return None
    return _initial_lr(config) / 10**num_drops


def step_learning_rates(
    config: TrainConfig, lr: float, epoch: int, steps_per_epoch: int
) -> list[float]:
    """The learning rates of the steps of an epoch, for people.

    Args:
        config: Settings of the run.
        lr: The learning rate in the optimizer's state.
        epoch: Number of the epoch, from 1.
        steps_per_epoch: Steps of an epoch.

    Returns:
        A rate for each step. All are `lr` unless the schedule is "cosine". Those of "cosine" are
        rounded to six digits.
    """
    if config.schedule != "cosine":
        return [lr] * steps_per_epoch
    steps = np.arange((epoch - 1) * steps_per_epoch, epoch * steps_per_epoch)
    factors = np.asarray(_cosine_factor(config, steps_per_epoch)(steps))
    return [float(f"{lr * factor:.6g}") for factor in factors.tolist()]


def _count_plateaus(accuracies: Sequence[float], patience: int) -> int:
    """The number of times that `patience` epochs in a row brought no better accuracy."""
    best, epochs_without_gain, plateaus = float("-inf"), 0, 0
    for accuracy in accuracies:
        epochs_without_gain = 0 if accuracy > best else epochs_without_gain + 1
        best = max(best, accuracy)
        if epochs_without_gain == patience:
            plateaus, epochs_without_gain = plateaus + 1, 0
    return plateaus
