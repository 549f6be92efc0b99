"""Divergence: no diverged state is saved, and a run may resume with half the learning rate."""

import dataclasses
import json
import logging
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.runs import make_config
from tests.helpers.tiny_data import encode, noise
from vgg_jax import InputError
from vgg_jax.configs.train import MAX_LR_HALVINGS
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.metrics import MetricSums
from vgg_jax.model import build_model
from vgg_jax.runs.checkpoint import CheckpointStore
from vgg_jax.runs.metadata import load_run
from vgg_jax.training.checkpointer import abstract_state
from vgg_jax.training.loop import fit
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import init_state
from vgg_jax.training.trainer import DivergedError, Trainer

pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture
def config(tmp_path):
    """Three steps an epoch, on 24 images. Its programs are those of `make_config`'s defaults."""
    for split, count in (("train", 12), ("val", 6)):
        for label in ("ants", "bees"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(encode(noise(20, 24, i)))
    return make_config(
        str(tmp_path / "data"), learning_rate=1e-3, schedule="plateau", drop_epochs=()
    )


def diverging_trainer(steps, with_loss=True):
    """A Trainer whose steps of these numbers, over all attempts, return NaN parameters.

    Their loss is NaN as well if `with_loss`.
    """

    class DivergingTrainer(Trainer):
        num_steps = 0

        def train_step(self, state, batch):
            type(self).num_steps += 1
            state, sums = super().train_step(state, batch)
            if self.num_steps in steps:
                params = jax.tree.map(lambda x: x + jnp.nan, state.params)
                state = dataclasses.replace(state, params=params)
                if with_loss:
                    sums = dataclasses.replace(sums, loss=sums.loss + jnp.nan)
            return state, sums

    return DivergingTrainer


def learning_rates(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["learning_rate"] for line in lines]


def extend_to_three_epochs(workdir):
    content = json.loads((workdir / "run.json").read_text())
    content["config"]["epochs"] = 3
    (workdir / "run.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_fit_halves_lr_after_divergence(config, tmp_path, caplog):
    """The run resumes from the end of the first epoch, and equals one with half the rate there."""
    caplog.set_level(logging.INFO, "vgg_jax")
    workdir = tmp_path / "diverging"
    result = fit(config, workdir, on_nan="halve", trainer_class=diverging_trainer({5}))
    assert learning_rates(workdir) == [1e-3, 5e-4, 5e-4]
    warnings = [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("vgg_jax") and record.levelno == logging.WARNING
    ]
    assert len(warnings) == 1
    assert warnings[0].startswith("the loss is not finite in epoch 2, in batch 2 (images ")
    assert "resuming at epoch 2, batch 1" in caplog.text
    assert not result.stopped

    class HalvingTrainer(Trainer):
        def next_learning_rate(self):
            num_epochs = len(self.progress.history)
            return None if num_epochs == 3 else 1e-3 / (1 + bool(num_epochs))

    expected = fit(config, tmp_path / "expected", trainer_class=HalvingTrainer)
    assert [record["train"] for record in result.history] == [
        record["train"] for record in expected.history
    ]


@pytest.mark.slow
def test_fit_restarts_after_divergence_before_save(config, tmp_path):
    fit(config, tmp_path / "run", on_nan="halve", trainer_class=diverging_trainer({2, 4}))
    assert learning_rates(tmp_path / "run") == [2.5e-4] * 3


@pytest.mark.slow
def test_halved_lr_survives_restart(config, tmp_path):
    two_epochs = dataclasses.replace(config, epochs=2)
    fit(two_epochs, tmp_path / "run", on_nan="halve", trainer_class=diverging_trainer({5}))
    extend_to_three_epochs(tmp_path / "run")
    fit(config, tmp_path / "run")
    assert learning_rates(tmp_path / "run") == [1e-3, 5e-4, 5e-4]


@pytest.mark.slow
def test_fit_stops_after_max_halvings(config, tmp_path):
    trainer_class = diverging_trainer(range(4, 10**6))
    with pytest.raises(DivergedError, match=r"epoch 2, in batch 1 .*learning rate 3\.125e-05"):
        fit(config, tmp_path / "run", on_nan="halve", trainer_class=trainer_class)
    assert 1e-3 / 2**MAX_LR_HALVINGS == 3.125e-5
    assert learning_rates(tmp_path / "run") == [1e-3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("on_nan", "with_loss"),
    [("stop", True), ("stop", False), pytest.param("halve", False, marks=pytest.mark.slow)],
)
def test_diverged_state_is_not_saved(on_nan, with_loss, config, tmp_path):
    """The run saves after each step. The loss of a step is computed before its update."""
    if with_loss:
        message = r"in batch 2 \(images .* or by the update of batch 1 \(images "
    else:
        message = r"epoch 2, by the update of batch 2 \(images "
    trainer_class = diverging_trainer(range(5, 10**6), with_loss)
    workdir = tmp_path / "run"
    with pytest.raises(DivergedError, match=message):
        fit(config, workdir, on_nan=on_nan, save_seconds=0, trainer_class=trainer_class)
    saved = load_run(workdir)
    state = init_state(build_model(saved.config, 2), make_optimizer(saved.config), 0, make_mesh(4))
    with CheckpointStore(workdir / "last", read_only=True) as last:
        restored, progress = last.restore(abstract_state(state))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((restored.params, restored.opt_state)))
    assert (len(progress["history"]), progress["batch"]) == (1, 1)


@pytest.mark.slow
def test_signal_during_divergence_stops_run(config, tmp_path):
    """A signal ends the run, which then does not resume with half the learning rate."""

    class SignalledTrainer(diverging_trainer({5})):
        def divergence_error(self, *args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            assert self.stop.wait(10)
            return super().divergence_error(*args, **kwargs)

    with pytest.raises(DivergedError):
        fit(config, tmp_path / "run", on_nan="halve", trainer_class=SignalledTrainer)
    assert learning_rates(tmp_path / "run") == [1e-3]


@pytest.mark.slow
def test_halving_deletes_later_best(config, tmp_path, monkeypatch):
    """The second epoch's best checkpoint was saved, but nothing to resume from after it."""
    monkeypatch.setattr("vgg_jax.training.trainer.all_finite", lambda _: True)
    workdir = tmp_path / "run"
    fit(dataclasses.replace(config, epochs=1), workdir)
    extend_to_three_epochs(workdir)
    shutil.copytree(workdir / "best" / "1", workdir / "best" / "2")

    class NeverBetterTrainer(diverging_trainer({1})):
        def evaluate(self):
            return MetricSums(loss=1.0, top1=0.0, top5=0.0, count=12.0)

    fit(config, workdir, on_nan="halve", trainer_class=NeverBetterTrainer)
    assert [path.name for path in (workdir / "best").glob("[0-9]*")] == ["1"]


def test_fit_rejects_invalid_options(config, tmp_path):
    with pytest.raises(InputError, match="on_nan is 'go on': expected one of stop, halve"):
        fit(config, tmp_path, on_nan="go on")
    with pytest.raises(InputError, match="save_seconds is -1: expected 0 or more"):
        fit(config, tmp_path, save_seconds=-1)


@pytest.mark.slow
def test_debug_nans_names_layer_and_step(config, tmp_path):
    """At this learning rate the first update is so large that the second step overflows."""
    message = (
        r"the output of (conv|fc)\w+ is not finite in epoch 1, "
        r"in batch 2 \(images .*train/ants/\d.png"
    )
    config = dataclasses.replace(config, learning_rate=1e18, batch_norm=False)
    with pytest.raises(DivergedError, match=message):
        fit(config, tmp_path / "run", debug_nans=True)
