"""The memory of a training step, predicted from its compiled program."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from vgg_jax.configs.presets import resolve_learning_rate
from vgg_jax.configs.train import TrainConfig
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.model import build_model
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.runtime.memory import free_memory
from vgg_jax.training.optimizer import make_optimizer
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
        Bytes: "state" of parameters and the optimizer, and "total" of a step or of the
        initialisation, whichever takes more. SGD keeps one number for each parameter, its
        momentum, and AdamW two.
    """
    mesh = make_mesh(1, jax.devices()[:1])
    config = resolve_learning_rate(config, num_classes)
    model, size = build_model(config, num_classes), config.image_size
    steps_per_epoch = 1  # any number: it changes no shape
    step, _ = jit_steps(config, model, (0.0, 0.0, 0.0), mesh, steps_per_epoch=steps_per_epoch)
    state = state_shapes(model, make_optimizer(config, steps_per_epoch))
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8),
        "colour_shift": jax.ShapeDtypeStruct((config.batch_size, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((config.batch_size,), jnp.int32),
        "mask": jax.ShapeDtypeStruct((config.batch_size,), jnp.bool_),
    }
    initialise = jax.jit(partial(init_variables, model), compiler_options=compiler_options())
    total = max(
        peak_bytes(step.lower(state, batch).compile()),
        peak_bytes(initialise.lower(jax.random.key(0)).compile()),
    )
    trained = jax.tree.leaves((state.params, state.opt_state))
    return {"state": sum(leaf.size * leaf.dtype.itemsize for leaf in trained), "total": total}


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Predicts the memory of a program on one device.

    Args:
        compiled: The program.

    Returns:
        Bytes of its arguments, outputs and temporaries, and on a CPU of XLA's runtime. Donated
        arguments count once.
    """
    memory: Any = compiled.memory_analysis()
    runtime_bytes = XLA_RUNTIME_BYTES if jax.default_backend() == "cpu" else 0
    return runtime_bytes + (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )


def free_device_memory(device: jax.Device | None = None) -> float:
    """Bytes that a program can get on a device; infinite if unknown.

    Args:
        device: An accelerator, or a CPU device. None: the first one of this process.

    Returns:
        Its free memory. The CPU devices of a process share that of the machine or the container.
    """
    device = device or jax.local_devices()[0]
    if device.platform == "cpu":
        return free_memory() / jax.local_device_count("cpu")
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return math.inf
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def largest_microbatch(
    config: TrainConfig, num_classes: int, num_devices: int, free: float
) -> int | None:
    """Finds the largest micro-batch whose training step fits into memory. Compiles a few steps.

    Args:
        config: Settings of the run.
        num_classes: Number of classes.
        num_devices: Devices that share the images of a micro-batch.
        free: Bytes that are free on each device.

    Returns:
        The micro-batch, smaller than the run's own, or None if none fits.
    """
    current = config.microbatch or config.batch_size
    sizes = [
        size for size in range(num_devices, current, num_devices) if config.batch_size % size == 0
    ]
    # The features of --cache-features are computed in micro-batches, too.
    config = dataclasses.replace(config, cache_features=False)
    largest = None
    while sizes:
        middle = len(sizes) // 2  # a search by halves, because a compilation takes seconds
        local = dataclasses.replace(
            config,
            batch_size=config.batch_size // num_devices,
            microbatch=sizes[middle] // num_devices,
        )
        if estimate_step_memory(local, num_classes)["total"] <= free:
            largest, sizes = sizes[middle], sizes[middle + 1 :]
        else:
            sizes = sizes[:middle]
    return largest


def describe_remedy(config: TrainConfig, num_classes: int, num_devices: int, free: float) -> str:
    """Names what would fit into memory.

    Args:
        config: Settings of the run.
        num_classes: Number of classes.
        num_devices: Devices that share the images of a micro-batch.
        free: Bytes that are free on each device.

    Returns:
        A part of a sentence.
    """
    microbatch = largest_microbatch(config, num_classes, num_devices, free)
    if microbatch is not None:
        return f"--microbatch {microbatch} fits, and also resumes a run"
    smaller = f"a smaller --batch-size than {config.batch_size}, " if config.batch_size > 1 else ""
    dtype = "" if config.dtype == "bfloat16" else "--dtype bfloat16, "
    optimizer = "--optimizer sgd, " if config.optimizer == "adamw" else ""
    return f"no --microbatch fits: pass {smaller}{dtype}{optimizer}a smaller --fc or --freeze conv"
