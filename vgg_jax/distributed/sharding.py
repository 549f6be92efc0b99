"""Shardings: a mesh of the devices of all processes, with the axes "data" and "model".

The examples of a batch are sharded over "data". The parameters are replicated by default.
`MODEL_PARALLEL_SPECS` shard some of them over "model" (Krizhevsky, arXiv 1404.5997), and `fsdp`
shards the large ones over "data".
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

# fc6 is sharded by its outputs and fc7 by its inputs. So nothing is exchanged between the two, and
# after fc7 one sum of shape (N, features). Convolutions have a tenth of the parameters and nine
# tenths of the work. The devices along "model" repeat them, so the axis saves memory and
# communication, not time.
MODEL_PARALLEL_SPECS = {
    "fc6/kernel": PartitionSpec(None, MODEL),
    "fc6/bias": PartitionSpec(MODEL),
    "fc7/kernel": PartitionSpec(MODEL, None),
}
# `fsdp` shards larger arrays only. They hold nearly all parameters (docs/performance.md#fsdp).
FSDP_MIN_BYTES = 4_000_000


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The parallelism of a run. It changes results by rounding only, and may change on resuming.

    Attributes:
        data: Groups of devices that share the examples. None: all devices, divided by `model`.
        model: Devices in such a group. They share fc6 and fc7.
        fsdp: Parameters and momentum are sharded over "data", and gathered for each step.
        reduce: The dtype in which gradients are summed. "bfloat16" halves the communication.

    Raises:
        InputError: A value is invalid for every run.
    """

    data: int | None = None
    model: int = 1
    fsdp: bool = False
    reduce: str = "float32"

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
    examples: int, devices: list[jax.Device] | None = None, mesh_config: MeshConfig = DATA_PARALLEL
) -> Mesh:
    """Creates the mesh of a run.

    Args:
        examples: The number of examples that are computed at once.
        devices: The devices. By default all devices of all processes.
        mesh_config: The parallelism of the run.

    Returns:
        A mesh with the axes "data" and "model".

    Raises:
        InputError: The configuration needs another number of devices, or the groups along "data"
            cannot share the examples evenly.
    """
    devices = jax.devices() if devices is None else devices
    model = mesh_config.model
    data = mesh_config.data or len(devices) // model
    if data * model != len(devices):
        raise InputError(
            f"the mesh is data={data}, model={model}, of {data * model} devices: "
            f"expected all of the {len(devices)} devices; pass another --mesh"
        )
    if examples % data:
        raise InputError(
            f"{examples} examples are computed at once: expected a multiple of the {data} devices "
            "that share them; pass another --batch-size or --microbatch"
        )
    is_cpu = devices[0].platform == "cpu"
    if mesh_config.reduce == "bfloat16" and model > 1 and is_cpu:
        # jaxlib 0.10.1 to 0.12.0.1 abort.
        raise InputError(
            "reduce is 'bfloat16' and the mesh has a model axis: on CPUs expected only one of them"
        )
    # Under Auto, jit infers the shardings. Explicit axes, the default since jax 0.9, reject the
    # reshapes of Winograd's tiles and the product that is sharded over "model".
    return jax.make_mesh(
        (data, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2, devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds as a whole."""
    return NamedSharding(mesh, PartitionSpec())


def infer_shardings(arrays: Any, mesh: Mesh, mesh_config: MeshConfig) -> Any:
    """Chooses the sharding of each array in a tree.

    Args:
        arrays: A tree, such as a whole training state, in which the parameters have their names.
            The leaves are arrays or their shapes.
        mesh: The mesh of the run.
        mesh_config: The parallelism of the run.

    Returns:
        The same tree of `NamedSharding`s.

    Raises:
        InputError: "model" does not divide the features of a layer.
    """

    def sharding(path: tuple, array: Any) -> NamedSharding:
        name = "/".join(str(getattr(key, "key", key)) for key in path[-2:])
        return NamedSharding(mesh, _infer_spec(name, array, mesh, mesh_config))

    return jax.tree_util.tree_map_with_path(sharding, arrays)


def _infer_spec(name: str, array: Any, mesh: Mesh, mesh_config: MeshConfig) -> PartitionSpec:
    axes = [*MODEL_PARALLEL_SPECS.get(name, ())] if mesh.shape[MODEL] > 1 else []
    axes += [None] * (array.ndim - len(axes))
    for size, axis in zip(array.shape, axes, strict=True):
        if axis == MODEL and size % mesh.shape[MODEL]:
            raise InputError(
                f"{name} is {array.shape}, and the mesh has model={mesh.shape[MODEL]}: "
                f"expected a divisor of {size}; pass another --mesh"
            )
    num_bytes = math.prod(array.shape) * array.dtype.itemsize
    if mesh_config.fsdp and mesh.shape[DATA] > 1 and num_bytes > FSDP_MIN_BYTES:
        divisible = [
            i
            for i, (size, axis) in enumerate(zip(array.shape, axes, strict=True))
            if axis is None and size % mesh.shape[DATA] == 0
        ]
        if divisible:
            axes[max(divisible, key=lambda i: array.shape[i])] = DATA
    return PartitionSpec(*axes)


def data_axis_spec(sharding: NamedSharding) -> PartitionSpec:
    """The spec of a sharding with its "data" axis only."""
    return PartitionSpec(*(axis if axis == DATA else None for axis in sharding.spec))


def put_global(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Copies an array to the devices of all processes.

    All processes must call this.

    Args:
        array: The whole array, equal in all processes.
        sharding: The sharding of the result. Each process fills its own devices.

    Returns:
        The global array.
    """
    array = np.asarray(array)
    # Each part is a copy. A CPU device may use the host's memory directly, and a step would later
    # overwrite it with its result.
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index].copy())


