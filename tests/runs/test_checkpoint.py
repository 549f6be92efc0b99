"""Checkpoints that are written and read without faults."""

import jax
import numpy as np
import pytest

from vgg_jax import InputError
from vgg_jax.runs.checkpoint import CheckpointStore

ARRAYS = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.int32(7)}
SHAPES = jax.eval_shape(lambda: ARRAYS)


def test_store_restores_newest_and_keeps_two(tmp_path):
    newest = jax.tree.map(lambda x: x + x.dtype.type(1), ARRAYS)
    with CheckpointStore(tmp_path / "last") as last:
        assert last.restore(SHAPES) is None
        last.save(1, ARRAYS, {"epoch": 0})
        last.save(4, ARRAYS, {"epoch": 1})
        last.save(12, newest, {"epoch": 2})
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["12", "4"]
    with CheckpointStore(tmp_path / "last", read_only=True) as last:
        arrays, progress = last.restore(SHAPES)
    assert progress == {"epoch": 2}
    jax.tree.map(np.testing.assert_array_equal, arrays, newest)


def test_restore_rejects_other_shapes(tmp_path):
    with CheckpointStore(tmp_path / "last") as last:
        last.save(1, ARRAYS, {})
        with pytest.raises(InputError, match=r"the checkpoint .*last/1 cannot be read"):
            last.restore(SHAPES | {"bias": SHAPES["step"]})
