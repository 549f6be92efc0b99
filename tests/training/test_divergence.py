"""A loss that is not finite: nothing of it is kept, the layer is named, and a run may go back and on with half the rate."""

import dataclasses
import json
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vgg_jax.training.loop
from tests.helpers.tiny_data import encode, noise
from vgg_jax import IMAGENET, InputError, TrainConfig
from vgg_jax.configs.train import MAX_LR_HALVINGS
from vgg_jax.distributed.sharding import make_mesh, shard_batch
from vgg_jax.model import build_model
from vgg_jax.runs.checkpoint import CheckpointStore
from vgg_jax.runs.metadata import load_run
from vgg_jax.training.checkpointer import abstract_state
from vgg_jax.training.loop import DivergedError, fit
from vgg_jax.training.nan_check import first_nonfinite
from vgg_jax.training.optimizer import sgd
from vgg_jax.training.step import init_state

pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture
def config(tmp_path):
    for split in ("train", "val"):
        for label in ("ants", "bees"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(6):
                (tmp_path / "data" / split / label / f"{i}.png").write_bytes(
                    encode(noise(20, 24, i))
                )
    return TrainConfig(
        data=str(tmp_path / "data"), net="shallow", fc=(8, 8), image_size=16, scale=(16,), batch_size=4, epochs=3, learning_rate=1e-3
    )  # fmt: skip


def poisoned(monkeypatch, calls, loss=True):
    """The step whose number, over all attempts, is among these gives parameters that are not finite, and a loss that is not."""
    done, compiled = 0, vgg_jax.training.loop.compile_steps

    def compile_steps(*arguments, **options):
        train_step, eval_step = compiled(*arguments, **options)

        def step(state, batch):
            nonlocal done
            done += 1
            state, sums = train_step(state, batch)
            if done in calls:
                sums = dataclasses.replace(sums, loss=sums.loss + jnp.nan) if loss else sums
                state = dataclasses.replace(
                    state, params=jax.tree.map(lambda x: x + jnp.nan, state.params)
                )
            return state, sums

        step.lower = train_step.lower
        return step, eval_step

    monkeypatch.setattr(vgg_jax.training.loop, "compile_steps", compile_steps)


def rates(workdir):
    return [
        json.loads(line)["learning_rate"]
        for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


def longer(workdir):
    """Has the run go on to its third epoch."""
    content = json.loads((workdir / "run.json").read_text())
    content["config"]["epochs"] = 3
    (workdir / "run.json").write_text(json.dumps(content))


def test_a_run_goes_back_with_half_the_rate(config, tmp_path, monkeypatch, capsys):
    """From the end of the first epoch, which is three steps; what follows is a run at half the rate from there."""
    poisoned(monkeypatch, {5})
    outcome = fit(config, tmp_path / "w", on_nan="halve")
    assert rates(tmp_path / "w") == [1e-3, 5e-4, 5e-4]
    captured = capsys.readouterr()
    assert "warning: the loss is not finite in epoch 2, in batch 2 (of " in captured.err
    assert "going on at epoch 2, batch 1" in captured.out
    assert not outcome.stopped
    monkeypatch.undo()
    monkeypatch.setattr(
        vgg_jax.training.loop,
        "learning_rate",
        lambda _, done: None if len(done) == 3 else 1e-3 / (1 + bool(done)),
    )
    expected = fit(config, tmp_path / "expected").history
    assert [record["train"] for record in outcome.history] == [
        record["train"] for record in expected
    ]


def test_before_anything_is_saved_it_begins_again(config, tmp_path, monkeypatch):
    poisoned(monkeypatch, {2, 4})
    fit(config, tmp_path / "w", on_nan="halve")
    assert rates(tmp_path / "w") == [2.5e-4] * 3


def test_the_halved_rate_outlives_the_process(config, tmp_path, monkeypatch):
    poisoned(monkeypatch, {5})
    one = dataclasses.replace(config, epochs=2)
    fit(one, tmp_path / "w", on_nan="halve")
    longer(tmp_path / "w")
    fit(config, tmp_path / "w")
    assert rates(tmp_path / "w") == [1e-3, 5e-4, 5e-4]


@pytest.mark.slow
def test_it_goes_back_so_many_times_and_no_more(config, tmp_path, monkeypatch):
    poisoned(monkeypatch, range(4, 10**6))
    with pytest.raises(DivergedError, match=r"epoch 2, in batch 1 .*learning rate 3\.125e-05"):
        fit(config, tmp_path / "w", on_nan="halve")
    assert 1e-3 / 2**MAX_LR_HALVINGS == 3.125e-5
    assert rates(tmp_path / "w") == [1e-3]


@pytest.mark.parametrize(
    ("on_nan", "loss"),
    [("stop", True), ("stop", False), pytest.param("halve", False, marks=pytest.mark.slow)],
)
def test_nothing_that_is_not_finite_is_saved(on_nan, loss, config, tmp_path, monkeypatch):
    """With a save behind each step. The loss of a step is the one before its update."""
    poisoned(monkeypatch, range(5, 10**6), loss)
    with pytest.raises(
        DivergedError,
        match=r"in batch 2 \(of .* or by the update of batch 1 \("
        if loss
        else r"epoch 2, by the update of batch 2 \(of",
    ):
        fit(config, tmp_path / "w", on_nan=on_nan, save_seconds=0)
    monkeypatch.undo()
    run = load_run(tmp_path / "w")
    state = init_state(build_model(run.config, 2), sgd(run.config), 0, make_mesh(4))
    with CheckpointStore(tmp_path / "w" / "last", read_only=True) as last:
        restored, progress = last.restore(abstract_state(state))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((restored.params, restored.opt_state)))
    assert (len(progress["history"]), progress["batch"]) == (1, 1)


def test_a_signal_is_not_lost_in_a_divergence(config, tmp_path, monkeypatch):
    """It ends the run, which does not begin again with half the rate."""
    poisoned(monkeypatch, {5})
    plain = vgg_jax.training.loop.accumulate

    def add(sums, new, bar):
        if new is not None and not np.isfinite(new.loss):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
        return plain(sums, new, bar)

    monkeypatch.setattr(vgg_jax.training.loop, "accumulate", add)
    with pytest.raises(DivergedError):
        fit(config, tmp_path / "w", on_nan="halve")
    assert rates(tmp_path / "w") == [1e-3]


def test_the_best_net_of_what_is_given_up_is_given_up(config, tmp_path, monkeypatch):
    """The second epoch's net was saved, what to go on from was not: behind going back to the first it is the best no longer."""
    monkeypatch.setattr(vgg_jax.training.loop, "all_finite", lambda _: True)
    fit(dataclasses.replace(config, epochs=1), tmp_path / "w")
    longer(tmp_path / "w")
    shutil.copytree(tmp_path / "w" / "best" / "1", tmp_path / "w" / "best" / "2")
    poisoned(monkeypatch, {1})
    monkeypatch.setattr(
        vgg_jax.training.loop,
        "validate",
        lambda *_: vgg_jax.training.loop.MetricSums(loss=1.0, top1=0.0, top5=0.0, count=12.0),
    )
    fit(config, tmp_path / "w", on_nan="halve")
    assert [path.name for path in (tmp_path / "w" / "best").glob("[0-9]*")] == ["1"]


def test_what_is_neither_stop_nor_halve(config, tmp_path):
    with pytest.raises(InputError, match="on_nan is 'go on': expected one of stop, halve"):
        fit(config, tmp_path, on_nan="go on")
    with pytest.raises(InputError, match="save_seconds is -1: expected 0 or more"):
        fit(config, tmp_path, save_seconds=-1)


BATCH = {
    "image": np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8),
    "colour_shift": np.zeros((4, 3), np.float32),
    "label": np.array([0, 1, 0, 1], np.int32),
    "mask": np.ones(4, bool),
}


