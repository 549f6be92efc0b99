"""Stacks of 3x3 convolutions, and one large one: sizes, fields and times."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vgg_jax import VGG, Conv, VGGConfig
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.summary import summarize

# Kernel sizes of the layers of each stack: small kernels, then the large one of the same field.
PAIRS = {
    "two 3x3, one 5x5": ((3, 3), (5,)),
    "three 3x3, one 7x7": ((3, 3, 3), (7,)),
}


class Stack:
    """Convolutions with C channels, each with a ReLU, as a part of a net in this package."""

    def __init__(self, kernel_sizes: tuple[int, ...], channels: int, side: int) -> None:
        config = VGGConfig((tuple(Conv(channels, size) for size in kernel_sizes),))
        self._model = VGG(config, in_channels=channels, image_size=side, initializer="glorot")
        self._last = f"relu1_{len(kernel_sizes)}"
        self._layers = summarize(config, image_size=side, in_channels=channels, top=False)
        image = self._model.one_image()
        self.params = jax.jit(
            lambda key: self._model.lazy_init(key, image, (self._last,), method="features")
        )(jax.random.key(0))["params"]

    @property
    def counts(self) -> dict[str, int]:
        """Parameters, and multiply-adds for one image."""
        return {
            "params": sum(layer.params for layer in self._layers),
            "macs": sum(layer.macs for layer in self._layers),
        }

    def forward(self, params: Any, x: jax.Array) -> jax.Array:
        """(N, h, w, C) -> (N, h, w, C)."""
        outputs: Any = self._model.apply(
            {"params": params}, x, layers=(self._last,), method="features"
        )
        return outputs[self._last]

    def gradients(self, params: Any, x: jax.Array) -> Any:
        """The gradients of the summed output, of the parameters and of the input."""
        return jax.grad(lambda *operands: self.forward(*operands).sum(), (0, 1))(params, x)


def measure_field(stack: Stack, channels: int, side: int) -> dict[str, int]:
    """Measures which input pixels have a gradient of the output pixel in the middle.

    Returns:
        The height and width of their bounding box, and the number of these pixels.
    """
    # Several images, since a ReLU that is 0 hides a path.
    x = jax.random.normal(jax.random.key(1), (8, side, side, channels))
    middle = side // 2

    def pixel(x: jax.Array) -> jax.Array:
        return stack.forward(stack.params, x)[:, middle, middle].sum()

    gradient = jax.jit(jax.grad(pixel), compiler_options=compiler_options())(x)
    # Winograd's tiles spread rounding errors over zeros.
    sizes = np.abs(np.asarray(gradient)).max((0, 3))
    rows, columns = np.nonzero(sizes > 1e-5 * sizes.max())
    return {
        "height": int(np.ptp(rows)) + 1,
        "width": int(np.ptp(columns)) + 1,
        "pixels": len(rows),
    }


def time_in_turn(functions: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Times warm calls in turn. Every second round has the opposite order.

    Returns:
        The seconds of each function, in the order of the rounds.
    """
    seconds: list[list[float]] = [[] for _ in functions]
    for function in functions:
        jax.block_until_ready(function())
    for number in range(rounds):
        order = range(len(functions))
        for i in order if number % 2 == 0 else reversed(order):
            started = time.perf_counter()
            jax.block_until_ready(functions[i]())
            seconds[i].append(time.perf_counter() - started)
    return seconds


def compare_layers(
    pair: str, channels: int, side: int, batch_size: int, rounds: int
) -> dict[str, Any]:
    """Measures the two stacks of a pair.

    Args:
        pair: Key of `PAIRS`.
        channels: Channels C of all maps.
        side: Height and width of the maps.
        batch_size: Images of a timed call.
        rounds: Number of timed calls.

    Returns:
        The measurements of each stack by its name, and the ratios of the large kernel's values to
        those of the small ones.
    """
    stacks = [Stack(sizes, channels, side) for sizes in PAIRS[pair]]
    x = jax.random.normal(jax.random.key(0), (batch_size, side, side, channels))
    results: list[dict[str, Any]] = [
        stack.counts | {"receptive_field": measure_field(stack, channels, side)} for stack in stacks
    ]
    for name in ("forward", "gradients"):
        functions = []
        for stack in stacks:
            jitted = jax.jit(getattr(stack, name), compiler_options=compiler_options())
            functions.append(lambda f=jitted, params=stack.params: f(params, x))
        for result, seconds in zip(results, time_in_turn(functions, rounds), strict=True):
            result[f"{name}_seconds"] = statistics.median(seconds)
            result[f"{name}_all_seconds"] = seconds
    small, large = results
    numbers = ("params", "macs", "forward_seconds", "gradients_seconds")
    return {
        **dict(zip(pair.split(", "), results, strict=True)),
        "ratios": {name: large[name] / small[name] for name in numbers},
    }
