"""What XLA is told, and what it can do, on this machine."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def compiler_options(
    optimize_runtime: bool = False, dtype: Any = jnp.float32
) -> dict[str, str | int | bool]:
    """What to pass as `jax.jit(f, compiler_options=...)` for the best speed on the default backend; nothing but on a CPU.

    There XLA's YNN is for matrix products alone (a step of net A at 32 pixels, jax 0.12: 0.37 s, without it 0.41 s): the weight gradient
    of a convolution it makes 1.2 to 6 times as slow. And LLVM optimises less, which halves the time to compile a training step, and
    that to compile an initialisation ten times, at the same speed. `optimize_runtime` is for inference that goes on for minutes: 1.5 times as
    long to compile, and faster by a tenth (dense evaluation with net A, 4 photos, AVX-512: 0.58 s -> 0.53 s). LLVM's expensive passes
    are a third of what would be left to compile, and gain nothing.

    For a net that computes in the `dtype` bfloat16 convolutions and products are oneDNN's, where `has_onednn_bfloat16`. Such programs
    jaxlib 0.12 cannot write to jax's compilation cache, which warns of it; so float32 has none of them.
    """
    if jax.default_backend() != "cpu":
        return {}
    llvm: dict[str, int | bool] = (
        {"xla_llvm_disable_expensive_passes": True}
        if optimize_runtime
        else {"xla_backend_optimization_level": 1}
    )
    if dtype == jnp.bfloat16 and has_onednn_bfloat16():
        return {**_ONEDNN_OPTIONS, **llvm}
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT", **llvm}


_ONEDNN_OPTIONS: dict[str, str | int | bool] = {
    "xla_cpu_experimental_ynn_fusion_type": "",
    "xla_cpu_experimental_onednn_custom_call": True,
}


@functools.cache
def has_onednn_bfloat16() -> bool:
    """Whether XLA gives a bfloat16 convolution to oneDNN here: jaxlib 0.12 does, on a CPU that has instructions for them.

    Tried by compiling one, once; the processes of a run have to answer alike, or to compute in float32.
    """
    if jax.default_backend() != "cpu":
        return False
    x, kernel = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 8, 8, 16), (3, 3, 16, 16))
    )

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)

    compiled = jax.jit(convolve, compiler_options=_ONEDNN_OPTIONS).lower(x, kernel).compile()
    return "__onednn$convolution" in (compiled.as_text() or "")
