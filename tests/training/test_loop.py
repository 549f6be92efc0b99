"""Runs from the first epoch to the last, and runs that are stopped and resumed."""

import dataclasses
import json
import logging
import os
import re
import shlex
import shutil
import signal
import threading
import time

import jax
import numpy as np
import pytest

import vgg_jax
import vgg_jax.training.loop
import vgg_jax.training.trainer
from tests.helpers.compare import log_compiles
from tests.helpers.runs import load_last_arrays, make_config, without_times
from vgg_jax import InputError, cli, compiler_options
from vgg_jax.cli.exit_codes import explain
from vgg_jax.cli.parser import parser
from vgg_jax.data import eval_batches, measure_colours, open_train_val
from vgg_jax.distributed.multihost import ProcessLostError
from vgg_jax.errors import OutOfMemoryError
from vgg_jax.metrics import MetricSums
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.runs.checkpoint import CheckpointSaveError
from vgg_jax.training.loop import fit
from vgg_jax.training.step import init_state
from vgg_jax.training.trainer import FitResult, Trainer

pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture(autouse=True)
def log_info(caplog):
    caplog.set_level(logging.INFO, "vgg_jax")


def test_fit_records_every_image(finished_run):
    workdir, history = finished_run
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history
    assert [record["epoch"] for record in history] == [1, 2, 3]
    counts = {(record["train"]["count"], record["validation"]["count"]) for record in history}
    assert counts == {(22, 7)}


@pytest.mark.slow
def test_fit_from_cache_equals_files(finished_run, photos, tmp_path):
    history = fit(make_config(photos, cache=True), tmp_path).history
    for cached, expected in zip(history, finished_run[1], strict=True):
        assert cached["train"]["loss"] == pytest.approx(expected["train"]["loss"], rel=1e-3)
        assert cached["validation"]["accuracy"] == expected["validation"]["accuracy"]


@pytest.mark.slow
def test_fit_stopped_before_first_step(finished_run, photos, tmp_path, monkeypatch):
    """In the initialisation, and while the step is compiled. The run then starts as a new one."""

    def interrupted_init_state(*args):
        signal.raise_signal(signal.SIGINT)
        return init_state(*args)

    with monkeypatch.context() as patch:
        patch.setattr(vgg_jax.training.trainer, "init_state", interrupted_init_state)
        assert fit(make_config(photos), tmp_path) == FitResult([], stopped=True)

    may_finish, signal_times = threading.Event(), []

    class SlowlyCompilingTrainer(Trainer):
        def compile_train_step(self, state, batch):
            signal_times.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
            may_finish.wait(60)

    result = fit(make_config(photos), tmp_path, trainer_class=SlowlyCompilingTrainer)
    assert result == FitResult([], stopped=True)
    assert time.monotonic() - signal_times[0] < 30
    may_finish.set()
    history = fit(make_config(photos), tmp_path).history
    assert without_times(history) == without_times(finished_run[1])


@pytest.mark.slow
@pytest.mark.parametrize("free", [1e5, 1e12])
def test_fit_warns_before_step_that_does_not_fit(free, photos, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(vgg_jax.training.trainer, "free_device_memory", lambda device: free)
    fit(make_config(photos, epochs=1), tmp_path)
    warnings = [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and record.name.startswith("vgg_jax")
    ]
    message = "GB on each device, and 0.0 GB are free: no --microbatch fits: pass a smaller"
    assert [message in text for text in warnings] == ([True] if free < 1e12 else [])


@pytest.mark.slow
def test_fit_explains_lack_of_memory(photos, tmp_path):
    """The run can go on with the micro-batch that the message names."""

    class HungryTrainer(Trainer):
        def train_step(self, state, batch):
            if self.progress.history and not self.setup.config.microbatch:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9")
            return super().train_step(state, batch)

    config = make_config(photos)
    message = r"^out of memory \(RESOURCE_EXHAUSTED: .*\): --microbatch 4 fits, and also resumes"
    with pytest.raises(OutOfMemoryError, match=message) as error:
        fit(config, tmp_path, trainer_class=HungryTrainer)
    assert explain(error.value, {})[0] == 71
    result = fit(make_config(photos, microbatch=4), tmp_path, trainer_class=HungryTrainer)
    assert len(result.history) == 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "place", ["vgg_jax.data.file_split.read_header", "vgg_jax.data.cache.decode"]
)
def test_fit_stops_while_data_is_read(place, number, finished_run, photos, tmp_path, monkeypatch):
    """The files are looked at, or read into memory, for a minute."""
    may_finish = threading.Event()

    def read_slowly(*args):
        os.kill(os.getpid(), number)
        may_finish.wait(60)
        return b""

    config = make_config(photos, cache=True)
    with monkeypatch.context() as patch:
        patch.setattr(place, read_slowly)
        start = time.monotonic()
        assert fit(config, tmp_path / "run") == FitResult([], stopped=True)
        assert time.monotonic() - start < 30
        may_finish.set()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    history = fit(config, tmp_path / "run").history
    assert without_times(history) == without_times(finished_run[1])


