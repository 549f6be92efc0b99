"""Runs with `tensorboard` and `profile`: what TensorBoard's own reader and Perfetto find.

An epoch has 3 steps of training and 1 batch of validation, and a run has 3 epochs.
"""

import errno
import io
import json
import logging
import shutil
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers.events import read, read_images, read_scalars
from tests.helpers.runs import load_last_arrays, make_config, without_times
from tests.runtime.test_profile import traced_steps
from vgg_jax import InputError
from vgg_jax.training.loop import fit
from vgg_jax.training.trainer import Trainer

METRICS = ("loss", "top1_error", "top5_error")
NUM_STEPS, EVERY = 9, 2

pytestmark = pytest.mark.usefixtures("small_nets", "each_step_is_a_point")


class KilledError(BaseException):
    """Stands for kill -9: nothing is saved after it."""


@pytest.fixture(scope="module")
def each_step_is_a_point():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vgg_jax.reporting.events.POINT_SECONDS", 0)
        patch.setattr("vgg_jax.training.trainer.MEASURE_EVERY", EVERY)
        yield


@pytest.fixture(scope="module")
def watched_run(photos, small_nets, each_step_is_a_point, tmp_path_factory):
    """The workdir of a run, its history, and the images and colour shifts of its steps."""
    workdir, batches = tmp_path_factory.mktemp("watched_run"), []

    class RecordingTrainer(Trainer):
        def train_step(self, state, batch):
            batches.append({name: np.array(batch[name]) for name in ("image", "colour_shift")})
            return super().train_step(state, batch)

    options = {"tensorboard": True, "profile": (8, 20), "trainer_class": RecordingTrainer}
    return workdir, fit(make_config(photos), workdir, **options).history, batches


def assert_equal_runs(workdir, history, expected_workdir, expected_history):
    assert without_times(history) == without_times(expected_history)
    arrays, expected = load_last_arrays(workdir), load_last_arrays(expected_workdir)
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)


@pytest.mark.slow
def test_run_equals_one_that_is_not_watched(watched_run, finished_run):
    assert_equal_runs(*watched_run[:2], *finished_run)


@pytest.mark.slow
def test_curves_equal_metrics_file(watched_run):
    workdir, _, _ = watched_run
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records, scalars = list(map(json.loads, lines)), read_scalars(workdir / "tensorboard")
    for name in METRICS:
        expected = {3 * r["epoch"]: r["validation"][name] for r in records}
        assert scalars[f"validation/{name}"] == pytest.approx(expected, rel=1e-6)
        expected = {3 * r["epoch"]: r["train"][name] for r in records}
        assert scalars[f"train_epoch/{name}"] == pytest.approx(expected, rel=1e-6)
        points = scalars[f"train/{name}"]
        assert list(points) == list(range(1, NUM_STEPS + 1))
        for record in records:  # batches of 8, 8 and 6 images
            values = [points[3 * record["epoch"] - 2 + i] for i in range(3)]
            mean = np.average(values, weights=(8, 8, 6))
            assert mean == pytest.approx(record["train"][name], rel=1e-6)
    rates = [record["learning_rate"] for record in records for _ in range(3)]
    assert list(scalars["learning_rate"].values()) == pytest.approx(rates, rel=1e-6)
    assert all(value > 0 for value in scalars["images_per_second"].values())


