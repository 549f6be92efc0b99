"""Saves of a run: failed ones, the best epoch's, and damaged ones."""

import logging
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import vgg_jax
from tests.helpers.runs import load_last_arrays, make_config, without_times
from vgg_jax import InputError
from vgg_jax.metrics import MetricSums
from vgg_jax.runs.checkpoint import CheckpointSaveError, CheckpointStore
from vgg_jax.training.loop import fit
from vgg_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture(autouse=True)
def log_info(caplog):
    caplog.set_level(logging.INFO, "vgg_jax")


@pytest.mark.slow
def test_fit_restarts_if_only_best_was_saved(photos, finished_run, tmp_path, monkeypatch, caplog):
    """The disk was full after the first epoch's best. The next start uses --init-from again."""
    config = make_config(photos, init_from=str(finished_run[0]), epochs=1)
    undisturbed = fit(config, tmp_path / "undisturbed").history
    save = CheckpointStore.save

    def save_best_only(self, step, arrays, progress):
        if "history" in progress:
            raise CheckpointSaveError("full")
        save(self, step, arrays, progress)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "save", save_best_only)
        with pytest.raises(CheckpointSaveError):
            fit(config, tmp_path / "run")
    history = fit(config, tmp_path / "run").history
    assert "nothing to resume from, so the run starts again" in caplog.text
    assert without_times(history) == without_times(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("until_end", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fit_survives_full_disk(until_end, photos, finished_run, tmp_path, monkeypatch, caplog):
    """No save succeeds at the end of the second of three epochs, or from then on."""
    save, num_saves = CheckpointStore.save, 0

    def save_unless_full(*args):
        nonlocal num_saves
        num_saves += 1
        # The first epoch saves its best and its last checkpoint.
        if num_saves == 3 or (until_end and num_saves > 3):
            raise CheckpointSaveError("cannot save to a disk (No space left on device)")
        save(*args)

    workdir, history = finished_run
    monkeypatch.setattr(CheckpointStore, "save", save_unless_full)
    if until_end:
        with pytest.raises(CheckpointSaveError):
            fit(make_config(photos), tmp_path)
        monkeypatch.undo()
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    result = fit(make_config(photos), tmp_path)
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert any("cannot save to a disk" in record.getMessage() for record in warnings)
    assert without_times(result.history) == without_times(history)
    arrays, expected = load_last_arrays(tmp_path), load_last_arrays(workdir)
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)
    (_, variables, metadata), (_, expected, expected_metadata) = (
        vgg_jax.load(path) for path in (tmp_path, workdir)
    )
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    assert metadata["epoch"] == expected_metadata["epoch"]


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 3])
def test_fit_keeps_checkpoints(keep, photos, tmp_path):
    """The best ones hold the parameters and the running statistics, and no momentum."""
    fit(make_config(photos), tmp_path, save_seconds=0, keep=keep)
    assert len(list((tmp_path / "last").iterdir())) == keep
    assert 1 <= len(list((tmp_path / "best").iterdir())) <= keep
    with ocp.CheckpointManager(tmp_path / "best") as manager:
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore())
        arrays = manager.restore(manager.latest_step(), args=args).arrays
    assert arrays.keys() == {"params", "batch_stats"}
    history = fit(make_config(photos, epochs=4), tmp_path, keep=keep).history
    assert len(history) == 4


@pytest.mark.parametrize(("keep", "on_nan"), [(0, "stop"), (1, "halve")])
def test_fit_rejects_too_few_checkpoints(keep, on_nan, photos, tmp_path):
    with pytest.raises(InputError, match=f"keep is {keep} and on_nan is '{on_nan}': expected"):
        fit(make_config(photos), tmp_path, keep=keep, on_nan=on_nan)


@pytest.mark.slow
@pytest.mark.parametrize("disk_is_full", [False, True])
def test_best_is_net_of_best_epoch(disk_is_full, photos, tmp_path, monkeypatch):
    """The second of three epochs is the best, also if its net is saved in the third epoch only."""
    params, save = [], CheckpointStore.save

    def save_unless_full(self, *args):
        if disk_is_full and len(params) == 2:
            raise CheckpointSaveError("full")
        save(self, *args)

    class SecondIsBestTrainer(Trainer):
        def evaluate(self):
            params.append(jax.tree.map(np.array, self.state.params))
            return MetricSums(loss=1.0, top1=[3, 5, 4][len(params) - 1], top5=7, count=7)

    monkeypatch.setattr(CheckpointStore, "save", save_unless_full)
    fit(make_config(photos), tmp_path, trainer_class=SecondIsBestTrainer)
    _, variables, metadata = vgg_jax.load(tmp_path)
    assert metadata["epoch"] == 2
    jax.tree.map(np.testing.assert_array_equal, variables["params"], params[1])
    assert np.abs(params[1]["fc6"]["kernel"] - params[2]["fc6"]["kernel"]).max() > 0


@pytest.mark.slow
def test_fit_rejects_run_without_best(finished_run, photos, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "best")
    message = r"best holds no checkpoint, but epochs are finished: .*restore that folder"
    with pytest.raises(InputError, match=message):
        fit(make_config(photos), tmp_path / "copy")


def test_fit_keeps_truncated_checkpoints(finished_run, photos, tmp_path):
    """If none is intact, the message names one, and all files stay."""
    shutil.copytree(finished_run[0], tmp_path / "copy")

    def list_files():
        return sorted(path for path in (tmp_path / "copy/last").rglob("*") if path.is_file())

    files = list_files()
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"the checkpoint .*/last/\d+ cannot be read"):
        fit(make_config(photos), tmp_path / "copy")
    assert list_files() == files
