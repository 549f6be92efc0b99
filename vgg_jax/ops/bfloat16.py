"""The way in which a CPU convolves bfloat16: in oneDNN, or in float32, whichever is faster.

CPUs differ: AMX makes oneDNN many times faster than float32, and other instructions for bfloat16 do
not (docs/performance.md#onednn-and-bfloat16). So one convolution is timed in each way. The times
are kept in the folder of compiled programs, unless other programs use all cores.

Several processes of a run measure nothing, because they must compile the same program. They use
oneDNN on a CPU with AMX, and float32 on others.

The environment variable VGG_JAX_BFLOAT16 replaces the choice: "onednn", wherever XLA has it, or
"float32".
"""

import functools
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np

from vgg_jax.errors import InputError, single_line
from vgg_jax.ops import winograd
from vgg_jax.ops.xla import xla_conv
from vgg_jax.runtime.compilation_cache import programs_folder
from vgg_jax.runtime.compiler import compiler_options, has_onednn_bfloat16

VARIABLE = "VGG_JAX_BFLOAT16"

# A map and channels between those of the first and of the last layers of a VGG.
_SHAPE = (2, 28, 28, 256)
_ROUNDS = 8
# oneDNN must be this many times as fast. Other programs disturb the times, and float32 is more
# accurate (docs/performance.md#onednn-and-bfloat16).
_MIN_SPEEDUP = 1.25
_CPU_FIELDS = ("model name", "flags", "Features", "CPU implementer", "CPU part")


class ConvTimes(NamedTuple):
    """Seconds of one 3x3 convolution in each way."""

    onednn: float  # in bfloat16; the kernel is laid out at each call
    packed: float  # in float32, with the kernel transformed in advance
    unpacked: float  # in float32, with the transform of the kernel


class Choice(NamedTuple):
    """The ways of convolving bfloat16, and the reason for them."""

    inference_in_onednn: bool
    training_in_onednn: bool
    reason: str

    def describe(self) -> str:
        """Returns one line: "bfloat16 convolutions: oneDNN (reason)"."""
        inference, training = ("oneDNN" if onednn else "float32" for onednn in self[:2])
        ways = inference
        if inference != training:
            ways = f"{inference} for inference, {training} for training"
        return f"bfloat16 convolutions: {ways} ({self.reason})"


@functools.cache
def choose_bfloat16_conv() -> Choice:
    """Chooses how the default backend convolves bfloat16, once in a process.

    Returns:
        The choice. It is float32 wherever `has_onednn_bfloat16()` is false.

    Raises:
        InputError: VGG_JAX_BFLOAT16 has another value than "onednn" and "float32".
    """
    setting = os.environ.get(VARIABLE, "")
    if setting not in ("", "onednn", "float32"):
        raise InputError(
            f"{VARIABLE} is {setting!r}: expected 'onednn' or 'float32'; correct or unset it"
        )
    if not has_onednn_bfloat16():
        return _same_for_both(False, "XLA has no bfloat16 convolution in oneDNN here")
    if setting:
        return _same_for_both(setting == "onednn", f"{VARIABLE} is {setting!r}")
    if jax.process_count() > 1:
        has_amx = "amx_bf16" in _describe_cpu().split()
        amx = "with AMX" if has_amx else "without AMX"
        return _same_for_both(has_amx, f"several processes, CPU {amx}")
    times, place = _read_or_measure()
    # The transform of the kernel can only add time. A shorter time with it is noise.
    slowest_float32 = max(times.packed, times.unpacked)
    return Choice(
        _MIN_SPEEDUP * times.onednn < times.packed,
        _MIN_SPEEDUP * times.onednn < slowest_float32,
        f"oneDNN {times.onednn * 1e3:.1f} ms; float32 {times.packed * 1e3:.1f} ms in inference, "
        f"{times.unpacked * 1e3:.1f} ms in training; {place}",
    )


