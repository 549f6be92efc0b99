"""run.json, and the decision between a new run and a resumed one."""

import dataclasses
import json

import numpy as np
import pytest

from vgg_jax import IMAGENET, InputError, TrainConfig
from vgg_jax.configs.presets import resolve_learning_rate
from vgg_jax.division import BY_A_BUFFER
from vgg_jax.runs.checkpoint import CheckpointStore
from vgg_jax.runs.metadata import (
    RunMetadata,
    check_same_run,
    create_run,
    describe_run,
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
    input_version=2,
    validation_storage="folder, validation",
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


@pytest.mark.parametrize(
    ("name", "value", "storage", "is_allowed"),
    [
        ("data", "/moved/photos", "folder", True),
        ("epochs", 75, "folder", True),
        ("epochs", 73, "folder", False),
        ("cache", True, "folder", True),
        ("cache", True, "numbers/1.0.0 tfrecord", True),
        ("cache", True, f"numbers/1.0.0 tfrecord{BY_A_BUFFER}", False),  # another order
        ("microbatch", 128, "folder", True),
        ("batch_size", 128, "folder", False),
        ("dtype", "bfloat16", "folder", False),
        ("weight_decay", 0.0, "folder", False),
    ],
)
def test_check_same_run_allows_how_it_is_carried_out(name, value, storage, is_allowed, tmp_path):
    existing = dataclasses.replace(METADATA, storage=storage)
    config = dataclasses.replace(existing.config, **{name: value})
    run = dataclasses.replace(existing, config=config, command="vgg-jax train")
    if is_allowed:
        old = getattr(METADATA.config, name)
        assert check_same_run(tmp_path, existing, run) == [f"{name} was {old!r} and is {value!r}"]
        return
    with pytest.raises(
        InputError, match=rf"{name} is .* now.*; .*--workdir .*--init-from {tmp_path}"
    ):
        check_same_run(tmp_path, existing, run)


def test_check_same_run_names_other_data(tmp_path):
    """The path is no difference by itself, but it belongs to the message."""
    config = dataclasses.replace(METADATA.config, data="/other/photos")
    run = dataclasses.replace(METADATA, config=config, storage="folder, names 0")
    message = "storage is 'folder' in .*; data is 'photos' in run.json and '/other/photos' now"
    with pytest.raises(InputError, match=message):
        check_same_run(tmp_path, METADATA, run)


def test_check_same_run_compares_the_validation_data(tmp_path):
    """The best checkpoint and the learning rate depend on it."""
    config = dataclasses.replace(METADATA.config, data="/moved/photos")
    run = dataclasses.replace(METADATA, config=config, validation_storage="folder, names 0")
    with pytest.raises(InputError, match=r"validation_storage is 'folder, validation' in .* now"):
        check_same_run(tmp_path, METADATA, run)
    earlier = dataclasses.replace(METADATA, validation_storage=None)
    assert check_same_run(tmp_path, earlier, run) == ["data was 'photos' and is '/moved/photos'"]


def test_check_same_run_keeps_the_cache_of_version_1(tmp_path):
    """It hardly shuffled TFRecord files, which `cache` shuffles completely."""
    existing = dataclasses.replace(METADATA, storage="numbers/1.0.0 tfrecord", input_version=1)
    run = dataclasses.replace(existing, config=dataclasses.replace(existing.config, cache=True))
    with pytest.raises(InputError, match="cache is False"):
        check_same_run(tmp_path, existing, run)


def test_describe_run_has_no_star_at_the_papers_settings():
    paper = dataclasses.replace(METADATA, config=resolve_learning_rate(TrainConfig(), 1000))
    lines = describe_run(paper).splitlines()[:-1]
    assert [line for line in lines if line.endswith("*")] == []
    assert any(line.split()[0] == "learning_rate" and "0.01" in line for line in lines)


def test_check_same_run_accepts_other_spelling_of_net(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [
        dataclasses.replace(METADATA, config=dataclasses.replace(METADATA.config, init_from=path))
        for path in ("runs/A", str(tmp_path / "runs" / "A" / ""), "runs/B")
    ]
    assert check_same_run(tmp_path, runs[0], runs[1]) == []
    with pytest.raises(InputError, match="init_from"):
        check_same_run(tmp_path, runs[0], runs[2])


def test_load_run_reads_files_without_command(tmp_path):
    """Those of version 0.1.0 have none."""
    create_run(tmp_path, METADATA)
    content = json.loads((tmp_path / "run.json").read_text())
    for name in ("command", "activation_rms", "input_version", "validation_storage"):
        del content[name]
    (tmp_path / "run.json").write_text(json.dumps(content))
    run = dataclasses.replace(METADATA, input_version=1, validation_storage=None)
    assert load_run(tmp_path) == run


@pytest.mark.parametrize("part", ["best", "last/7"])
def test_load_run_names_run_of_part(part, tmp_path):
    create_run(tmp_path, METADATA)
    with pytest.raises(InputError, match=rf"no run in .*{part}: .*; pass {tmp_path}$"):
        load_run(tmp_path / part)


def test_load_existing_run_rejects_lost_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (tmp_path / "last" / "3.damaged").mkdir(parents=True)
    message = r"holds no checkpoint, and .*metrics.jsonl lists finished epochs"
    with pytest.raises(InputError, match=message):
        load_existing_run(tmp_path)
