"""run.json, and the decision between a new run and a resumed one."""

import dataclasses

import numpy as np
import pytest

from vgg_jax import IMAGENET, InputError, TrainConfig
from vgg_jax.runs.checkpoint import CheckpointStore
from vgg_jax.runs.metadata import (
    RunMetadata,
    check_same_run,
    create_run,
    load_existing_run,
    load_run,
)

METADATA = RunMetadata(
    config=TrainConfig(data="photos", learning_rate=0.1, drop_epochs=()),
    classes=("ants", "bees"),
    colours=IMAGENET,
    storage="folder",
    train_size=10,
    validation_size=3,
)


def test_load_run_returns_created_run(tmp_path):
    create_run(tmp_path, METADATA)
    assert load_run(tmp_path) == METADATA
    # Without a checkpoint, another run may use the folder.
    assert load_existing_run(tmp_path) is None
    with CheckpointStore(tmp_path / "last") as last:
        last.save(1, {"step": np.int32(7)}, {})
    assert load_existing_run(tmp_path) == METADATA


def test_check_same_run_lists_differences(tmp_path):
    check_same_run(tmp_path, METADATA, METADATA)
    config = dataclasses.replace(METADATA.config, seed=1)
    other = dataclasses.replace(METADATA, classes=("ants", "wasps"), config=config)
    with pytest.raises(
        InputError, match=r"classes is .*'bees'.* in run\.json and .*'wasps'.* now"
    ) as error:
        check_same_run(tmp_path, METADATA, other)
    assert "seed is 0 in run.json and 1 now" in str(error.value)
    assert "storage" not in str(error.value)


def test_load_existing_run_rejects_lost_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (tmp_path / "last" / "3.damaged").mkdir(parents=True)
    message = r"holds no checkpoint, and .*metrics.jsonl lists finished epochs"
    with pytest.raises(InputError, match=message):
        load_existing_run(tmp_path)