def _same_for_both(in_onednn: bool, reason: str) -> Choice:
    return Choice(in_onednn, in_onednn, reason)


def _read_or_measure() -> tuple[ConvTimes, str]:
    """Reads the times that an earlier process measured here, or measures and writes them.

    Returns:
        The times, and where they are kept.
    """
    folder = programs_folder()
    conditions = _conditions()
    digest = hashlib.sha256(json.dumps(conditions).encode()).hexdigest()[:12]
    file = Path(folder, f"bfloat16-{digest}.json")
    if (times := _read(file)) is not None:
        return times, f"measured before, {file}"
    # A new thread is outside of the caller's trace, mesh, precision and device.
    with ThreadPoolExecutor(1) as pool:
        times = pool.submit(_measure).result()
    if "://" in folder:
        return times, f"measured, and not kept in {folder}"
    if _is_busy():
        return times, "measured while other programs ran, and not kept"
    try:
        _write(file, {"seconds": times._asdict(), **conditions})
    except OSError as error:
        return times, f"measured, and not kept in {folder}: {single_line(error.strerror or error)}"
    return times, f"measured, {file}"


def _is_busy() -> bool:
    """Tells if more threads wanted to run in the last minute than this process has cores."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > _count_threads()


def _conditions() -> dict[str, str | int]:
    """The things that the times depend on."""
    return {
        "jaxlib": jaxlib.version.__version__,
        "threads": _count_threads(),
        "cpu": _describe_cpu(),
    }


def _count_threads() -> int:
    """The number of cores that this process may use."""
    can_count = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if can_count else os.cpu_count() or 1


def _describe_cpu() -> str:
    """The model and the instructions of the first core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return " ".join(
        line.partition(":")[2].strip() for line in lines if line.startswith(_CPU_FIELDS)
    )


def _read(file: Path) -> ConvTimes | None:
    """Reads times; None if there are none, or no valid ones."""
    try:
        times = ConvTimes(**json.loads(file.read_text())["seconds"])
        is_valid = all(math.isfinite(seconds) and seconds > 0 for seconds in times)
    except (OSError, ValueError, TypeError, LookupError):
        return None
    return times if is_valid else None


def _write(file: Path, content: dict[str, Any]) -> None:
    """Replaces a file in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(file)


def _measure() -> ConvTimes:
    """Times a convolution in each way, as programs of inference and training compile it."""
    rng = np.random.default_rng(0)
    channels = _SHAPE[-1]
    x, kernel, filters = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in (_SHAPE, (3, 3, channels, channels), (36, channels, channels))
    )
    x16, kernel16 = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    bfloat16 = compiler_options(dtype=jnp.bfloat16)
    float32 = compiler_options(optimize_runtime=True)

    def convolve_unpacked(x: jax.Array, kernel: jax.Array) -> jax.Array:
        filters = winograd.transform_filters(kernel.astype(jnp.float32))
        y: jax.Array = winograd.convolve(x, filters)
        return y.astype(x.dtype)

    onednn = jax.jit(xla_conv, compiler_options=bfloat16)
    packed = jax.jit(winograd.convolve, compiler_options=float32)
    unpacked = jax.jit(convolve_unpacked, compiler_options=bfloat16)
    return ConvTimes(
        *_shortest_times(
            [
                lambda: jax.block_until_ready(onednn(x16, kernel16)),
                lambda: jax.block_until_ready(packed(x, filters)),
                lambda: jax.block_until_ready(unpacked(x16, kernel16)),
            ]
        )
    )


def _shortest_times(
    functions: Sequence[Callable[[], Any]], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """The shortest time of each function, called in turn.

    Compilation slows down the first call, and other programs slow down some calls.
    """
    rounds = []
    for _ in range(_ROUNDS):
        seconds = []
        for function in functions:
            start = clock()
            function()
            seconds.append(clock() - start)
        rounds.append(seconds)
    return [min(times) for times in zip(*rounds, strict=True)]
