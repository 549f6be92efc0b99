"""XLA's compiler options for this machine, and a probe for oneDNN's bfloat16.

Only a CPU needs options:

- The library YNN is limited to matrix products. It slows down the kernel gradient of a convolution.
- LLVM optimises less: programs compile much faster. Inference can ask for more
  (`optimize_runtime`).
- A bfloat16 net may use oneDNN, which uses the CPU's bfloat16 instructions.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh

_ONEDNN_OPTIONS: dict[str, str | int | bool] = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_experimental_onednn_custom_call": True,
}
# YNN for matrix products only (docs/performance.md#ynn).
_YNN_OPTIONS: dict[str, str | int | bool] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"
}


def compiler_options(
    optimize_runtime: bool = False, dtype: Any = jnp.float32
) -> dict[str, str | int | bool]:
    """Chooses XLA's options for the best speed on the default backend.

    Programs with oneDNN calls cannot be stored in jax's compilation cache by jaxlib 0.12, which
    logs a warning. Float32 programs therefore use no oneDNN.

    Args:
        optimize_runtime: Optimise more. Compiling takes longer, which pays off in minutes of
            inference (docs/performance.md#llvm-optimisation-level).
        dtype: Type in which the net computes. bfloat16 uses oneDNN where
            `has_onednn_bfloat16()`, for matrix products also if its convolutions are float32.

    Returns:
        Options for `jax.jit(f, compiler_options=...)`; none on an accelerator.
    """
    if jax.default_backend() != "cpu":
        return {}
    # LLVM's expensive passes take long and gain nothing. Without `optimize_runtime` the level is
    # lower still (docs/performance.md#llvm-optimisation-level).
    llvm: dict[str, int | bool] = (
        {"xla_llvm_disable_expensive_passes": True}
        if optimize_runtime
        else {"xla_backend_optimization_level": 1}
    )
    if dtype == jnp.bfloat16 and has_onednn_bfloat16():
        return {**_ONEDNN_OPTIONS, **llvm}
    return {**_YNN_OPTIONS, **llvm}


@functools.cache
def has_onednn_bfloat16() -> bool:
    """Probes if XLA delegates a bfloat16 convolution to oneDNN here.

    jaxlib 0.12 does on a CPU with instructions for bfloat16. The probe compiles one convolution,
    once. `vgg_jax.ops.bfloat16` chooses between oneDNN and float32.

    Returns:
        True if bfloat16 convolutions can run in oneDNN on the default backend.
    """
    if jax.default_backend() != "cpu":
        return False
    x = jax.ShapeDtypeStruct((1, 8, 8, 16), jnp.bfloat16)
    kernel = jax.ShapeDtypeStruct((3, 3, 16, 16), jnp.bfloat16)

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    # Without the mesh of a surrounding `jax.shard_map`, which may name no devices.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        compiled = jax.jit(convolve, compiler_options=_ONEDNN_OPTIONS).lower(x, kernel).compile()
    return "__onednn$convolution" in (compiled.as_text() or "")
