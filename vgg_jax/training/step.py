"""One step of training and of evaluation, as pure functions of a state and a batch.

A batch is {"image": uint8 (N, H, W, 3), "colour_shift": float32 (N, 3), "label": int32 (N,), "mask": bool (N,)}.
"""

import dataclasses
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from vgg_jax.configs.train import TrainConfig
from vgg_jax.distributed.sharding import (
    DATA,
    DATA_PARALLEL,
    MODEL,
    MeshConfig,
    data_axis_spec,
    infer_shardings,
    replicated,
)
from vgg_jax.metrics import MetricSums, compute_sums
from vgg_jax.model import VGG
from vgg_jax.preprocessing import preprocess
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.training.optimizer import sgd

Batch = dict[str, Array]


@flax.struct.dataclass
class TrainState:
    """All that the next step depends on, besides its batch."""

    step: Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    key: Array  # never replaced: a step's randomness is derived from it and the step's number


def init_state(
    model: VGG,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    layout: MeshConfig = DATA_PARALLEL,
) -> TrainState:
    """A state at step 0, on the devices of the mesh, its parameters drawn from the seed: the same for any mesh and layout."""
    key = jax.random.key(seed)
    options: dict[str, Any] = {"compiler_options": compiler_options()}
    places = infer_shardings(
        jax.eval_shape(partial(_init_state, model, optimizer), key), mesh, layout
    )
    drawn = {"params": places.params, "batch_stats": places.batch_stats}
    variables = jax.jit(partial(_variables, model), out_shardings=drawn, **options)(key)
    # Not in one program: the momentum would lie beside what drawing takes, and net A's start take more memory than a step (2.6, 2.2 GB).
    return jax.jit(
        partial(_new_state, optimizer), out_shardings=places, donate_argnums=0, **options
    )(variables, key)


def _variables(model: VGG, key: Array) -> dict[str, Any]:
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    return {"batch_stats": {}, **model.lazy_init(key, images)}


def _new_state(
    optimizer: optax.GradientTransformation, variables: dict[str, Any], key: Array
) -> TrainState:
    return TrainState(
        jnp.int32(0),
        variables["params"],
        variables["batch_stats"],
        optimizer.init(variables["params"]),
        key,
    )


