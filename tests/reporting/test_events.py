"""Events as TensorBoard's own reader finds them, and disks that cannot be written to."""

import errno
import io
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.events import read_images, read_scalars
from vgg_jax import InputError
from vgg_jax.metrics import MetricSums
from vgg_jax.reporting import events
from vgg_jax.reporting.events import TrainingEvents
from vgg_jax.reporting.grid import make_grid


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [1000.0]
    monkeypatch.setattr(events.time, "monotonic", lambda: now[0])
    return now


def step_sums(loss, top1, count=8):
    return MetricSums(loss * count, top1, count, count)


def test_point_is_the_mean_over_the_images_since_the_last_one(tmp_path, clock):
    """Steps of 60 ms: at most ten points a second."""
    writer = TrainingEvents(tmp_path, 1)
    writer.start_epoch()
    losses, counts = [3.0, 1.0, 2.0, 5.0, 0.5], [8, 8, 8, 8, 2]
    for step, (loss, count) in enumerate(zip(losses, counts, strict=True), 1):
        clock[0] += 0.06
        writer.add_step(step, step_sums(loss, count / 2, count), 0.1 / step, {})
    writer.finish_training()
    writer.finish_training()  # adds nothing
    writer.close()
    scalars = read_scalars(tmp_path)
    assert scalars["train/loss"] == {2: 2.0, 4: 3.5, 5: 0.5}
    assert scalars["train/top1_error"] == {2: 0.5, 4: 0.5, 5: 0.5}
    assert scalars["train/top5_error"] == {2: 0, 4: 0, 5: 0}
    assert scalars["learning_rate"] == pytest.approx({2: 0.05, 4: 0.025, 5: 0.02})
    expected = {2: 16 / 0.12, 4: 16 / 0.12, 5: 2 / 0.06}
    assert scalars["images_per_second"] == pytest.approx(expected)


def test_start_epoch_leaves_out_the_time_before(tmp_path, clock):
    """A validation and a save are no training."""
    writer = TrainingEvents(tmp_path, 1)
    clock[0] += 100
    writer.start_epoch()
    clock[0] += 2
    writer.add_step(1, step_sums(1.0, 0), 0.1, {})
    writer.close()
    assert read_scalars(tmp_path)["images_per_second"] == pytest.approx({1: 4})


def test_statistics_are_curves_of_their_own_steps(tmp_path, clock):
    writer = TrainingEvents(tmp_path, 1)
    writer.add_step(1, step_sums(1.0, 0), 0.1, {"dead_relus/fc6": 0.25, "weight_norm/fc6": 3.5})
    writer.add_step(2, step_sums(1.0, 0), 0.1, {})
    writer.close()
    assert read_scalars(tmp_path) == {"dead_relus/fc6": {1: 0.25}, "weight_norm/fc6": {1: 3.5}}


def test_events_are_flushed_every_few_seconds(tmp_path, clock):
    """A reader sees them while the file is open."""
    writer = TrainingEvents(tmp_path, 1)
    for step in range(1, 8):
        clock[0] += 1
        writer.add_step(step, step_sums(1.0, 0), 0.1, {})
    assert list(read_scalars(tmp_path)["train/loss"]) == [1, 2, 3, 4, 5]
    writer.add_epoch(
        8, {name: dict.fromkeys(events.METRICS, 0.5) for name in ("train", "validation")}
    )
    assert list(read_scalars(tmp_path)["train/loss"]) == list(range(1, 8))
    assert read_scalars(tmp_path)["validation/top1_error"] == {8: 0.5}
    writer.close()


def test_crops_are_pixels_as_the_net_sees_them(tmp_path):
    """18 crops, of which 16 are shown in four rows; the shift is rounded and clipped."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (18, 6, 5, 3), np.uint8)
    colour_shift = rng.normal(0, 20, (18, 3)).astype(np.float32)
    writer = TrainingEvents(tmp_path, 1)
    writer.add_crops(1, images, colour_shift)
    writer.close()
    [(step, encoded)] = read_images(tmp_path, "crops")
    grid = np.asarray(Image.open(io.BytesIO(encoded)))
    assert step == 1
    assert grid.shape == (4 * 6 + 3 * 2, 4 * 5 + 3 * 2, 3)
    exact = np.float64(images) + colour_shift[:, None, None]
    for number in range(16):
        top, left = number // 4 * 8, number % 4 * 7
        crop = grid[top : top + 6, left : left + 5]
        assert np.abs(crop - exact[number].clip(0, 255)).max() <= 0.5 + 1e-4
    grid = grid.copy()
    for start in (6, 14, 22):
        assert not grid[start : start + 2].any()


def test_grid_of_few_images():
    images = np.full((3, 2, 2, 3), 9, np.uint8)
    grid = make_grid(images)
    assert grid.shape == (6, 6, 3)
    assert not grid[4:, 4:].any() and (grid[4:, :2] == 9).all()
    assert make_grid(images[:1]).shape == (2, 2, 3)


def test_later_process_replaces_steps_of_a_killed_one(tmp_path, clock):
    """Both start in the same second. The reader drops the steps that come again."""
    for first_step, loss in ((1, 1.0), (3, 2.0)):
        writer = TrainingEvents(tmp_path, first_step)
        for step in range(first_step, 5):
            clock[0] += 1
            writer.add_step(step, step_sums(loss, 0), 0.1, {})
        writer.close()
    assert len(list(tmp_path.iterdir())) == 2
    assert read_scalars(tmp_path)["train/loss"] == {1: 1, 2: 1, 3: 2, 4: 2}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("place", ["step", "close"])
def test_full_disk_is_one_warning(place, tmp_path, clock, caplog):
    writer = TrainingEvents(tmp_path, 1)
    # The file's buffer is written to a device that is always full.
    writer._writer.close()
    writer._writer._writer = open("/dev/full", "wb")  # noqa: SIM115 - the writer closes it
    for step in range(1, 1000 if place == "step" else 2):
        clock[0] += 0.01 if place == "close" else 1
        writer.add_step(step, step_sums(1.0, 0), 0.1, {"weight_norm/fc6": 1})
    writer.add_crops(1, np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 3)))
    if place == "step":
        writer.finish_training()
    writer.close()
    writer.close()
    [message] = [record.getMessage() for record in caplog.records]
    assert message == (
        f"cannot write to {tmp_path} ([Errno {errno.ENOSPC}] No space left on device): "
        "training goes on without events for TensorBoard"
    )
    assert caplog.records[0].levelno == logging.WARNING


def test_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(InputError, match=r"cannot write to .*/tensorboard \(.*leave out --tensorb"):
        TrainingEvents(tmp_path / "tensorboard", 1)


def test_missing_tensorboardx_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    message = r"^--tensorboard needs tensorboardX: run pip install -e '\.\[report\]' in a clone of"
    with pytest.raises(InputError, match=message):
        TrainingEvents(tmp_path, 1)
    assert not list(tmp_path.iterdir())
