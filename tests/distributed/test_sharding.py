"""A mesh of the two devices that conftest.py configures."""

import jax
import numpy as np
import pytest

from vgg_jax import InputError
from vgg_jax.distributed.sharding import make_mesh, replicated, shard_batch


def test_batch_is_sharded_and_parameters_replicated():
    mesh = make_mesh(6)
    batch = {
        "image": np.arange(6 * 12, dtype=np.uint8).reshape(6, 2, 2, 3),
        "label": np.arange(6, dtype=np.int32),
    }
    for name, array in shard_batch(batch, mesh).items():
        np.testing.assert_array_equal(array, batch[name])
        assert [shard.data.shape[0] for shard in array.addressable_shards] == [3, 3]
    kernel = jax.device_put(np.ones((4, 5)), replicated(mesh))
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(4, 5), (4, 5)]


def test_make_mesh_rejects_indivisible_examples():
    message = r"7 examples .*multiple of the 2 devices.*--batch-size or --microbatch"
    with pytest.raises(InputError, match=message):
        make_mesh(7)
    assert make_mesh(7, jax.devices()[:1]).size == 1
