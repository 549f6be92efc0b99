"""A network prepared for inference over and over: compiled, and on a CPU with its kernels laid out beforehand."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vgg_jax.model import VGG
from vgg_jax.ops import winograd
from vgg_jax.ops.convolution import MAX_IMAGE_CHANNELS
from vgg_jax.runtime.compiler import compiler_options, has_onednn_bfloat16


def pack_kernels(
    variables: Mapping[str, Any], dtype: Any = jnp.float32, kinds: tuple[str, ...] = ("conv", "fc")
) -> dict[str, Any]:
    """The variables of a net with its kernels besides as the CPU's layers want them, for inference over and over in `dtype`.

    3x3 kernels are transformed: four times their memory, a fifth less time (dense evaluation with net A, 2-core x86); not where the CPU
    convolves bfloat16. Those of FC layers are turned, as large again: see `FullyConnected`. On an accelerator there are none.
    """
    if jax.default_backend() != "cpu":
        return dict(variables)
    transforms = not (dtype == jnp.bfloat16 and has_onednn_bfloat16())
    kernels = {
        name: layer["kernel"]
        for name, layer in variables["params"].items()
        if name.startswith(kinds)
    }

    def gains(kernel: jax.Array) -> bool:
        return kernel.ndim == 2 or (
            transforms and kernel.shape[0] == 3 and kernel.shape[2] > MAX_IMAGE_CHANNELS
        )

    return {
        **variables,
        "packed": _prepared(
            {name: kernel for name, kernel in kernels.items() if gains(kernel)}, dtype
        ),
    }


@functools.partial(jax.jit, static_argnames="dtype")
def _prepared(kernels: dict[str, jax.Array], dtype: Any) -> dict[str, jax.Array]:
    def prepared(kernel: jax.Array) -> jax.Array:
        if kernel.ndim == 2:
            return kernel.T.astype(dtype)
        return winograd.transform_filters(
            kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        )

    return {name: prepared(kernel) for name, kernel in kernels.items()}


def compile_inference(
    model: VGG, variables: Mapping[str, Any], method: str | None = None, **settings: Any
) -> Callable[..., Any]:
    """`model.apply(variables, images)` as a function of the images, the fastest way there is here.

    It is compiled anew for each shape. `method` and `settings` are those of `model.apply`: "score_map", or "features" with `layers`. It
    holds the kernels in the type that it computes in, if that is not theirs, and on a CPU what `pack_kernels` makes of them besides. On a
    CPU without instructions for bfloat16, and with jaxlib before 0.12, a bfloat16 net is computed in float32, which is faster there and
    more exact; what comes out is bfloat16.
    """
    net = model
    if jax.default_backend() == "cpu" and not (
        model.dtype == jnp.bfloat16 and has_onednn_bfloat16()
    ):
        net = model.clone(dtype=jnp.promote_types(model.dtype, jnp.float32))

    def run(variables: Any, images: jax.Array) -> Any:
        found = net.apply(variables, images, method=method, **settings)
        return jax.tree.map(lambda x: x.astype(jnp.result_type(model.dtype)), found)

    variables = pack_kernels(variables, net.dtype)
    # Convolutions and FC layers in the type that they compute in: cast here, they need not be at each call.
    params = {
        name: {leaf: jnp.asarray(value, net.dtype) for leaf, value in layer.items()}
        if "kernel" in layer
        else layer
        for name, layer in variables["params"].items()
    }
    return functools.partial(
        jax.jit(run, compiler_options=compiler_options(optimize_runtime=True, dtype=net.dtype)),
        {**variables, "params": params},
    )
