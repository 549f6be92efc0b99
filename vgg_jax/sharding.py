"""Where arrays lie: a mesh of all devices with one axis, "data"; parameters on every device, examples spread."""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vgg_jax.errors import InputError


def data_mesh(examples: int, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of the devices (all, by default). Raises InputError where they do not share so many examples evenly."""
    devices = jax.devices() if devices is None else devices
    if examples % len(devices):
        raise InputError(
            f"{examples} examples are computed at once: expected a multiple of the {len(devices)} devices; "
            "pass another --batch-size or --microbatch"
        )
    # Explicit axes, the default since jax 0.9, are refused by linen's Conv.
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
    """A host batch on the devices, its first axis spread over "data"."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
