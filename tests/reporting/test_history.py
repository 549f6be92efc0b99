"""The finished epochs of a run, and the parts of its time."""

import json

import pytest

from tests.helpers.photos import make_photo_folder
from tests.helpers.reports import RECORDS, record, write_run
from vgg_jax import InputError
from vgg_jax.reporting.history import read_records, read_run, time_shares

pytestmark = pytest.mark.usefixtures("small_nets")


def test_reads_best_epoch_and_changes_of_the_learning_rate(tmp_path):
    run = read_run(write_run(tmp_path / "run", make_photo_folder(tmp_path / "photos")))
    assert run.name == "run"
    assert run.records == list(RECORDS)
    assert run.best["epoch"] == 2  # the first of two equal ones
    assert run.drops == [(2, 0.01)]
    assert run.divergence is None


def test_reads_the_divergence(tmp_path):
    folder = write_run(tmp_path / "run", make_photo_folder(tmp_path / "photos"), records=())
    (folder / "diverged.txt").write_text("the loss is not finite\n")
    run = read_run(folder)
    assert run.records == []
    assert run.divergence == "the loss is not finite"


def test_time_is_divided_into_its_parts():
    # Epochs of 10 s end every minute, so 50 s are left between two of them.
    records = [record(epoch, 0.5, minute=epoch) for epoch in (1, 2, 3)]
    assert time_shares(records) == {
        "training steps": 27.0,
        "waiting for images": 3.0,
        "validation and saving": 100.0,
    }


def test_pauses_are_no_part_of_the_time():
    minutes = (1, 2, 3, 50, 51)
    records = [record(epoch, 0.5, minute=minute) for epoch, minute in enumerate(minutes, 1)]
    assert time_shares(records)["validation and saving"] == 150.0


@pytest.mark.parametrize(
    "content", ["{", "[]\n", json.dumps(record(1, 0.5) | {"time": "noon"}), '{"epoch": 1}', "\xff"]
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read .*resume the run"):
        read_records(path)
