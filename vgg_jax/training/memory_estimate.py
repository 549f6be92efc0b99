"""The memory of a training step, predicted from its compiled program."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vgg_jax.configs.presets import resolve_learning_rate
from vgg_jax.configs.train import TrainConfig
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.model import build_model
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.training.optimizer import sgd
from vgg_jax.training.step import init_variables, jit_steps, state_shapes

# XLA's runtime on a CPU takes memory that no program's plan counts
# (docs/performance.md#memory-of-a-training-step).
XLA_RUNTIME_BYTES = 150_000_000


def estimate_step_memory(config: TrainConfig, num_classes: int) -> dict[str, int]:
    """Predicts the memory of training on one device. Compiles programs, but runs none.

    The prediction is compared with measurements by `experiments/benchmarks/check_memory.py`
    (docs/performance.md#memory-of-a-training-step).

    Args:
        config: Settings of the run.
        num_classes: Number of classes.

    Returns:
        Bytes: "state" of parameters and momentum, and "total" of a step or of the
        initialisation, whichever takes more.
    """
    mesh = make_mesh(1, jax.devices()[:1])
    config = resolve_learning_rate(config, num_classes)
    model, size = build_model(config, num_classes), config.image_size
    step, _ = jit_steps(config, model, (0.0, 0.0, 0.0), mesh)
    state = state_shapes(model, sgd(config))
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8),
        "colour_shift": jax.ShapeDtypeStruct((config.batch_size, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((config.batch_size,), jnp.bool_),
    }
    initialise = jax.jit(partial(init_variables, model), compiler_options=compiler_options())
    total = max(
        _peak_bytes(step.lower(state, batch)), _peak_bytes(initialise.lower(jax.random.key(0)))
    )
    total += XLA_RUNTIME_BYTES if jax.default_backend() == "cpu" else 0
    trained = jax.tree.leaves((state.params, state.opt_state))
    return {"state": sum(leaf.size * leaf.dtype.itemsize for leaf in trained), "total": total}


def _peak_bytes(lowered: jax.stages.Lowered) -> int:
    """Bytes of a program's arguments, outputs and temporaries; donated arguments count once."""
    memory: Any = lowered.compile().memory_analysis()
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