@pytest.mark.slow
@pytest.mark.parametrize("bottleneck", ["input", "device"])
def test_fit_logs_bottleneck(photos, tmp_path, caplog, bottleneck):
    class SlowTrainer(Trainer):
        def make_batches(self):
            is_running = super().make_batches()
            if bottleneck == "input":
                self.batches = self.delay(self.batches)
            return is_running

        def delay(self, batches):
            for batch in batches:
                time.sleep(0.2)
                yield batch

        def train_step(self, state, batch):
            time.sleep(0.2 if bottleneck == "device" else 0)
            return super().train_step(state, batch)

    config = make_config(photos, epochs=2)
    [_, record] = fit(config, tmp_path, trainer_class=SlowTrainer).history
    share = record["input_wait_seconds"] / record["seconds"]
    assert share > 0.4 if bottleneck == "input" else share < 0.1
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("vgg_jax")]
    assert f"bound by the {bottleneck} (waited " in lines[-2]


def test_load_returns_best_epoch(finished_run, photos):
    workdir, history = finished_run
    model, variables, metadata = vgg_jax.load(workdir)
    best = max(history, key=lambda record: record["validation"]["accuracy"])
    assert metadata["epoch"] == best["epoch"]
    assert metadata["classes"] == ("blue", "red")
    assert metadata["config"] == make_config(photos)
    num_correct = num_images = 0
    _, validation = open_train_val(photos)
    apply = jax.jit(model.apply, compiler_options=compiler_options())
    for batch in eval_batches(validation, metadata["config"], 3):
        images = subtract_mean(batch["image"], metadata["preprocessing"]["mean_rgb"])
        is_correct = np.asarray(apply(variables, images)).argmax(1) == batch["label"]
        num_correct += (is_correct & batch["mask"]).sum()
        num_images += batch["mask"].sum()
    assert num_images == 7
    assert num_correct / num_images == pytest.approx(best["validation"]["accuracy"])


@pytest.mark.slow
def test_fit_compiles_once_and_donates_state(photos, tmp_path, caplog):
    """Over three epochs and a change of the learning rate."""
    states = []

    class RecordingTrainer(Trainer):
        def train_step(self, state, batch):
            states.append(state)
            return super().train_step(state, batch)

    with log_compiles(caplog) as count:
        history = fit(make_config(photos), tmp_path, trainer_class=RecordingTrainer).history
        assert (count("train_step"), count("eval_step")) == (1, 1)
    assert [record["learning_rate"] for record in history] == pytest.approx([1e-2, 1e-3, 1e-3])
    assert len(states) == 9
    assert all(state.params["fc6"]["kernel"].is_deleted() for state in states)


class KilledError(BaseException):
    """Stands for kill -9: nothing is saved after it."""


class InterruptedTrainer(Trainer):
    """Is sent SIGTERM, or killed, at batches of these numbers, over all runs."""

    stop_at: tuple[int, ...] = ()
    kill_at: tuple[int, ...] = ()
    num_batches = 0

    def put_batch(self, batch):
        cls = type(self)
        cls.num_batches += 1
        if cls.num_batches in cls.kill_at:
            raise KilledError
        if cls.num_batches in cls.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().put_batch(batch)


def assert_equal_runs(workdir, history, finished_run):
    """Parameters, momentum, statistics and metrics are equal to the bit."""
    expected_workdir, expected_history = finished_run
    assert without_times(history) == without_times(expected_history)
    arrays, expected = load_last_arrays(workdir), load_last_arrays(expected_workdir)
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)


def test_fit_resumes_to_the_bit(photos, finished_run, tmp_path):
    """Stopped in an epoch, in its validation, and in the second epoch; with all that is random.

    An epoch has 3 batches of training and 1 of validation. Training uses the batch at which the
    signal comes, and validation starts again.
    """

    class StoppedTrainer(InterruptedTrainer):
        stop_at = (2, 4, 7)

    config = make_config(photos)
    for num_batches, num_epochs in ((2, 0), (4, 0), (7, 1)):
        result = fit(config, tmp_path, trainer_class=StoppedTrainer)
        assert result.stopped
        assert len(result.history) == num_epochs
        assert StoppedTrainer.num_batches == num_batches
    result = fit(config, tmp_path, trainer_class=StoppedTrainer)
    assert not result.stopped
    assert StoppedTrainer.num_batches == 13
    assert_equal_runs(tmp_path, result.history, finished_run)


