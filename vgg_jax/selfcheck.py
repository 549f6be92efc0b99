"""A check that jax computes a tiny net correctly on the local devices.

Some releases of jax and of XLA have silently miscompiled one. The check compares the forward pass
and the gradient with NumPy in float64: once compiled as one program, and once op by op.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.configs.models import Conv, VGGConfig
from vgg_jax.model import VGG
from vgg_jax.ops.bfloat16 import choose_bfloat16_conv
from vgg_jax.runtime.compiler import compiler_options

# Allowed differences, relative to the largest value (docs/performance.md#self-check).
TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 3e-2

# Faults of jax, by release.
BROKEN_JAX_VERSIONS = {
    "0.10.2": "a product of a matrix and a vector, squared and summed, is wrong under jit on CPUs "
    "(jax issue 39103)"
}
# Faults that `vgg_jax.layers.FullyConnected` works around.
WORKED_AROUND = {
    "0.12.0.1": "a pooling followed by three matrix products gives NaN in bfloat16 on CPUs"
}

NET = VGGConfig(((Conv(8),), (Conv(16), Conv(16))), fc=(16, 16))
IMAGE_SIZE, NUM_CLASSES, BATCH_SIZE = 16, 5, 4


class Case(NamedTuple):
    """A function, its arguments, and the value that NumPy computes for them."""

    name: str
    function: Callable[..., jax.Array]
    arguments: tuple[Any, ...]  # pytrees of float64 arrays
    expected: np.ndarray
    compiler_options: dict[str, str | int | bool]
    tolerance: float


class CheckResult(NamedTuple):
    """The difference between a device and NumPy, relative to the largest value."""

    device: str  # "cpu:0"
    name: str  # "forward, compiled"
    difference: float
    tolerance: float = TOLERANCE

    @property
    def ok(self) -> bool:
        """False for NaN as well."""
        return self.difference < self.tolerance


def run_checks(devices: list[jax.Device] | None = None) -> list[CheckResult]:
    """Compares every case with NumPy, compiled and op by op.

    Args:
        devices: The devices to check; all local devices by default.

    Returns:
        Two results for each device and case.
    """
    cases = _build_cases()
    devices = jax.local_devices() if devices is None else devices
    return [result for device in devices for case in cases for result in _run_case(case, device)]


def _build_cases() -> list[Case]:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3)) * 50
    labels = rng.integers(NUM_CLASSES, size=BATCH_SIZE)
    model = VGG(NET, NUM_CLASSES, image_size=IMAGE_SIZE)
    shapes = jax.eval_shape(
        model.lazy_init, jax.random.key(0), jax.ShapeDtypeStruct(images.shape, jnp.float32)
    )["params"]

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        fan_in = max(1, leaf.size // leaf.shape[-1])
        return rng.normal(size=leaf.shape) * np.sqrt(2 / fan_in)

    params = jax.tree.map(draw, shapes)
    directions = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    matrix, vector = rng.normal(size=(300, 70)), rng.normal(size=70)

    def logits(params: Any, images: jax.Array) -> Any:
        return model.apply({"params": params}, images)

    def bfloat16_logits(params: Any, images: jax.Array) -> Any:
        return model.clone(dtype=jnp.bfloat16).apply({"params": params}, images)

    def loss(params: Any, images: jax.Array) -> jax.Array:
        log_posteriors = jax.nn.log_softmax(logits(params, images))
        return -jnp.take_along_axis(log_posteriors, jnp.asarray(labels)[:, None], 1).mean()

    def directional_derivatives(params: Any, images: jax.Array) -> jax.Array:
        """The gradient's component along one direction for each parameter."""
        gradients = jax.tree.leaves(jax.grad(loss)(params, images))
        pairs = zip(gradients, jax.tree.leaves(directions), strict=True)
        return jnp.stack([jnp.vdot(g, jnp.asarray(d, g.dtype)) for g, d in pairs])

    def square(matrix: jax.Array, vector: jax.Array) -> jax.Array:
        return ((matrix @ vector) ** 2).sum()

    inputs, expected_logits = (params, images), numpy_logits(params, images)
    expected_derivatives = numpy_directional_derivatives(params, directions, images, labels)
    expected_square = np.asarray(((matrix @ vector) ** 2).sum())
    float32, bfloat16 = compiler_options(), compiler_options(dtype=jnp.bfloat16)
    return [
        Case("forward", logits, inputs, expected_logits, float32, TOLERANCE),
        Case(
            "forward in bfloat16",
            bfloat16_logits,
            inputs,
            expected_logits,
            bfloat16,
            BFLOAT16_TOLERANCE,
        ),
        Case("gradient", directional_derivatives, inputs, expected_derivatives, float32, TOLERANCE),
        # The fault was reported for jax's own options.
        Case("square of a product", square, (matrix, vector), expected_square, {}, TOLERANCE),
    ]


