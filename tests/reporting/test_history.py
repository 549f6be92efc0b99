"""The finished epochs of a run, and the parts of its time."""

import json

import pytest

from tests.helpers.photos import make_photo_folder
from tests.helpers.reports import RECORDS, record, write_run
from vgg_jax import InputError
from vgg_jax.reporting.history import read_records, read_run, run_name, time_shares
from vgg_jax.reporting.tables import summarize_run

pytestmark = pytest.mark.usefixtures("small_nets")


def test_reads_best_epoch_and_changes_of_the_learning_rate(tmp_path):
    run = read_run(write_run(tmp_path / "run", make_photo_folder(tmp_path / "photos")))
    assert run.name == "run"
    assert run.records == list(RECORDS)
    assert run.best["epoch"] == 2  # the first of two equal ones
    assert run.rate_changes == [(2, 0.01)]
    assert run.divergence is None


def test_cosine_schedule_has_no_changes_of_the_learning_rate(tmp_path):
    """It changes in each step, so a line for each would hide the curves."""
    photos = make_photo_folder(tmp_path / "photos")
    settings = {"schedule": "cosine", "optimizer": "adamw"}
    run = read_run(write_run(tmp_path / "run", photos, **settings))
    assert run.rate_changes == []
    assert "AdamW at learning rate 0.1 with a cosine schedule" in summarize_run(run)


def test_reads_the_divergence(tmp_path):
    folder = write_run(tmp_path / "run", make_photo_folder(tmp_path / "photos"), records=())
    (folder / "diverged.txt").write_text("the loss is not finite\n")
    run = read_run(folder)
    assert run.records == []
    assert run.divergence == "the loss is not finite"


def test_time_is_divided_into_its_parts():
    records = [record(epoch, 0.5) for epoch in (1, 2, 3)]
    assert time_shares(records) == {
        "training steps": 27.0,
        "waiting for images": 3.0,
        "validation": 12.0,
    }
    del records[1]["validation_seconds"]  # as in a run that an earlier version began
    assert list(time_shares(records)) == ["training steps", "waiting for images"]


def test_names_of_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_name(".") == tmp_path.name
    assert run_name("a/b/") == "b"
    assert run_name("gs://bucket/runs/b/") == "b"


@pytest.mark.parametrize(
    "content",
    ["{", "[]\n", json.dumps(record(1, 0.5) | {"seconds": "ten"}), '{"epoch": 1}', "\xff"],
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read .*resume the run"):
        read_records(path)
