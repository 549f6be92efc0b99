"""The memory that a training step takes, predicted from its compiled program."""

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
from vgg_jax.training.step import _init_state, _variables, jit_steps

XLA_RUNTIME_BYTES = 150_000_000  # bytes that XLA's runtime took besides, on a CPU: 37 to 162 million in 14 steps of A, D and E


def estimate_step_memory(config: TrainConfig, num_classes: int) -> dict[str, int]:
    """Bytes that training takes on one device: of its "state", and in "total", of a step or, if that takes more, of drawing the parameters.

    Compiles both and runs nothing. Within 6 % of what `experiments/benchmarks/check_memory.py` measured (2-core x86, jax 0.12, 32 to 224 pixels,
    batch 1 to 128).
    """
    mesh = make_mesh(1, jax.devices()[:1])
    config = resolve_learning_rate(config, num_classes)
    model, size = build_model(config, num_classes), config.image_size
    step, _ = jit_steps(config, model, (0.0, 0.0, 0.0), mesh)
    state = jax.eval_shape(partial(_init_state, model, sgd(config)), jax.random.key(0))
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8),
        "colour_shift": jax.ShapeDtypeStruct((config.batch_size, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((config.batch_size,), jnp.bool_),
    }
    draw = jax.jit(partial(_variables, model), compiler_options=compiler_options())
    total = max(_memory(step.lower(state, batch)), _memory(draw.lower(jax.random.key(0))))
    total += XLA_RUNTIME_BYTES if jax.default_backend() == "cpu" else 0
    return {
        "state": sum(
            leaf.size * leaf.dtype.itemsize
            for leaf in jax.tree.leaves((state.params, state.opt_state))
        ),
        "total": total,
    }


def _memory(lowered: jax.stages.Lowered) -> int:
    found: Any = lowered.compile().memory_analysis()
    return (
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )
