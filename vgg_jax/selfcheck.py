"""Whether jax computes a tiny net rightly on the devices at hand. Releases of jax and of XLA have silently miscompiled some.

Forward and gradient, compiled as one program and op by op, against NumPy in float64, which knows nothing of jax.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.configs.models import Conv, VGGConfig
from vgg_jax.model import VGG
from vgg_jax.runtime.compiler import compiler_options

BOUND = 1e-4  # of the largest value; float32 has 1e-6 here
BFLOAT16_BOUND = 3e-2  # of the largest; bfloat16 has 1e-2 here
BROKEN_JAX_VERSIONS = {
    "0.10.2": "a product of a matrix and a vector, squared and summed, is wrong under jit on CPUs (jax issue 39103)"
}
WORKED_AROUND = {
    "0.12.0.1": "a pooling and three products behind it, in bfloat16, give NaN on CPUs"
}  # by `layers.FullyConnected`

NET = VGGConfig(((Conv(8),), (Conv(16), Conv(16))), fc=(16, 16))
SIZE, CLASSES = 16, 5


class CheckResult(NamedTuple):
    """How far a device is from NumPy, of the largest value."""

    device: str
    what: str  # "forward, compiled"
    difference: float
    bound: float = BOUND

    @property
    def passed(self) -> bool:
        return self.difference < self.bound  # not so for NaN


def run_checks(devices: list[jax.Device] | None = None) -> list[CheckResult]:
    """All that is compared, on each device (all local ones, by default)."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(4, SIZE, SIZE, 3)) * 50
    labels = rng.integers(CLASSES, size=4)
    model = VGG(NET, CLASSES, image_size=SIZE)
    shapes = jax.eval_shape(
        model.lazy_init, jax.random.key(0), jax.ShapeDtypeStruct(images.shape, jnp.float32)
    )["params"]
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape) * np.sqrt(2 / max(1, leaf.size // leaf.shape[-1])),
        shapes,
    )
    directions = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    matrix, vector = rng.normal(size=(300, 70)), rng.normal(size=70)

    def logits(params: Any, images: Any) -> Any:
        return model.apply({"params": params}, images)

    def narrow(params: Any, images: Any) -> Any:
        return model.clone(dtype=jnp.bfloat16).apply({"params": params}, images)

    def loss(params: Any, images: Any) -> Any:
        return -jnp.take_along_axis(
            jax.nn.log_softmax(logits(params, images)), jnp.asarray(labels)[:, None], 1
        ).mean()

    def slopes(params: Any, images: Any) -> Any:
        """The gradient's component along one direction for each parameter."""
        gradient = jax.grad(loss)(params, images)
        return jnp.stack(
            [
                jnp.vdot(g, jnp.asarray(d, g.dtype))
                for g, d in zip(*map(jax.tree.leaves, (gradient, directions)), strict=True)
            ]
        )

    def square(matrix: Any, vector: Any) -> Any:
        return ((matrix @ vector) ** 2).sum()

    expected: dict[str, tuple[Callable, tuple, Any]] = {
        "forward": (logits, (params, images), numpy_logits(params, images)),
        "forward in bfloat16": (narrow, (params, images), numpy_logits(params, images)),
        "gradient": (slopes, (params, images), numpy_slopes(params, directions, images, labels)),
        "square of a product": (square, (matrix, vector), ((matrix @ vector) ** 2).sum()),
    }
    found = []
    for device in jax.local_devices() if devices is None else devices:
        for what, (function, arguments, right) in expected.items():
            on_device = jax.device_put(jax.tree.map(np.float32, arguments), device)
            with jax.default_matmul_precision("highest"):
                ours = compiler_options(dtype=jnp.bfloat16 if function is narrow else jnp.float32)
                options = {} if function is square else ours  # as those had it who found it wrong
                compiled = jax.jit(function, compiler_options=options)(*on_device)
                with jax.disable_jit():
                    op_by_op = function(*on_device)
            for how, value in (("compiled", compiled), ("op by op", op_by_op)):
                difference = (
                    np.abs(np.asarray(value, np.float64) - right).max() / np.abs(right).max()
                )
                bound = BFLOAT16_BOUND if function is narrow else BOUND
                found.append(
                    CheckResult(
                        f"{device.platform}:{device.id}", f"{what}, {how}", float(difference), bound
                    )
                )
    return found


def numpy_logits(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    """The net of this check by its definition, float64."""
    for i, stage in enumerate(NET.stages, 1):
        for j in range(1, len(stage) + 1):
            layer = params[f"conv{i}_{j}"]
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            h, w = x.shape[1:3]
            x = sum(
                padded[:, a : a + h, b : b + w] @ layer["kernel"][a, b]
                for a in range(3)
                for b in range(3)
            )
            x = np.maximum(x + layer["bias"], 0)
        x = np.maximum.reduce([x[:, a::2, b::2] for a in (0, 1) for b in (0, 1)])
    x = x.reshape(len(x), -1)
    for name in ("fc6", "fc7", "fc8"):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = x if name == "fc8" else np.maximum(x, 0)
    return x


def numpy_slopes(
    params: Any, directions: Any, images: np.ndarray, labels: np.ndarray, step: float = 1e-6
) -> np.ndarray:
    """The loss's derivative along one direction for each parameter, by central differences."""

    def loss(leaves: list[np.ndarray]) -> float:
        logits = numpy_logits(jax.tree.unflatten(structure, leaves), images)
        shifted = logits - logits.max(1, keepdims=True)
        return float(
            np.mean(np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels])
        )

    leaves, structure = jax.tree.flatten(params)

    def slope(at: int, direction: np.ndarray) -> float:
        moved = [
            [*leaves[:at], leaves[at] + sign * step * direction, *leaves[at + 1 :]]
            for sign in (1, -1)
        ]
        return (loss(moved[0]) - loss(moved[1])) / (2 * step)

    return np.array(
        [slope(at, direction) for at, direction in enumerate(jax.tree.leaves(directions))]
    )


def known_fault() -> str:
    """What this release of jax is known to compute wrongly, or nothing."""
    return BROKEN_JAX_VERSIONS.get(jax.__version__, "")


def report(found: list[CheckResult]) -> str:
    """A line for each comparison, and at the end what to make of it."""
    lines = [
        f"{each.device:<8}{each.what:<32}{each.difference:>9.1e}{'' if each.passed else '  WRONG'}"
        for each in found
    ]
    if known_fault():
        lines.append(
            f"jax {jax.__version__} is known for this: {known_fault()}; install another release"
        )
    if jax.__version__ in WORKED_AROUND:
        lines.append(
            f"jax {jax.__version__} is known for this, which vgg_jax avoids: {WORKED_AROUND[jax.__version__]}"
        )
    if not all(each.passed for each in found):
        lines.append(
            f"jax {jax.__version__} computes wrongly here: install another release, and report this one to its developers"
        )
    elif not known_fault():
        lines.append(
            f"jax {jax.__version__} computes rightly here: all within {BOUND:.0e} of NumPy's float64, bfloat16 within {BFLOAT16_BOUND:.0e}"
        )
    return "\n".join(lines)
