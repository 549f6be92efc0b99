"""One step of training and one of evaluation, as pure functions of a state and a batch.

A batch is a dict of arrays: "image" uint8 (N, H, W, 3), "colour_shift" float32 (N, 3),
"label" int32 (N,), "mask" bool (N,). With `start_after`, it has "features", the output of that
layer, instead of the first two.
"""

import dataclasses
from collections.abc import Callable
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
from vgg_jax.metrics import MetricSums, compute_sums, cross_entropies
from vgg_jax.model import VGG
from vgg_jax.ops.epilogue import materialize_on_cpu
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.training.layer_statistics import layer_statistics
from vgg_jax.training.optimizer import make_optimizer

Batch = dict[str, Array]


@flax.struct.dataclass
class TrainState:
    """All that the next step depends on, besides its batch."""

    step: Array  # int32, the number of finished steps
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    key: Array  # constant: each step folds its number into this key


def init_state(
    model: VGG,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    mesh_config: MeshConfig = DATA_PARALLEL,
) -> TrainState:
    """Initialises a training state on the devices of a mesh.

    Args:
        model: The net.
        optimizer: The optimizer, see `vgg_jax.training.optimizer.make_optimizer`.
        seed: Seed of the parameters and of all later steps.
        mesh: Devices.
        mesh_config: The parallelism of the run.

    Returns:
        The state at step 0. It is the same for any mesh.
    """
    key = jax.random.key(seed)
    options: dict[str, Any] = {"compiler_options": compiler_options()}
    state_shardings = infer_shardings(state_shapes(model, optimizer), mesh, mesh_config)
    variable_shardings = {
        "params": state_shardings.params,
        "batch_stats": state_shardings.batch_stats,
    }
    init_variables_jit = jax.jit(
        partial(init_variables, model), out_shardings=variable_shardings, **options
    )
    # Two programs keep the momentum and the random generator's scratch memory from being live at
    # once. Together they need more memory than a training step of net A
    # (docs/performance.md#memory-of-the-initialisation).
    new_state_jit = jax.jit(
        partial(_new_state, optimizer), out_shardings=state_shardings, donate_argnums=0, **options
    )
    return new_state_jit(init_variables_jit(key), key)


def init_variables(model: VGG, key: Array) -> dict[str, Any]:
    """Draws the parameters and the running statistics of a net.

    Args:
        model: The net.
        key: Random key.

    Returns:
        "params" and "batch_stats". The latter is empty without batch normalisation.
    """
    return {"batch_stats": {}, **model.lazy_init(key, model.one_image())}


def state_shapes(model: VGG, optimizer: optax.GradientTransformation) -> TrainState:
    """The shapes and dtypes of a training state. Computes nothing.

    Args:
        model: The net.
        optimizer: The optimizer.

    Returns:
        A state of `jax.ShapeDtypeStruct`.
    """

    def init(key: Array) -> TrainState:
        return _new_state(optimizer, init_variables(model, key), key)

    return jax.eval_shape(init, jax.random.key(0))