def to_host(array: jax.Array, keep: bool = True) -> np.ndarray | None:
    """Copies a (possibly sharded) array to host memory.

    All processes must call this.

    Args:
        array: The array. If it spans several processes, it has a `NamedSharding`.
        keep: Return the copy. Otherwise this process only sends its part to the others.

    Returns:
        The whole array in memory of its own, or None without `keep`.

    Raises:
        TypeError: The array spans several processes and has no mesh.
    """
    if not array.is_fully_addressable and not array.is_fully_replicated:
        sharding = array.sharding
        if not (isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh)):
            raise TypeError(f"an array has the sharding {sharding}: expected one with a mesh")
        array = _jitted_replicate(sharding.mesh)(array)
    if not keep:
        return None
    return np.array(array if array.is_fully_addressable else array.addressable_data(0))


@functools.cache
def _jitted_replicate(mesh: Mesh) -> jax.stages.Wrapped:
    """A function that gathers a sharded array on every device."""
    return jax.jit(lambda x: x, out_shardings=replicated(mesh))


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Lists the rows of a batch that this process feeds.

    If a model axis crosses processes, several processes feed the same rows.

    Args:
        mesh: The mesh of the run.
        size: The number of examples in the batch.

    Returns:
        int (n,): row indices in ascending order.
    """
    rows = np.arange(size)
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    indices = sharding.addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([rows[index] for index in indices if index is not None]))


def shard_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Copies the rows of a batch that this process feeds to its devices.

    All processes must call this.

    Args:
        batch: Arrays (n, ...) with the `local_rows` of this process.
        mesh: The mesh of the run.

    Returns:
        Global arrays (N, ...), sharded over "data".
    """
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    num_local_groups = len(local_rows(mesh, mesh.shape[DATA]))

    def put(array: np.ndarray) -> jax.Array:
        size = len(array) * mesh.shape[DATA] // num_local_groups
        rows = local_rows(mesh, size)

        def shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            offset = int(np.searchsorted(rows, start))
            return array[offset : offset + stop - start]

        return jax.make_array_from_callback((size, *array.shape[1:]), sharding, shard)

    return {name: put(array) for name, array in batch.items()}