def _run_case(case: Case, device: jax.Device) -> list[CheckResult]:
    arguments = jax.device_put(jax.tree.map(np.float32, case.arguments), device)
    with jax.default_matmul_precision("highest"):
        function = jax.jit(case.function, compiler_options=case.compiler_options)
        values = {"compiled": function(*arguments)}
        with jax.disable_jit():
            values["op by op"] = case.function(*arguments)
    results = []
    for mode, value in values.items():
        error = np.abs(np.asarray(value, np.float64) - case.expected).max()
        results.append(
            CheckResult(
                f"{device.platform}:{device.id}",
                f"{case.name}, {mode}",
                float(error / np.abs(case.expected).max()),
                case.tolerance,
            )
        )
    return results


def numpy_logits(params: Mapping[str, Any], images: np.ndarray) -> np.ndarray:
    """Computes the logits of `NET` from its definition.

    Args:
        params: Kernels and biases by layer, float64.
        images: Images (N, H, W, 3), float64.

    Returns:
        Logits (N, K), float64.
    """
    x = images
    for i, stage in enumerate(NET.stages, 1):
        for j in range(1, len(stage) + 1):
            layer = params[f"conv{i}_{j}"]
            padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            h, w = x.shape[1:3]
            x = sum(
                padded[:, dy : dy + h, dx : dx + w] @ layer["kernel"][dy, dx]
                for dy in range(3)
                for dx in range(3)
            )
            x = np.maximum(x + layer["bias"], 0)
        x = np.maximum.reduce([x[:, dy::2, dx::2] for dy in (0, 1) for dx in (0, 1)])
    x = x.reshape(len(x), -1)
    for name in ("fc6", "fc7", "fc8"):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = x if name == "fc8" else np.maximum(x, 0)
    return x


def numpy_directional_derivatives(
    params: Any, directions: Any, images: np.ndarray, labels: np.ndarray, step: float = 1e-6
) -> np.ndarray:
    """Differentiates the loss along one direction for each parameter, by central differences.

    Args:
        params: Kernels and biases by layer, float64.
        directions: A direction for each of them, of the same shape.
        images: Images (N, H, W, 3), float64.
        labels: Class indices (N,).
        step: Distance from the parameters to each of the two points.

    Returns:
        A derivative for each leaf of `params`, float64.
    """

    def loss(leaves: list[np.ndarray]) -> float:
        logits = numpy_logits(jax.tree.unflatten(structure, leaves), images)
        shifted = logits - logits.max(1, keepdims=True)
        return float(
            np.mean(np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(labels)), labels])
        )

    leaves, structure = jax.tree.flatten(params)

    def derivative(index: int, direction: np.ndarray) -> float:
        upper, lower = list(leaves), list(leaves)
        upper[index] = leaves[index] + step * direction
        lower[index] = leaves[index] - step * direction
        return (loss(upper) - loss(lower)) / (2 * step)

    return np.array([derivative(i, d) for i, d in enumerate(jax.tree.leaves(directions))])


def known_fault() -> str:
    """Describes the known fault of this release of jax; empty if there is none."""
    return BROKEN_JAX_VERSIONS.get(jax.__version__, "")


def describe_bfloat16() -> str:
    """Describes in one line how the CPU convolves bfloat16; empty on an accelerator."""
    return choose_bfloat16_conv().describe() if jax.default_backend() == "cpu" else ""


def report(results: list[CheckResult]) -> str:
    """Formats the results, one line each, and ends with a conclusion.

    Args:
        results: The results of `run_checks`.

    Returns:
        The lines to print.
    """
    lines = [
        f"{result.device:<8}{result.name:<32}{result.difference:>9.1e}"
        f"{'' if result.ok else '  WRONG'}"
        for result in results
    ]
    release, fault = f"jax {jax.__version__}", known_fault()
    if fault:
        lines.append(f"{release} has a known fault: {fault}; install another release")
    if jax.__version__ in WORKED_AROUND:
        avoided = WORKED_AROUND[jax.__version__]
        lines.append(f"{release} has a known fault that vgg_jax works around: {avoided}")
    if not all(result.ok for result in results):
        lines.append(
            f"{release} computes incorrectly on these devices: install another release, "
            "and report this one to its developers"
        )
    elif not fault:
        lines.append(
            f"{release} computes correctly on these devices: all within {TOLERANCE:.0e} of NumPy's "
            f"float64, bfloat16 within {BFLOAT16_TOLERANCE:.0e}"
        )
    return "\n".join(lines)
