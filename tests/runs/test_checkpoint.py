"""The folder of a run; `test_train` shows it in use."""

import dataclasses

import jax
import numpy as np
import pytest

from vgg_jax import IMAGENET, InputError, TrainConfig
from vgg_jax.runs.checkpoint import CheckpointStore
from vgg_jax.runs.files import atomic_write
from vgg_jax.runs.metadata import (
    RunMetadata,
    check_same_run,
    create_run,
    load_existing_run,
    load_run,
)

RUN = RunMetadata(
    TrainConfig(data="photos", learning_rate=0.1, drop_epochs=()),
    ("ants", "bees"),
    IMAGENET,
    "folder",
    10,
    3,
)
ARRAYS = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.int32(7)}
SHAPES = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    ARRAYS,
)


def test_a_run_is_read_as_it_was_written(tmp_path):
    create_run(tmp_path, RUN)
    assert load_run(tmp_path) == RUN
    assert (
        load_existing_run(tmp_path) is None
    )  # nothing is saved yet: another run may take the folder
    with CheckpointStore(tmp_path / "last") as last:
        last.save(1, ARRAYS, {})
    assert load_existing_run(tmp_path) == RUN


def test_another_run_is_refused_with_all_differences(tmp_path):
    check_same_run(tmp_path, RUN, RUN)
    other = dataclasses.replace(
        RUN, classes=("ants", "wasps"), config=dataclasses.replace(RUN.config, seed=1)
    )
    with pytest.raises(
        InputError, match=r"classes is .*'bees'.* there and .*'wasps'.* here"
    ) as error:
        check_same_run(tmp_path, RUN, other)
    assert "seed is 0 there and 1 here" in str(error.value)
    assert "storage" not in str(error.value)


def test_the_newest_is_restored_and_two_are_kept(tmp_path):
    with CheckpointStore(tmp_path / "last") as last:
        assert last.restore(SHAPES) is None
        last.save(1, ARRAYS, {"epoch": 0})
        last.save(4, ARRAYS, {"epoch": 1})
        last.save(12, jax.tree.map(lambda x: x + x.dtype.type(1), ARRAYS), {"epoch": 2})
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["12", "4"]
    with CheckpointStore(tmp_path / "last", read_only=True) as last:
        arrays, progress = last.restore(SHAPES)
    assert progress == {"epoch": 2}
    jax.tree.map(
        np.testing.assert_array_equal, arrays, jax.tree.map(lambda x: x + x.dtype.type(1), ARRAYS)
    )


def test_a_checkpoint_of_other_shapes_is_named(tmp_path):
    with CheckpointStore(tmp_path / "last") as last:
        last.save(1, ARRAYS, {})
        other = SHAPES | {"bias": SHAPES["step"]}
        with pytest.raises(InputError, match=r"the checkpoint .*last/1 cannot be read"):
            last.restore(other)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    atomic_write(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"new")
    assert path.read_text() == "old"