@pytest.mark.slow
def test_layers_are_measured_every_few_steps(watched_run):
    scalars = read_scalars(watched_run[0] / "tensorboard")
    layers = ("conv1_1", "bn1_1", "conv2_1", "bn2_1", "fc6", "fc7", "fc8")
    relus = ("conv1_1", "conv2_1", "fc6", "fc7")
    names = [f"{kind}_norm/{layer}" for kind in ("gradient", "weight") for layer in layers]
    names += [f"dead_relus/{layer}" for layer in relus]
    assert {name for name in scalars if name.startswith(("gradient", "weight", "dead"))} == {*names}
    for name in names:
        assert list(scalars[name]) == [1, 3, 5, 7, 9]
        assert all(value > 0 for value in scalars[name].values()) or name.startswith("dead")
        assert all(value <= 1 for value in scalars[name].values()) or "norm" in name
    # The last step measures the parameters that the run saves.
    params = load_last_arrays(watched_run[0])["params"]
    for layer in layers:
        expected = np.sqrt(sum((np.float64(x) ** 2).sum() for x in params[layer].values()))
        assert scalars[f"weight_norm/{layer}"][9] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_crops_are_those_of_the_first_batch_of_each_epoch(watched_run):
    workdir, _, batches = watched_run
    images = read_images(workdir / "tensorboard", "crops")
    assert [step for step, _ in images] == [1, 4, 7]
    for step, encoded in images:
        grid = np.asarray(Image.open(io.BytesIO(encoded)))
        assert grid.shape == (3 * 16 + 4, 3 * 16 + 4, 3)  # 8 images in 3 rows
        batch = batches[step - 1]
        seen = np.float64(batch["image"]) + batch["colour_shift"][:, None, None]
        for number in range(8):
            top, left = number // 3 * 18, number % 3 * 18
            crop = grid[top : top + 16, left : left + 16]
            assert np.abs(crop - seen[number].clip(0, 255)).max() <= 0.5 + 1e-4


@pytest.mark.slow
def test_trace_ends_with_the_training(watched_run):
    assert traced_steps(watched_run[0] / "tensorboard") == [8, 9]


@pytest.mark.slow
def test_reader_finds_each_step_of_a_killed_run_once(photos, watched_run, tmp_path):
    """Killed in a step, in a validation, and between the events of a validation and its save.

    Each batch is saved. The step of the kill comes again, and so does the validation.
    """
    kills = []

    class KilledTrainer(Trainer):
        def kill_once(self, place):
            if place not in kills:
                kills.append(place)
                raise KilledError

        def put_batch(self, batch):
            if self.progress.batch == 2:
                self.kill_once("step")
            return super().put_batch(batch)

        def evaluate(self):
            if self.progress.history:
                self.kill_once("validation")
            return super().evaluate()

        def save(self, best=None):
            if len(self.progress.history) == 2 and not self.progress.batch:
                self._checkpointer.wait_until_finished()
                self.kill_once("save")
            super().save(best)

    def run():
        options = {"tensorboard": True, "save_seconds": 0, "trainer_class": KilledTrainer}
        return fit(make_config(photos), tmp_path, **options)

    for place in ("step", "validation", "save"):
        with pytest.raises(KilledError):
            run()
        assert kills[-1] == place
    history = run().history
    assert_equal_runs(tmp_path, history, *watched_run[:2])
    assert len(list((tmp_path / "tensorboard").iterdir())) == 4
    scalars, expected = (
        read_scalars(workdir / "tensorboard") for workdir in (tmp_path, watched_run[0])
    )
    for curves in (scalars, expected):
        curves.pop("images_per_second")
    assert scalars.keys() == expected.keys()
    for name, points in expected.items():
        # A validation that comes again drops the point of its epoch's last step.
        missing = {step: value for step, value in points.items() if step not in scalars[name]}
        assert not missing.keys() - {6}
        assert scalars[name] | missing == points, name
    for name in METRICS:
        assert scalars[f"validation/{name}"].keys() == {3, 6, 9}
    assert [step for step, _ in read_images(tmp_path / "tensorboard", "crops")] == [1, 4, 7]


@pytest.mark.slow
def test_full_disk_does_not_stop_training(photos, watched_run, tmp_path, monkeypatch, caplog):
    from tensorboardX.record_writer import RecordWriter

    write, num_records = RecordWriter.write, []

    def fail(self, data):
        num_records.append(len(data))
        if len(num_records) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", fail)
    history = fit(make_config(photos), tmp_path, tensorboard=True).history
    assert_equal_runs(tmp_path, history, *watched_run[:2])
    assert len(num_records) == 7
    warnings = [r for r in caplog.records if r.name.startswith("vgg_jax") and r.levelname != "INFO"]
    [message] = [record.getMessage() for record in warnings]
    assert "No space left on device): training goes on without events" in message
    assert list(read_scalars(tmp_path / "tensorboard")["train/loss"]) == [1, 2]


