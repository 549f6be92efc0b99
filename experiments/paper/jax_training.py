"""Our side of `parity`: the crops that both frameworks get, and training on them."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.paper.scan_training import Data, gather, in_batches, padded_order
from vgg_jax import VGG, TrainConfig
from vgg_jax.array_batches import crop_function
from vgg_jax.arrays import ArraySource
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import TrainState, eval_step, init_state, train_step

Batches = dict[str, np.ndarray]
PERTURBATION = 1e-7  # about the rounding error of a float32


class Crops:
    """The batches that both frameworks get, with a first axis of steps."""

    def __init__(self, config: TrainConfig, data: Data) -> None:
        self._config, self._data = config, data
        self._crop = crop_function(config, data.colours)

    def train(self, epoch: int, max_steps: int | None = None) -> Batches:
        """The augmented crops of an epoch, or of its first steps."""
        order = padded_order(self._data.train, self._config, epoch)[:max_steps]
        return _stack(self._make(self._data.train, order, epoch))

    def centre(self, source: ArraySource) -> Batches:
        """The centre crops of a source."""
        return _stack(self._make(source, in_batches(source.indices), None))

    def _make(
        self, source: ArraySource, order: np.ndarray, epoch: int | None
    ) -> Iterator[dict[str, np.ndarray]]:
        pixels, labels = jnp.asarray(source.images), jnp.asarray(source.all_labels)
        for indices in order:
            examples = _gather(pixels, labels, indices)
            if epoch is not None:
                examples["epoch"] = jnp.full(len(indices), epoch, jnp.int32)
            yield jax.device_get(self._crop(examples))


_gather = jax.jit(gather)


def _stack(steps: Iterator[dict[str, np.ndarray]]) -> Batches:
    batches = list(steps)
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


class JaxTraining:
    """Training in vgg_jax on given batches, all steps of a call in one program."""

    def __init__(self, config: TrainConfig, model: VGG, data: Data, steps_per_epoch: int) -> None:
        mesh = make_mesh(config.batch_size, jax.local_devices()[:1])
        optimizer = make_optimizer(config, steps_per_epoch)
        self._start = partial(init_state, model, optimizer, config.seed, mesh)
        self.state = self._start()
        static = {"model": model, "mean_rgb": data.colours.mean_rgb, "mesh": mesh}
        xla = {"compiler_options": compiler_options(dtype=model.dtype)}
        step = partial(train_step, optimizer=optimizer, **static)
        self._train = jax.jit(partial(jax.lax.scan, step), donate_argnums=0, **xla)

        def evaluate(state: TrainState, batches: Batches) -> Any:
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            return jax.lax.map(lambda batch: eval_step(variables, batch, **static), batches)

        self._evaluate = jax.jit(evaluate, **xla)

    @property
    def variables(self) -> dict[str, Any]:
        """A copy of "params" and "batch_stats" on the host."""
        variables = {"params": self.state.params, "batch_stats": self.state.batch_stats}
        # A view would see the memory that the next steps reuse.
        return jax.tree.map(np.array, variables)

    def restart(self, params: Any) -> None:
        """Goes back to the start of the training, but with other parameters."""
        state = self._start()
        params = jax.tree.map(lambda x, old: jax.device_put(x, old.sharding), params, state.params)
        self.state = dataclasses.replace(state, params=params)

    def train(self, batches: Batches) -> dict[str, np.ndarray]:
        """Trains on the batches. Returns the sums of each step: "loss", "correct", "count"."""
        self.state, sums = self._train(self.state, batches)
        return _to_dict(sums)

    def evaluate(self, batches: Batches) -> dict[str, np.ndarray]:
        """Evaluates the batches. Returns the sums of each."""
        return _to_dict(self._evaluate(self.state, batches))


def _to_dict(sums: Any) -> dict[str, np.ndarray]:
    names = {"loss": "loss", "correct": "top1", "count": "count"}
    return {name: np.asarray(getattr(sums, field), np.float64) for name, field in names.items()}


def perturb(params: Any) -> Any:
    """Multiplies each parameter by 1 + 1e-7 or by 1 - 1e-7, at random."""
    # One factor for all would cancel in batch normalisation.
    rng = np.random.default_rng(0)

    def change(x: np.ndarray) -> np.ndarray:
        factors = 1 + PERTURBATION * rng.choice((-1.0, 1.0), x.shape)
        return (x * factors).astype(x.dtype)

    return jax.tree.map(change, params)