@pytest.mark.slow
def test_fit_resumes_to_the_bit_after_kill(photos, finished_run, tmp_path):
    """The batch at which the process is killed comes again."""

    class KilledTrainer(InterruptedTrainer):
        kill_at = (3,)

    config = make_config(photos)
    with pytest.raises(KilledError):
        fit(config, tmp_path, save_seconds=0, trainer_class=KilledTrainer)
    result = fit(config, tmp_path, trainer_class=KilledTrainer)
    assert not result.stopped
    assert KilledTrainer.num_batches == 13
    assert_equal_runs(tmp_path, result.history, finished_run)


@pytest.mark.slow
def test_fit_measures_colours_once(photos, tmp_path, monkeypatch):
    config = make_config(photos, statistics="measure", epochs=1)

    class UncompiledTrainer(Trainer):
        """The mean is a constant of the programs, so they would be compiled for it."""

        def compile_train_step(self, state, batch):
            pass

        def train_step(self, state, batch):
            return state, MetricSums(1.0, 0.0, 0.0, float(batch["mask"].sum()))

        def evaluate(self):
            return MetricSums(1.0, 0.0, 0.0, 7.0)

    class StoppedTrainer(UncompiledTrainer):
        def evaluate(self):
            return None

    assert fit(config, tmp_path, trainer_class=StoppedTrainer).stopped

    def fail(*args, **kwargs):
        pytest.fail("measured again")

    monkeypatch.setattr("vgg_jax.training.setup.measure_colours", fail)
    fit(config, tmp_path, trainer_class=UncompiledTrainer)
    _, _, metadata = vgg_jax.load(tmp_path)
    expected = measure_colours(open_train_val(photos)[0]).pixel_mean
    assert metadata["preprocessing"]["mean_rgb"] == pytest.approx(tuple(expected))
    assert expected[0] > 100  # not ImageNet's mean


@pytest.mark.parametrize(
    ("outcome", "code", "num_lines"),
    [
        (FitResult([], True), 75, 0),
        (FitResult([], False), 0, 0),
        (KeyboardInterrupt(), 130, 1),
        (OSError(28, "full"), 2, 1),
        (CheckpointSaveError("full"), 74, 1),
        (ProcessLostError("gone"), 76, 1),
    ],
)
def test_train_exit_codes(outcome, code, num_lines, monkeypatch, capsys):
    def fake_fit(*args, **kwargs):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(vgg_jax.training.loop, "fit", fake_fit)
    workdir = "runs/my digits"
    command = ["train", "--no-compilation-cache", "--data-dir", "my data"]
    assert cli.main([*command, "--workdir", workdir]) == code
    out, err = capsys.readouterr()
    assert err.count("\n") == num_lines
    commands = [shlex.split(line.split(":", 1)[1])[:3] for line in out.splitlines()]
    use = ("evaluate", "predict", "export") if code == 0 else ()
    assert commands == [["vgg-jax", name, workdir] for name in use]
    for line in out.splitlines():
        parser().parse_args(shlex.split(line.split(":", 1)[1])[1:])
    assert ("--data-dir 'my data'" in out) == (code == 0)


def test_fit_does_not_repeat_finished_run(finished_run, photos, caplog):
    workdir, history = finished_run
    again = fit(make_config(photos), workdir).history
    assert without_times(again) == without_times(history)
    text = "finished in epoch 3, so there is nothing to train; more --epochs would go on"
    assert text in caplog.text
    assert "resuming" not in caplog.text
    assert "done: best validation accuracy" in caplog.text


@pytest.mark.slow
def test_fit_resumes_moved_data_with_more_epochs(finished_run, photos, tmp_path, caplog):
    """A grown run equals the one that had all epochs from the start, to the bit."""
    shutil.copytree(photos, tmp_path / "moved")
    config = make_config(photos, epochs=2)
    history = fit(config, tmp_path / "run", command="vgg-jax train").history
    assert len(history) == 2
    moved = make_config(str(tmp_path / "moved"), cache=True)
    result = fit(moved, tmp_path / "run", command="vgg-jax train --epochs 3")
    assert "epochs was 2 and is 3" in caplog.text
    workdir, expected_history = finished_run
    assert without_times(result.history) == without_times(expected_history)
    arrays, expected = load_last_arrays(tmp_path / "run"), load_last_arrays(workdir)
    jax.tree.map(np.testing.assert_array_equal, arrays, expected)
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["config"]["data"] == moved.data
    assert content["config"]["epochs"] == 3
    assert content["command"] == "vgg-jax train"


