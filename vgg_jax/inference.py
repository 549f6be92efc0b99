"""Repeated inference: a compiled net, on a CPU with kernels laid out in advance."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vgg_jax.model import VGG, check_net
from vgg_jax.ops import winograd
from vgg_jax.ops.bfloat16 import choose_bfloat16_conv
from vgg_jax.ops.xla import MAX_IMAGE_CHANNELS
from vgg_jax.runtime.compiler import compiler_options

# Images for which a program that compiles quickly is worth its slower run
# (docs/performance.md#first-answer).
MAX_QUICK_IMAGES = 2


def fastest_model(model: VGG) -> VGG:
    """Sets the type in which this device infers fastest.

    A 16-bit net computes in float32 on a CPU unless oneDNN convolves its bfloat16 faster
    (`vgg_jax.ops.bfloat16`). That is more accurate, too.

    Args:
        model: The net.

    Returns:
        The net, with a `dtype` of at least its own precision, and without `quick_compile`.
    """
    model = model.clone(quick_compile=False)
    if jax.default_backend() != "cpu" or _convolves_in_onednn(model.dtype):
        return model
    return model.clone(dtype=jnp.promote_types(model.dtype, jnp.float32))


def quick_model(model: VGG) -> VGG:
    """Sets the convolutions that compile soonest on this device, for a net that is applied once.

    Args:
        model: The net.

    Returns:
        The net. On a CPU, its convolutions are XLA's, but not in 16 bits, where XLA's are slow.
    """
    is_quick = jax.default_backend() == "cpu" and jnp.finfo(model.dtype).bits >= 32
    return model.clone(quick_compile=is_quick)


def _convolves_in_onednn(dtype: Any) -> bool:
    return dtype == jnp.bfloat16 and choose_bfloat16_conv().inference_in_onednn


def pack_kernels(
    variables: Mapping[str, Any], dtype: Any = jnp.float32, kinds: tuple[str, ...] = ("conv", "fc")
) -> dict[str, Any]:
    """Adds a copy of the kernels in the layout that inference on a CPU reads fastest.

    3x3 kernels become Winograd filters, which take four times the memory. They are left out if
    oneDNN convolves bfloat16. Kernels of fully connected layers are transposed
    (docs/performance.md#packed-kernels).

    Args:
        variables: Variables of a net.
        dtype: Type in which the net computes.
        kinds: Prefixes of the names of the layers to pack.

    Returns:
        The variables, on a CPU with the collection "packed": an array for each layer name.
    """
    if jax.default_backend() != "cpu":
        return dict(variables)
    use_winograd = not _convolves_in_onednn(dtype)

    def should_pack(kernel: jax.Array) -> bool:
        return kernel.ndim == 2 or (
            use_winograd and kernel.shape[0] == 3 and kernel.shape[2] > MAX_IMAGE_CHANNELS
        )

    kernels = {
        name: layer["kernel"]
        for name, layer in variables["params"].items()
        if name.startswith(kinds) and should_pack(layer["kernel"])
    }
    return {**variables, "packed": _pack(kernels, dtype)}


@functools.partial(jax.jit, static_argnames="dtype")
def _pack(kernels: dict[str, jax.Array], dtype: Any) -> dict[str, jax.Array]:
    def pack(kernel: jax.Array) -> jax.Array:
        if kernel.ndim == 2:
            return kernel.T.astype(dtype)
        kernel = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
        return winograd.transform_filters(kernel)

    return {name: pack(kernel) for name, kernel in kernels.items()}


def compile_inference(
    model: VGG, variables: Mapping[str, Any], method: str | None = None, **settings: Any
) -> Callable[..., Any]:
    """Makes the fastest function for `model.apply(variables, images)` on this device.

    The function holds the kernels in the type in which the net computes, and on a CPU a packed copy
    of them (`pack_kernels`). If oneDNN convolves, its kernels are constants of the compiled program
    instead. A 16-bit net computes in float32 on a CPU where that is faster (`fastest_model`). The
    result still has the type of the net.

    Args:
        model: The net.
        variables: Its variables. NumPy arrays must not be changed in place afterwards, because jax
            may use their memory.
        method: Method of the net, such as "score_map" or "features"; by default logits.
        **settings: Further arguments of the method, such as `layers` of "features".

    Returns:
        A function from images (N, H, W, in_channels), as the net reads them
        (`vgg_jax.preprocess`), to the result. It compiles once for each shape of images, with
        options of its own: it cannot be called inside `jax.jit`.

    Raises:
        InputError: The arguments are not a net and its variables.
    """
    check_net(model, variables)
    compute_model = fastest_model(model)
    constants: dict[str, Any] = {}

    def run(variables: Any, images: jax.Array) -> Any:
        variables = {**variables, "params": {**variables["params"], **constants}}
        outputs = compute_model.apply(variables, images, method=method, **settings)
        return jax.tree.map(lambda x: x.astype(jnp.result_type(model.dtype)), outputs)

    variables = pack_kernels(variables, compute_model.dtype)
    # Cast the parameters of convolutions and FC layers once, instead of at each call.
    params = {
        name: {leaf: jnp.asarray(value, compute_model.dtype) for leaf, value in layer.items()}
        if "kernel" in layer
        else layer
        for name, layer in variables["params"].items()
    }
    if _convolves_in_onednn(compute_model.dtype):
        # XLA lets oneDNN lay out kernels when it compiles if they are constants, and else at each
        # call (docs/performance.md#packed-kernels).
        constants |= {name: params.pop(name) for name in list(params) if name.startswith("conv")}
    options = compiler_options(optimize_runtime=True, dtype=compute_model.dtype)
    jitted = jax.jit(run, compiler_options=options)
    return functools.partial(jitted, {**variables, "params": params})
