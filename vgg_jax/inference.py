"""A network prepared for inference over and over: compiled, and on a CPU with its kernels transformed beforehand."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from vgg_jax.layers import compiler_options, with_filters
from vgg_jax.model import VGG


def compile_inference(model: VGG, variables: Mapping[str, Any], method: str | None = None, **settings: Any) -> Callable[..., Any]:
    """`model.apply(variables, images)` as a function of the images, the fastest way there is here.

    It is compiled anew for each shape. `method` and `settings` are those of `model.apply`: "score_map", or "features" with `layers`. On a
    CPU it holds four times the memory of the convolutions' kernels besides the variables.
    """
    run = jax.jit(functools.partial(model.apply, method=method, **settings), compiler_options=compiler_options(thorough=True))
    return functools.partial(run, with_filters(variables))