def test_fit_warns_of_changes_that_matter(finished_run, photos, tmp_path, caplog):
    """A micro-batch matters to batch normalisation, and a cache to small images."""
    shutil.copytree(finished_run[0], tmp_path / "copy")
    fit(make_config(photos, microbatch=4, cache=True), tmp_path / "copy")
    assert "batch normalisation uses the statistics of a micro-batch" in caplog.text
    assert "differ by at most one grey level" in caplog.text


def test_fit_rejects_other_config(finished_run, photos):
    workdir, _ = finished_run
    with pytest.raises(InputError, match=r"seed is 0 in run\.json and 1 now; .*--workdir") as error:
        fit(make_config(photos, seed=1, momentum=0.5), workdir)
    assert "momentum is 0.9 in run.json and 0.5 now" in str(error.value)
    assert "epochs" not in str(error.value)


def test_fit_rejects_other_storage(finished_run, photos, tmp_path):
    shutil.copytree(finished_run[0], tmp_path / "copy")
    path = tmp_path / "copy" / "run.json"
    changes = {"storage": "numbers/1.0.0 tfrecord", "train_size": 21}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    message = (
        r"storage is 'numbers/1.0.0 tfrecord' in run\.json and 'folder, names [0-9a-f]+' now; "
        r"train_size is 21 in run\.json and 22 now"
    )
    with pytest.raises(InputError, match=message):
        fit(make_config(photos), tmp_path / "copy")


@pytest.mark.slow
def test_fit_micro_batches_see_every_image(photos, tmp_path):
    result = fit(make_config(photos, microbatch=2, epochs=1, batch_norm=False), tmp_path)
    assert result.history[0]["train"]["count"] == 22


@pytest.mark.parametrize(
    "batch_size",
    ["8", pytest.param("22", marks=pytest.mark.slow)],
    ids=["second_step", "only_step"],
)
def test_train_does_not_save_divergence(batch_size, photos, tmp_path, capsys):
    # With batches of 8, the programs are those of `make_config`.
    flags = f"--net shallow --image-size 16 --scale 18 --fc 24 16 --batch-size {batch_size}"
    flags += " --batch-norm"
    workdir = tmp_path / "run"
    argv = ["train", photos, *flags.split(), "--learning-rate", "1e20", "--workdir", str(workdir)]
    assert cli.main(argv) == 4
    message = capsys.readouterr().err
    assert "is not finite" in message
    assert "epoch 1" in message
    # The loss of the second batch is the first to diverge. The message names its eight files and
    # those of the update before it.
    num_files = len(re.findall(r"train/\w+/\d+\.jpg", message))
    assert num_files == (16 if batch_size == "8" else 8)
    assert ("in batch 2 (images" in message) == (batch_size == "8")
    assert "by the update of batch 1 (images" in message
    assert "--learning-rate" in message
    assert not list(workdir.glob("*/[0-9]*"))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["train/red/3.jpg", "val/red/0.jpg"])
def test_fit_resumes_after_corrupt_image(file, photos, tmp_path, caplog):
    """The message names the file. With it restored, the run equals an undisturbed one."""
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    content = (data / file).read_bytes()
    (data / file).write_bytes(content[:200])
    with pytest.raises(InputError, match=file):
        fit(make_config(str(data), batch_size=2), tmp_path / "run")
    assert "saved in" in caplog.text
    (data / file).write_bytes(content)
    history = fit(make_config(str(data), batch_size=2), tmp_path / "run").history
    assert "resuming at epoch 1" in caplog.text
    undisturbed = fit(make_config(photos, batch_size=2), tmp_path / "undisturbed").history
    assert without_times(history) == without_times(undisturbed)


@pytest.mark.slow
def test_fit_learns_digits(tmp_path):
    config = dataclasses.replace(
        vgg_jax.preset("digits"),
        net="deep",
        image_size=16,
        scale=(16,),
        fc=(64, 64),
        epochs=6,
        drop_epochs=(5,),
    )
    accuracies = [record["validation"]["accuracy"] for record in fit(config, tmp_path).history]
    assert max(accuracies) > 0.9
