"""A run that is stopped and resumed equals the undisturbed run to the bit, for each storage.

All randomness is on: dropout, scale jitter, mirroring and colour shift.
"""

import dataclasses
import json
import logging
import os
import signal

import jax
import numpy as np
import pytest

from tests.helpers.runs import make_config
from tests.helpers.tiny_data import encode, indices, noise
from tools.soak import result
from vgg_jax import evaluate, load, preset
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.evaluation.evaluate import load_evaluation
from vgg_jax.training.loop import fit
from vgg_jax.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("small_nets")


# Micro-batches, and a plateau that divides the learning rate after each epoch.
CHANGES = {
    "microbatch": 4,
    "schedule": "plateau",
    "drop_epochs": (),
    "patience": 1,
    "validation_fraction": 0.3,
}


def write_photos(root):
    for label in ("ants", "bees"):
        (root / label).mkdir(parents=True)
        for i in range(12):
            (root / label / f"{i}.png").write_bytes(encode(noise(20, 24, i)))
    return str(root)


@pytest.fixture
def config_and_data_dir(request, tmp_path, prepared):
    """The configuration and the data_dir of a run with the storage `request.param`."""
    if request.param == "digits":
        changes = {
            "net": "shallow",
            "image_size": 16,
            "scale": (16,),
            "fc": (8, 8),
            "epochs": 2,
            "batch_size": 512,
            "microbatch": 256,
            "schedule": "plateau",
            "drop_epochs": (),
        }
        return dataclasses.replace(preset("digits"), **changes), None
    if request.param in prepared:
        return make_config("numbers", **CHANGES), prepared[request.param]
    photos = write_photos(tmp_path / "data")
    return make_config(photos, cache=request.param == "cache", **CHANGES), None


def stopping_trainer():
    """A Trainer that is sent SIGTERM once in a step and once in a validation, over all runs."""
    signalled = set()

    def send_signal_once(place):
        if place not in signalled:
            signalled.add(place)
            os.kill(os.getpid(), signal.SIGTERM)

    class StoppingTrainer(Trainer):
        def train_step(self, state, batch):
            send_signal_once("step")
            return super().train_step(state, batch)

        def evaluate(self):
            send_signal_once("validation")
            return super().evaluate()

    return StoppingTrainer


@pytest.mark.slow
@pytest.mark.parametrize(
    "config_and_data_dir",
    ["tfrecord", "folder", "cache", "digits"],
    indirect=True,
)
def test_fit_resumes_each_storage_to_the_bit(config_and_data_dir, tmp_path, caplog):
    caplog.set_level(logging.INFO, "vgg_jax")
    config, data_dir = config_and_data_dir
    undisturbed = fit(config, tmp_path / "undisturbed", data_dir)
    trainer_class, workdir = stopping_trainer(), tmp_path / "stopped"
    runs = [fit(config, workdir, data_dir, trainer_class=trainer_class) for _ in range(3)]
    assert [run.stopped for run in runs] == [True, True, False]
    assert "resuming at epoch 1, batch 2 of" in caplog.text
    assert "resuming at epoch 1, its validation" in caplog.text
    learning_rates = {record["learning_rate"] for record in undisturbed.history}
    assert len(learning_rates) == (1 if config.data == "digits" else 2)
    arrays, records = result(workdir)
    expected_arrays, expected_records = result(tmp_path / "undisturbed")
    assert records == expected_records
    jax.tree.map(np.testing.assert_array_equal, arrays, expected_arrays)


@pytest.mark.slow
def test_fit_resumes_on_fewer_devices(tmp_path, monkeypatch):
    """A run moves from two devices to one: the same images in the same order, up to rounding."""
    assert len(jax.devices()) == 2
    changes = CHANGES | {"microbatch": None, "learning_rate": 1e-3}
    config = make_config(write_photos(tmp_path / "data"), **changes)
    order, num_devices = [], set()

    class RecordingTrainer(Trainer):
        stop_at = None

        def put_batch(self, batch):
            if len(order) == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            order.append([index for index in batch["index"].tolist() if index >= 0])
            num_devices.add(self.setup.mesh.size)
            return super().put_batch(batch)

    class StoppingTrainer(RecordingTrainer):
        stop_at = 4

    fit(config, tmp_path / "undisturbed", trainer_class=RecordingTrainer)
    expected_order = list(order)
    order.clear()
    assert fit(config, tmp_path / "moved", trainer_class=StoppingTrainer).stopped

    def make_mesh_of_one(batch_size, mesh_config):
        return make_mesh(batch_size, jax.devices()[:1])

    monkeypatch.setattr("vgg_jax.training.setup.make_mesh", make_mesh_of_one)
    fit(config, tmp_path / "moved", trainer_class=RecordingTrainer)
    assert order == expected_order
    assert num_devices == {1, 2}
    arrays, records = result(tmp_path / "moved")
    expected_arrays, expected_records = result(tmp_path / "undisturbed")
    for record, expected in zip(records[0], expected_records[0], strict=True):
        assert record["train"]["loss"] == pytest.approx(expected["train"]["loss"], rel=1e-4)
        assert record["validation"]["accuracy"] == expected["validation"]["accuracy"]

    def assert_close(array, expected):
        np.testing.assert_allclose(array, expected, rtol=1e-3, atol=1e-5)

    jax.tree.map(assert_close, arrays, expected_arrays)


@pytest.mark.slow
def test_run_of_version_1_keeps_its_validation_images(tmp_path, monkeypatch):
    """When it resumes and when it is evaluated. A new run divides by class."""
    data, workdir = write_photos(tmp_path / "data"), tmp_path / "run"
    config = make_config(data, validation_fraction=0.25, epochs=1)
    held_out = []

    class RecordingTrainer(Trainer):
        def __init__(self, setup, *args, **options):
            source = setup.validation
            held_out.append([source.file_name(index) for index in indices(source)])
            super().__init__(setup, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr("vgg_jax.training.setup.INPUT_VERSION", 1)
        fit(config, workdir, trainer_class=RecordingTrainer)
    path = workdir / "run.json"
    run = json.loads(path.read_text())
    assert run.pop("input_version") == 1
    path.write_text(json.dumps(run))  # 0.1.0 wrote no version
    fit(config, workdir, trainer_class=RecordingTrainer)
    fit(config, tmp_path / "new", trainer_class=RecordingTrainer)
    assert held_out[0] == held_out[1] != held_out[2]
    counts = [sum("/ants/" in name for name in names) for names in held_out]
    assert (
        counts[2] == 3 != counts[0]
        and json.loads((tmp_path / "new" / "run.json").read_text())["input_version"] == 2
    )
    evaluate(*load(workdir), protocol="center", out=tmp_path / "evaluated")
    assert load_evaluation(tmp_path / "evaluated" / "posteriors.npz").files.tolist() == held_out[0]