def _new_state(
    optimizer: optax.GradientTransformation, variables: dict[str, Any], key: Array
) -> TrainState:
    """The state at step 0."""
    return TrainState(
        jnp.int32(0),
        variables["params"],
        variables["batch_stats"],
        optimizer.init(variables["params"]),
        key,
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: VGG,
    optimizer: optax.GradientTransformation,
    mean_rgb: tuple[float, float, float],
    mesh: Mesh,
    mesh_config: MeshConfig = DATA_PARALLEL,
    microbatch: int | None = None,
    start_after: str | None = None,
    class_weights: tuple[float, ...] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[TrainState, MetricSums]:
    """One step of the optimizer on the mean loss of the examples whose mask is true.

    Args:
        state: The state before the step.
        batch: A batch of N examples, sharded over "data".
        model: The net.
        optimizer: The optimizer.
        mean_rgb: The mean colour to subtract, on the 0-255 scale.
        mesh: Devices.
        mesh_config: The parallelism of the run.
        microbatch: Number of examples in a forward and backward pass; the gradients of all
            passes are added. Batch normalisation then uses the statistics of a micro-batch, and
            dropout draws other masks; otherwise the step is the same. None: all N.
        start_after: Name of the layer whose output is the batch's "features". None: the batch has
            images.
        class_weights: Factor of the loss of an example, by its class. None: 1. The mean is over
            the number of examples, not over the sum of their weights, so that each example counts
            the same in any batch.
        label_smoothing: Share of the target that is spread evenly over all classes.

    Returns:
        The next state, and the sums over the batch with dropout and augmentation on, without
        weights and smoothing.
    """
    next_state, sums, _ = _train_step(
        state,
        batch,
        model=model,
        optimizer=optimizer,
        mean_rgb=mean_rgb,
        mesh=mesh,
        mesh_config=mesh_config,
        microbatch=microbatch,
        start_after=start_after,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
    )
    return next_state, sums


def train_step_with_statistics(
    state: TrainState, batch: Batch, *, model: VGG, measure_every: int, **options: Any
) -> tuple[TrainState, MetricSums, dict[str, Array]]:
    """One step of the optimizer, which measures its layers from time to time.

    The next state is that of `train_step`. So is the memory, but jax 0.10.1 on a CPU needs that of
    the parameters once more.

    Args:
        state: The state before the step.
        batch: A batch of N examples, sharded over "data".
        model: The net.
        measure_every: The layers are measured if this divides the number of the step, from 0.
            Other steps do not pay for it.
        **options: The other arguments of `train_step`.

    Returns:
        The next state, the sums, and the `layer_statistics` of the gradients and of the new
        parameters. The statistics are 0 in a step that does not measure.
    """
    next_state, sums, gradients = _train_step(state, batch, model=model, **options)
    measure = partial(layer_statistics, model)
    operands = (gradients, next_state.params, sums.count)
    shapes = jax.eval_shape(measure, *operands)
    statistics = jax.lax.cond(
        state.step % measure_every == 0,
        measure,
        lambda *_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
        *operands,
    )
    return next_state, sums, statistics


def _train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: VGG,
    optimizer: optax.GradientTransformation,
    mean_rgb: tuple[float, float, float],
    mesh: Mesh,
    mesh_config: MeshConfig = DATA_PARALLEL,
    microbatch: int | None = None,
    start_after: str | None = None,
    class_weights: tuple[float, ...] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[TrainState, MetricSums, Any]:
    """The next state, the sums, and the gradients of the summed loss."""
    key = jax.random.fold_in(state.key, state.step)
    param_specs = jax.tree.map(data_axis_spec, infer_shardings(state.params, mesh, mesh_config))
    batch_size = len(batch["label"])
    local_fn = partial(
        _local_gradients,
        model=model.clone(axis_name=DATA if mesh.shape[DATA] > 1 else None),
        mean_rgb=mean_rgb,
        start_after=start_after,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        num_microbatches=batch_size // (microbatch or batch_size),
        param_specs=param_specs,
        allreduce_dtype=mesh_config.reduce,
        mesh=mesh,
    )
    in_specs = (param_specs, PartitionSpec(), PartitionSpec(DATA), PartitionSpec())
    out_specs = (param_specs, PartitionSpec(), PartitionSpec())
    gradients, batch_stats, sums = _shard_map_data(local_fn, mesh, in_specs, out_specs)(
        state.params, state.batch_stats, batch, key
    )

    # No parameter is updated before all have been read. Otherwise XLA on a CPU updates copies of
    # the large ones (docs/performance.md#gradients-before-updates).
    gradients = materialize_on_cpu(gradients)
    mean_gradients = jax.tree.map(lambda g: g / jnp.maximum(sums.count, 1), gradients)
    updates, opt_state = optimizer.update(mean_gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    next_state = dataclasses.replace(
        state, step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state
    )
    return next_state, sums, gradients


def _shard_map_data(
    function: Callable[..., Any], mesh: Mesh, in_specs: tuple, out_specs: Any
) -> Callable[..., Any]:
    """Maps a function over the devices along "data". XLA partitions it along "model"."""
    if mesh.shape[DATA] == 1:
        # Nothing is exchanged, and XLA rejects a sum over one device beside a "model" axis.
        return function
    manual_axes = {DATA} if mesh.shape[MODEL] > 1 else {DATA, MODEL}
    # Unchecked, because hand-written gradients do not declare the axes that they vary over.
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=manual_axes,
        check_vma=False,
    )


def _loss(
    params: Any,
    batch_stats: Any,
    batch: Batch,
    key: Array,
    *,
    model: VGG,
    mean_rgb: tuple[float, float, float],
    start_after: str | None,
    class_weights: tuple[float, ...] | None,
    label_smoothing: float,
) -> tuple[Array, tuple[Any, MetricSums]]:
    """The summed loss to minimise, the new running statistics, and the sums to report."""
    logits: Any
    logits, updated = _apply(
        model,
        {"params": params, "batch_stats": batch_stats},
        batch,
        mean_rgb,
        start_after,
        train=True,
        mask=batch["mask"],
        rngs={"dropout": key},
        mutable=["batch_stats"],
    )
    sums = compute_sums(logits, batch["label"], batch["mask"])
    loss = sums.loss
    if class_weights is not None or label_smoothing:
        weights = batch["mask"]
        if class_weights is not None:
            weights = jnp.where(weights, jnp.asarray(class_weights)[batch["label"]], 0)
        # A padding example (mask False) may hold NaN, and 0 · NaN is NaN.
        losses = _smoothed_losses(logits, batch["label"], label_smoothing)
        losses = jnp.where(batch["mask"], losses, 0)
        loss = (weights * losses).sum()
    return loss, (updated.get("batch_stats", batch_stats), sums)


def _smoothed_losses(logits: Array, labels: Array, label_smoothing: float) -> Array:
    """The cross-entropy of each example with its label and, by a share, with all classes."""
    if not label_smoothing:
        return cross_entropies(logits, labels)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    targets = jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def _apply(
    model: VGG,
    variables: dict[str, Any],
    batch: Batch,
    mean_rgb: tuple[float, float, float],
    start_after: str | None,
    **options: Any,
) -> Any:
    """Applies the net to a batch of images, or of features."""
    if start_after is None:
        images = subtract_mean(batch["image"], mean_rgb, batch["colour_shift"])
        return model.apply(variables, images, **options)
    return model.apply(variables, batch["features"], start_after, method="logits_after", **options)


def _local_gradients(
    params: Any,
    batch_stats: Any,
    batch: Batch,
    key: Array,
    *,
    model: VGG,
    mean_rgb: tuple[float, float, float],
    start_after: str | None,
    class_weights: tuple[float, ...] | None,
    label_smoothing: float,
    num_microbatches: int,
    param_specs: Any,
    allreduce_dtype: str,
    mesh: Mesh,
) -> tuple[Any, Any, MetricSums]:
    """Gradients, running statistics and sums of the whole batch, from a device's examples.

    Devices exchange gradients once a step, after the last micro-batch.
    """
    params = jax.tree.map(_gather_param, params, param_specs)
    loss_fn = partial(
        _loss,
        model=model,
        mean_rgb=mean_rgb,
        start_after=start_after,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
    )
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if num_microbatches == 1:
        gradients, (batch_stats, sums) = grad_fn(params, batch_stats, batch, key)
    else:
        gradients, batch_stats, sums = _accumulate_gradients(
            grad_fn, params, batch_stats, batch, key, num_microbatches
        )
    if mesh.shape[DATA] > 1:
        gradients = jax.tree.map(
            partial(_reduce_gradient, dtype=allreduce_dtype), gradients, param_specs
        )
    return gradients, batch_stats, _sum_over_data(sums, mesh)


def _accumulate_gradients(
    grad_fn: Callable[..., Any],
    params: Any,
    batch_stats: Any,
    batch: Batch,
    key: Array,
    num_microbatches: int,
) -> tuple[Any, Any, MetricSums]:
    """Runs the micro-batches one after the other, and adds their gradients and sums."""

    def add_microbatch(carry: tuple, numbered: tuple[Array, Batch]) -> tuple[tuple, MetricSums]:
        total, batch_stats = carry
        number, microbatch = numbered
        gradients, (batch_stats, sums) = grad_fn(
            params, batch_stats, microbatch, jax.random.fold_in(key, number)
        )
        return (jax.tree.map(jnp.add, total, gradients), batch_stats), sums

    # Example i belongs to micro-batch i % num_microbatches. A device's examples of each
    # micro-batch are then among its own examples of the batch.
    microbatches = jax.tree.map(
        lambda x: x.reshape(len(x) // num_microbatches, num_microbatches, *x.shape[1:]).swapaxes(
            0, 1
        ),
        batch,
    )
    init = (jax.tree.map(jnp.zeros_like, params), batch_stats)
    (gradients, batch_stats), sums = jax.lax.scan(
        add_microbatch, init, (jnp.arange(num_microbatches), microbatches)
    )
    return gradients, batch_stats, jax.tree.map(lambda x: x.sum(0), sums)


def _gather_param(param: Array, spec: PartitionSpec) -> Array:
    """The whole of a parameter that may be sharded over "data"."""
    if DATA not in spec:
        return param
    return jax.lax.all_gather(param, DATA, axis=tuple(spec).index(DATA), tiled=True)


def _reduce_gradient(gradient: Array, spec: PartitionSpec, dtype: str) -> Array:
    """Sums a gradient over "data", and shards the sum like its parameter."""
    param_dtype = gradient.dtype
    if dtype == "bfloat16":
        gradient = gradient.astype(dtype)
    if DATA in spec:
        total = jax.lax.psum_scatter(
            gradient, DATA, scatter_dimension=tuple(spec).index(DATA), tiled=True
        )
    else:
        total = jax.lax.psum(gradient, DATA)
    return total.astype(param_dtype)


def _sum_over_data(sums: MetricSums, mesh: Mesh) -> MetricSums:
    return jax.lax.psum(sums, DATA) if mesh.shape[DATA] > 1 else sums


def eval_step(
    variables: dict[str, Any],
    batch: Batch,
    *,
    model: VGG,
    mean_rgb: tuple[float, float, float],
    mesh: Mesh,
    mesh_config: MeshConfig = DATA_PARALLEL,
    start_after: str | None = None,
) -> MetricSums:
    """Evaluates a batch, without dropout and with the running statistics.

    Args:
        variables: "params" and "batch_stats" of the net.
        batch: A batch, sharded over "data".
        model: The net.
        mean_rgb: The mean colour to subtract, on the 0-255 scale.
        mesh: Devices.
        mesh_config: The parallelism of the run.
        start_after: As for `train_step`.

    Returns:
        The sums over the examples whose mask is true.
    """
    variable_specs = jax.tree.map(data_axis_spec, infer_shardings(variables, mesh, mesh_config))

    def local_fn(variables: dict[str, Any], batch: Batch) -> MetricSums:
        variables = jax.tree.map(_gather_param, variables, variable_specs)
        logits: Any = _apply(model, variables, batch, mean_rgb, start_after)
        return _sum_over_data(compute_sums(logits, batch["label"], batch["mask"]), mesh)

    in_specs = (variable_specs, PartitionSpec(DATA))
    return _shard_map_data(local_fn, mesh, in_specs, PartitionSpec())(variables, batch)


def feature_step(
    variables: dict[str, Any],
    batch: Batch,
    *,
    model: VGG,
    layer: str,
    mean_rgb: tuple[float, float, float],
    mesh: Mesh,
    mesh_config: MeshConfig = DATA_PARALLEL,
) -> Array:
    """Computes the output of a layer for a batch of images, in inference mode.

    Args:
        variables: "params" and "batch_stats" of the net.
        batch: A batch with images, sharded over "data".
        model: The net.
        layer: Name of the layer.
        mean_rgb: The mean colour to subtract, on the 0-255 scale.
        mesh: Devices.
        mesh_config: The parallelism of the run.

    Returns:
        Activations (N, h, w, C), sharded over "data".
    """
    variable_specs = jax.tree.map(data_axis_spec, infer_shardings(variables, mesh, mesh_config))

    def local_fn(variables: dict[str, Any], batch: Batch) -> Array:
        variables = jax.tree.map(_gather_param, variables, variable_specs)
        images = subtract_mean(batch["image"], mean_rgb, batch["colour_shift"])
        features: Any = model.apply(variables, images, (layer,), method="features")
        return features[layer]

    in_specs = (variable_specs, PartitionSpec(DATA))
    return _shard_map_data(local_fn, mesh, in_specs, PartitionSpec(DATA))(variables, batch)


def jit_steps(
    config: TrainConfig,
    model: VGG,
    mean_rgb: tuple[float, float, float],
    mesh: Mesh,
    mesh_config: MeshConfig = DATA_PARALLEL,
    donate: bool = True,
    class_weights: tuple[float, ...] | None = None,
    measure_every: int | None = None,
    steps_per_epoch: int | None = None,
) -> tuple[jax.stages.Wrapped, jax.stages.Wrapped]:
    """Jits the steps of a run.

    Args:
        config: Settings of the run, with a learning rate.
        model: The net.
        mean_rgb: The mean colour to subtract, on the 0-255 scale.
        mesh: Devices.
        mesh_config: The parallelism of the run.
        donate: Reuses the memory of the old state for the new one. The old one is then deleted.
        class_weights: As for `train_step`.
        measure_every: As for `train_step_with_statistics`, which is then the step. None:
            `train_step`.
        steps_per_epoch: As for `vgg_jax.training.optimizer.make_optimizer`.

    Returns:
        `train_step(state, batch)` and `eval_step(variables, batch)`.
    """
    optimizer = make_optimizer(config, steps_per_epoch)
    static: dict[str, Any] = {
        "model": model,
        "mean_rgb": mean_rgb,
        "mesh": mesh,
        "mesh_config": mesh_config,
        "start_after": config.feature_layer if config.cache_features else None,
    }
    options: dict[str, Any] = {"compiler_options": compiler_options(dtype=model.dtype)}
    state_shardings = infer_shardings(state_shapes(model, optimizer), mesh, mesh_config)
    step: Callable[..., Any] = train_step
    out_shardings: tuple[Any, ...] = (state_shardings, replicated(mesh))
    if measure_every is not None:
        step = partial(train_step_with_statistics, measure_every=measure_every)
        out_shardings += (replicated(mesh),)
    train_step_jit = jax.jit(
        partial(
            step,
            optimizer=optimizer,
            microbatch=config.microbatch,
            class_weights=class_weights,
            label_smoothing=config.label_smoothing,
            **static,
        ),
        donate_argnums=0 if donate else (),
        out_shardings=out_shardings,
        **options,
    )
    eval_step_jit = jax.jit(partial(eval_step, **static), out_shardings=replicated(mesh), **options)
    return train_step_jit, eval_step_jit
