"""A network prepared for inference over and over: compiled, and on a CPU with its kernels transformed beforehand."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vgg_jax.layers import compiler_options, convolves_bfloat16, with_filters
from vgg_jax.model import VGG


def compile_inference(model: VGG, variables: Mapping[str, Any], method: str | None = None, **settings: Any) -> Callable[..., Any]:
    """`model.apply(variables, images)` as a function of the images, the fastest way there is here.

    It is compiled anew for each shape. `method` and `settings` are those of `model.apply`: "score_map", or "features" with `layers`. It
    holds the kernels in the type that it computes in, if that is not theirs, and on a CPU in float32 four times the 3x3 ones besides. On a
    CPU without instructions for bfloat16, and with jaxlib before 0.12, a bfloat16 net is computed in float32, which is faster there and
    more exact; what comes out is bfloat16.
    """
    net = model
    if jax.default_backend() == "cpu" and not (model.dtype == jnp.bfloat16 and convolves_bfloat16()):
        net = model.clone(dtype=jnp.promote_types(model.dtype, jnp.float32))

    def run(variables: Any, images: jax.Array) -> Any:
        found = net.apply(variables, images, method=method, **settings)
        return jax.tree.map(lambda x: x.astype(jnp.result_type(model.dtype)), found)

    variables = with_filters(variables, net.dtype)
    # Convolutions and FC layers in the type that they compute in: cast here, they need not be at each call.
    params = {
        name: {leaf: jnp.asarray(value, net.dtype) for leaf, value in layer.items()} if "kernel" in layer else layer
        for name, layer in variables["params"].items()
    }
    return functools.partial(
        jax.jit(run, compiler_options=compiler_options(thorough=True, dtype=net.dtype)), {**variables, "params": params}
    )