def _init_state(model: VGG, optimizer: optax.GradientTransformation, key: Array) -> TrainState:
    return _new_state(optimizer, _variables(model, key), key)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: VGG,
    optimizer: optax.GradientTransformation,
    mean_rgb: tuple[float, float, float],
    mesh: Mesh,
    layout: MeshConfig = DATA_PARALLEL,
    microbatch: int | None = None,
) -> tuple[TrainState, MetricSums]:
    """One step of SGD on the mean loss of the batch's real examples, and their sums as they were seen in training.

    With `microbatch` that many examples at a time run forward and backward and their gradients are added: the same step but for
    batch normalisation, whose statistics are then a micro-batch's, and for what dropout draws.
    """
    key = jax.random.fold_in(state.key, state.step)
    spread = jax.tree.map(data_axis_spec, infer_shardings(state.params, mesh, layout))
    parts = len(batch["label"]) // (microbatch or len(batch["label"]))
    model = model.clone(axis_name=DATA if mesh.shape[DATA] > 1 else None)
    share = partial(
        _gradients,
        model=model,
        mean_rgb=mean_rgb,
        parts=parts,
        spread=spread,
        reduce=layout.reduce,
        mesh=mesh,
    )
    takes, gives = (
        (spread, PartitionSpec(), PartitionSpec(DATA), PartitionSpec()),
        (spread, PartitionSpec(), PartitionSpec()),
    )
    gradients, batch_stats, sums = _shard_map_data(share, mesh, takes, gives)(
        state.params, state.batch_stats, batch, key
    )

    # No parameter is updated before all have been read: else XLA on a CPU updates copies of the large ones, fc6's of 0.4 GB (2-core x86, a
    # step of D, 8 photos, and of A, batch 128 at 32 pixels: 6 % of their time).
    gradients = jax.lax.platform_dependent(
        gradients, cpu=jax.lax.optimization_barrier, default=lambda gradients: gradients
    )
    gradients = jax.tree.map(lambda g: g / jnp.maximum(sums.count, 1), gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return dataclasses.replace(
        state, step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state
    ), sums


def _shard_map_data(function: Any, mesh: Mesh, takes: tuple, gives: Any) -> Any:
    """A function of what each device has along "data", which says itself what is exchanged; along "model" XLA divides it."""
    if mesh.shape[DATA] == 1:  # nothing is; beside a "model" XLA refuses a sum over one
        return function
    manual = {DATA} if mesh.shape[MODEL] > 1 else {DATA, MODEL}
    # Unchecked: the gradients that are written by hand do not say along which axes they differ.
    return jax.shard_map(
        function, mesh=mesh, in_specs=takes, out_specs=gives, axis_names=manual, check_vma=False
    )


def _total(value: Any, mesh: Mesh) -> Any:
    return jax.lax.psum(value, DATA) if mesh.shape[DATA] > 1 else value


def _gradients(
    params: Any,
    batch_stats: Any,
    batch: Batch,
    key: Array,
    *,
    model: VGG,
    mean_rgb: tuple[float, float, float],
    parts: int,
    spread: Any,
    reduce: str,
    mesh: Mesh,
) -> tuple[Any, Any, MetricSums]:
    """Of a device's share of the batch: the whole batch's gradients, running statistics and sums. They are exchanged once a step."""
    params = jax.tree.map(_all_gather, params, spread)

    def loss(
        params: Any, batch_stats: Any, part: Batch, key: Array
    ) -> tuple[Array, tuple[Any, MetricSums]]:
        images = preprocess(part["image"], mean_rgb, part["colour_shift"])
        params = {
            name: jax.lax.stop_gradient(layer) if name in model.frozen else layer
            for name, layer in params.items()
        }
        variables = {"params": params, "batch_stats": batch_stats}
        logits: Any
        logits, updated = model.apply(
            variables,
            images,
            train=True,
            mask=part["mask"],
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        sums = compute_sums(logits, part["label"], part["mask"])
        return sums.loss, (updated.get("batch_stats", batch_stats), sums)

    def add(carry: tuple, numbered_part: tuple[Array, Batch]) -> tuple[tuple, MetricSums]:
        gradients, batch_stats = carry
        number, part = numbered_part
        more, (batch_stats, sums) = jax.grad(loss, has_aux=True)(
            params, batch_stats, part, jax.random.fold_in(key, number)
        )
        return (jax.tree.map(jnp.add, gradients, more), batch_stats), sums

    if parts == 1:
        gradients, (batch_stats, sums) = jax.grad(loss, has_aux=True)(
            params, batch_stats, batch, key
        )
    else:
        # Every parts-th example makes a part: each device's share of a part is then in its own share of the batch.
        split = jax.tree.map(
            lambda x: x.reshape(len(x) // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
        )
        start = (jax.tree.map(jnp.zeros_like, params), batch_stats)
        (gradients, batch_stats), sums = jax.lax.scan(add, start, (jnp.arange(parts), split))
        sums = jax.tree.map(lambda x: x.sum(0), sums)
    if mesh.shape[DATA] > 1:
        gradients = jax.tree.map(partial(_reduce_gradient, dtype=reduce), gradients, spread)
    return gradients, batch_stats, _total(sums, mesh)


def _all_gather(param: Array, spread: PartitionSpec) -> Array:
    """A parameter that lies spread over "data", in one piece."""
    return (
        jax.lax.all_gather(param, DATA, axis=tuple(spread).index(DATA), tiled=True)
        if DATA in spread
        else param
    )


def _reduce_gradient(gradient: Array, spread: PartitionSpec, dtype: str) -> Array:
    """The sum of a gradient over "data", spread as its parameter is."""
    wide, gradient = gradient.dtype, gradient.astype(dtype) if dtype == "bfloat16" else gradient
    if DATA in spread:
        total = jax.lax.psum_scatter(
            gradient, DATA, scatter_dimension=tuple(spread).index(DATA), tiled=True
        )
    else:
        total = jax.lax.psum(gradient, DATA)
    return total.astype(wide)


def eval_step(
    variables: dict[str, Any],
    batch: Batch,
    *,
    model: VGG,
    mean_rgb: tuple[float, float, float],
    mesh: Mesh,
    layout: MeshConfig = DATA_PARALLEL,
) -> MetricSums:
    """The sums of a batch, in inference."""
    spread = jax.tree.map(data_axis_spec, infer_shardings(variables, mesh, layout))

    def share(variables: dict[str, Any], batch: Batch) -> MetricSums:
        variables = jax.tree.map(_all_gather, variables, spread)
        logits: Any = model.apply(
            variables, preprocess(batch["image"], mean_rgb, batch["colour_shift"])
        )
        return _total(compute_sums(logits, batch["label"], batch["mask"]), mesh)

    return _shard_map_data(share, mesh, (spread, PartitionSpec(DATA)), PartitionSpec())(
        variables, batch
    )


def jit_steps(
    config: TrainConfig,
    model: VGG,
    mean_rgb: tuple[float, float, float],
    mesh: Mesh,
    layout: MeshConfig = DATA_PARALLEL,
    donate: bool = True,
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """`train_step(state, batch)`, which if `donate` reuses the state's memory, and `eval_step(variables, batch)`, jitted."""
    static: dict[str, Any] = {"model": model, "mean_rgb": mean_rgb, "mesh": mesh, "layout": layout}
    optimizer = sgd(config)
    step = partial(train_step, optimizer=optimizer, microbatch=config.microbatch, **static)
    places = infer_shardings(
        jax.eval_shape(partial(_init_state, model, optimizer), jax.random.key(0)), mesh, layout
    )
    options: dict[str, Any] = {"compiler_options": compiler_options(dtype=model.dtype)}
    return (
        jax.jit(
            step,
            donate_argnums=0 if donate else (),
            out_shardings=(places, replicated(mesh)),
            **options,
        ),
        jax.jit(partial(eval_step, **static), out_shardings=replicated(mesh), **options),
    )
