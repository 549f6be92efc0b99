"""Batches that are sharded over the explicit axes of a mesh, as `jax.make_mesh` makes them.

Explicit axes need to know the sharding of every result. The reshapes of Winograd's tiles have no
such rule, so each device computes its own examples.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec

from vgg_jax.errors import InputError


def map_over_batch(
    function: Callable[..., Array], batched: tuple[Any, ...], shared: tuple[Any, ...]
) -> Array:
    """Calls a function on each device's examples if the batch is sharded over explicit axes.

    Args:
        function: `function(*batched, *shared)` treats each example by itself.
        batched: Pytrees of arrays whose first axis is the batch, an array first.
        shared: Pytrees of arrays that all examples share.

    Returns:
        The function's result, sharded like the batch.

    Raises:
        InputError: If another axis is sharded over an explicit axis.
    """
    spec = explicit_spec(batched[0])
    shared_specs = [explicit_spec(leaf) for leaf in jax.tree.leaves(shared)]
    sharded = [spec] * any(spec[1:]) + [other for other in shared_specs if any(other)]
    if sharded:
        raise InputError(
            f"an array is sharded as {sharded[0]}: expected only the batch axis to be sharded over "
            "explicit axes of the mesh; reshard the array, or make the mesh with "
            "axis_types=(jax.sharding.AxisType.Auto, …)"
        )
    if not any(spec):
        return function(*batched, *shared)
    axes = spec[0] if isinstance(spec[0], tuple) else (spec[0],)
    batch_spec = PartitionSpec(axes)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, shared)

    def narrow(leaf: Array, dtype: Any) -> Array:
        return lax.pcast(leaf, axes, to="varying").astype(dtype)

    def compute(batched: tuple[Any, ...], shared: tuple[Any, ...]) -> Array:
        return function(*batched, *jax.tree.map(narrow, shared, dtypes))

    # The gradients of shared arrays are summed over devices in float32: that is more accurate, and
    # XLA aborts at sums in bfloat16 on CPUs if the mesh has another axis.
    widened = jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), shared)
    return jax.shard_map(
        compute,
        mesh=jax.typeof(batched[0]).sharding.mesh,
        in_specs=(batch_spec, PartitionSpec()),
        out_specs=batch_spec,
        axis_names=set(axes),
    )(batched, widened)


def explicit_spec(array: Array) -> PartitionSpec:
    """The sharding of an array over explicit axes of a mesh.

    Args:
        array: An array.

    Returns:
        An entry for each axis of the array, None if no explicit axis shards it.
    """
    return jax.typeof(array).sharding.spec