@pytest.mark.parametrize("layer", ["conv1_1", "bn1_1", "conv2_1", "fc6", "fc8"])
def test_the_layer_whose_output_is_not_finite_is_named(layer, config):
    config = dataclasses.replace(config, batch_norm=True)
    model, mesh = build_model(config, 2), make_mesh(4)
    state = init_state(model, sgd(config), 0, mesh)
    params = {**state.params, layer: jax.tree.map(lambda x: x + jnp.inf, state.params[layer])}
    state = dataclasses.replace(state, params=params)
    found = first_nonfinite(
        state, shard_batch(BATCH, mesh), model=model, mean_rgb=IMAGENET.mean_rgb
    )
    assert found == f"the output of {layer}"


def test_the_gradient_that_is_not_finite_is_named(config):
    """Values of 1e22 behind fc6 and of 1 behind fc7: the products that make fc7's gradient are finite, those that make fc6's are not."""
    model, mesh = build_model(dataclasses.replace(config, dropout_rate=0.0), 2), make_mesh(4)
    state = init_state(model, sgd(config), 0, mesh)
    params = dict(state.params)
    params["fc7"] = {"kernel": jnp.full_like(params["fc7"]["kernel"], 1e-20), "bias": jnp.zeros(8)}
    params["fc8"] = {"kernel": params["fc8"]["kernel"] * 1e30, "bias": jnp.zeros(2)}
    params["fc6"] = {"kernel": jnp.zeros_like(params["fc6"]["kernel"]), "bias": jnp.full(8, 1e-12)}
    state = dataclasses.replace(state, params=params)
    batch = shard_batch(BATCH, mesh)
    assert first_nonfinite(state, batch, model=model, mean_rgb=IMAGENET.mean_rgb) == "the update"
    params["fc6"] = {"kernel": params["fc6"]["kernel"], "bias": jnp.full(8, 1e9)}
    found = first_nonfinite(
        dataclasses.replace(state, params=params), batch, model=model, mean_rgb=IMAGENET.mean_rgb
    )
    assert found == "the gradient of fc7"


def test_debug_nans_names_the_layer_and_the_step(config, tmp_path):
    """A rate at which the first update is so large that the second step overflows."""
    with pytest.raises(
        DivergedError,
        match=r"the output of (conv|fc)\w+ is not finite in epoch 1, in batch 2 \(of .*train/ants/\d.png",
    ):
        fit(dataclasses.replace(config, learning_rate=1e18), tmp_path / "w", debug_nans=True)