@pytest.mark.slow
def test_finished_run_writes_no_events(watched_run, photos, tmp_path):
    shutil.copytree(watched_run[0], tmp_path / "copy")
    before = sorted((tmp_path / "copy" / "tensorboard").iterdir())
    fit(make_config(photos), tmp_path / "copy", tensorboard=True)
    assert sorted((tmp_path / "copy" / "tensorboard").iterdir()) == before


@pytest.mark.slow
def test_crops_of_arrays_are_cropped_on_the_devices(tmp_path):
    """Without augmentation, they are training images."""
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    labels = np.arange(40) % 2
    settings = {"crop": "centre", "flip": False, "colour_shift": 0.0, "net": "shallow"}
    settings |= {"fc": (24, 16), "batch_size": 8, "epochs": 1, "image_size": 16, "scale": (16,)}
    settings |= {"schedule": "constant"}
    fit((images, labels), tmp_path, tensorboard=True, **settings)
    [(_, encoded)] = read_images(tmp_path / "tensorboard", "crops")
    grid = np.asarray(Image.open(io.BytesIO(encoded)))
    crops = [grid[top : top + 16, left : left + 16] for top in (0, 18) for left in (0, 18)]
    known = {image.tobytes() for image in images}
    assert all(crop.tobytes() in known for crop in crops)


@pytest.mark.slow
def test_cached_features_have_no_crops(photos, tmp_path):
    same_images = {"crop": "centre", "flip": False, "colour_shift": 0.0, "scale": (18,)}
    config = make_config(
        photos, freeze=("conv",), cache_features=True, epochs=1, drop_epochs=(1,), **same_images
    )
    fit(config, tmp_path, tensorboard=True)
    reader = read(tmp_path / "tensorboard")
    assert reader.Tags()["images"] == []
    assert "gradient_norm/fc6" in reader.Tags()["scalars"]
    assert "gradient_norm/conv1_1" not in reader.Tags()["scalars"]
    assert "weight_norm/conv1_1" in reader.Tags()["scalars"]


@pytest.mark.parametrize("option", [{"tensorboard": True}, {"profile": (1, 2)}])
def test_fit_rejects_remote_workdir(option, photos):
    [name] = option
    message = (
        rf"^gs://bucket/run is in an object store: expected a local folder with --{name}; "
        rf"pass another --workdir, or leave out --{name}$"
    )
    with pytest.raises(InputError, match=message):
        fit(make_config(photos), "gs://bucket/run", **option)


def test_fit_rejects_missing_tensorboardx(photos, tmp_path, monkeypatch):
    """Before it creates anything."""
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(InputError, match="--tensorboard needs tensorboardX: run pip install -e"):
        fit(make_config(photos), tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()


def test_fit_rejects_unwritable_events_folder(photos, tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write to .*leave out --tensorboard"):
        fit(make_config(photos), tmp_path, tensorboard=True)
    assert not (tmp_path / "last").exists() or not list((tmp_path / "last").iterdir())


def test_fit_rejects_steps_that_are_no_range(photos, tmp_path):
    with pytest.raises(InputError, match=r"^profile is \(3, 2\): expected"):
        fit(make_config(photos), tmp_path / "run", profile=(3, 2))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_lines_of_a_log_have_the_epochs_and_the_time_left(photos, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("vgg_jax.runtime.progress.SECONDS_PER_LINE", 0)
    caplog.set_level(logging.INFO, "vgg_jax")
    fit(make_config(photos, schedule="plateau", drop_epochs=()), tmp_path)
    lines = [r.getMessage() for r in caplog.records if r.name == "vgg_jax.runtime.progress"]
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert [line.split(":")[0] for line in epochs] == [
        f"epoch {i} of 3" for i in (1, 2, 3) for _ in range(3)
    ]
    assert "run: " not in epochs[0]
    assert all(", run: at most " in line for line in epochs[1:])
    validations = [line for line in lines if line.startswith("validation: ")]
    assert all(", run: at most " in line for line in validations) and len(validations) == 3
