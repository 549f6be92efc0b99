"""Where arrays lie: a mesh of the devices of all processes, with the axes "data" and "model".

Examples are spread over "data". Parameters are everywhere, or `MODEL_PARALLEL_SPECS` over "model" (Krizhevsky, arXiv 1404.5997), or with `fsdp` over
"data".
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vgg_jax.configs.train import ALLREDUCE_DTYPES
from vgg_jax.errors import InputError

DATA, MODEL = "data", "model"

# fc6 by what it gives, fc7 by what it reads: between the two nothing is exchanged, and behind fc7 a sum of (N, width). Convolutions have a
# tenth of the parameters and nine tenths of the work: "model" repeats them, so it is for memory and for slow networks, see the README.
MODEL_PARALLEL_SPECS = {
    "fc6/kernel": PartitionSpec(None, MODEL),
    "fc6/bias": PartitionSpec(MODEL),
    "fc7/kernel": PartitionSpec(MODEL, None),
}
FSDP_MIN_BYTES = 4_000_000  # bytes of an array that `fsdp` spreads: of smaller ones the exchange costs more than the memory is worth


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How a run is spread over its devices. It changes results by rounding alone, and from one part of a run to the next it may change.

    Raises InputError for what no run can have.
    """

    data: int | None = (
        None  # groups of devices that share the examples; None: all devices, divided by `model`
    )
    model: int = 1  # devices of such a group, which share fc6 and fc7
    fsdp: bool = (
        False  # parameters and momentum are spread over "data", and put together for each step
    )
    reduce: str = "float32"  # "bfloat16": gradients are added up in half the bytes

    def __post_init__(self) -> None:
        for name in ("data", "model"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"mesh has {name}={value}: expected at least 1")
        if self.reduce not in ALLREDUCE_DTYPES:
            raise InputError(
                f"reduce is {self.reduce!r}: expected one of {', '.join(ALLREDUCE_DTYPES)}"
            )


DATA_PARALLEL = MeshConfig()


def make_mesh(
    examples: int, devices: list[jax.Device] | None = None, layout: MeshConfig = DATA_PARALLEL
) -> Mesh:
    """A mesh of the devices (all of all processes, by default).

    Raises InputError where they are not as many as the layout says, or where its groups do not share so many examples evenly.
    """
    devices = jax.devices() if devices is None else devices
    data = layout.data or len(devices) // layout.model
    if data * layout.model != len(devices):
        raise InputError(
            f"the mesh is data={data}, model={layout.model}, of {data * layout.model} devices: expected all of the {len(devices)} there "
            "are; pass another --mesh"
        )
    if examples % data:
        raise InputError(
            f"{examples} examples are computed at once: expected a multiple of the {data} devices that share them; "
            "pass another --batch-size or --microbatch"
        )
    if (
        layout.reduce == "bfloat16" and layout.model > 1 and devices[0].platform == "cpu"
    ):  # jaxlib 0.10.1 to 0.12.0.1 abort on it
        raise InputError(
            "reduce is 'bfloat16' and the mesh has a model axis: on CPUs expected one of the two alone"
        )
    # Explicit axes, the default since jax 0.9, are refused by linen's Conv.
    return jax.make_mesh(
        (data, layout.model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def infer_shardings(arrays: Any, mesh: Mesh, layout: MeshConfig) -> Any:
    """Where each array of a tree lies that holds parameters by their names, such as a whole training state (arrays, or their shapes).

    Raises InputError for a width that "model" does not divide.
    """

    def sharding(path: tuple, array: Any) -> NamedSharding:
        return NamedSharding(
            mesh,
            _spec(
                "/".join(str(getattr(key, "key", key)) for key in path[-2:]), array, mesh, layout
            ),
        )

    return jax.tree_util.tree_map_with_path(sharding, arrays)


def _spec(name: str, array: Any, mesh: Mesh, layout: MeshConfig) -> PartitionSpec:
    axes = [*MODEL_PARALLEL_SPECS.get(name, ())] if mesh.shape[MODEL] > 1 else []
    axes += [None] * (array.ndim - len(axes))
    for size, axis in zip(array.shape, axes, strict=True):
        if axis == MODEL and size % mesh.shape[MODEL]:
            raise InputError(
                f"{name} is {array.shape}, and the mesh has model={mesh.shape[MODEL]}: expected a divisor of {size}; pass another --mesh"
            )
    if (
        layout.fsdp
        and mesh.shape[DATA] > 1
        and math.prod(array.shape) * array.dtype.itemsize > FSDP_MIN_BYTES
    ):
        free = [
            i
            for i, axis in enumerate(axes)
            if axis is None and array.shape[i] % mesh.shape[DATA] == 0
        ]
        if free:
            axes[max(free, key=lambda i: array.shape[i])] = DATA
    return PartitionSpec(*axes)


def data_axis_spec(sharding: NamedSharding) -> PartitionSpec:
    """What of a sharding is about "data"."""
    return PartitionSpec(*(axis if axis == DATA else None for axis in sharding.spec))


def put_global(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """A whole array, equal in all processes, on the devices: each process puts there what its devices hold."""
    array = np.asarray(array)
    # A copy, since on a CPU a device may use the memory of the array itself, which a step then reuses for its result.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index].copy())


def to_host(array: jax.Array, wanted: bool = True) -> np.ndarray | None:
    """An array as one piece of host memory of its own. All processes ask for it together, those that do not want it too: they get None."""
    if not array.is_fully_addressable and not array.is_fully_replicated:
        assert isinstance(array.sharding, NamedSharding) and isinstance(array.sharding.mesh, Mesh)
        array = _put_together(array.sharding.mesh)(array)
    return (
        np.array(array if array.is_fully_addressable else array.addressable_data(0))
        if wanted
        else None
    )


@functools.cache
def _put_together(mesh: Mesh) -> jax.stages.Wrapped:
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """int (n,): which rows of a batch of `size` this process feeds, rising. Where a model axis crosses processes, several feed the same."""
    rows = np.arange(size)
    parts = (
        NamedSharding(mesh, PartitionSpec(DATA)).addressable_devices_indices_map((size,)).values()
    )
    return np.unique(np.concatenate([rows[part] for part in parts if part is not None]))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """What this process has of a batch, its `local_rows`, on its devices, as a part of the whole."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    groups = len(local_rows(mesh, mesh.shape[DATA]))

    def put(array: np.ndarray) -> jax.Array:
        size = len(array) * mesh.shape[DATA] // groups
        rows = local_rows(mesh, size)

        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(size)
            at = int(np.searchsorted(rows, first))
            return array[at : at + last - first]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, part)

    return {name: put(array) for name, array in batch.items()}
