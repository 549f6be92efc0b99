"""Runs from the first epoch to the last, stopped and continued, on small images made here."""

import dataclasses
import json
import math
import os
import signal

import jax
import numpy as np
import pytest
from PIL import Image

import vgg_jax
import vgg_jax.train
from tests.tiny import TINY
from vgg_jax import CONFIGS, InputError, TrainConfig, cli
from vgg_jax.configs import CHOICES
from vgg_jax.data import eval_batches, open_splits
from vgg_jax.train import fit
from vgg_jax.train_step import preprocess


@pytest.fixture(autouse=True)
def tiny_net(monkeypatch):
    monkeypatch.setitem(CONFIGS, "tiny", TINY)
    monkeypatch.setitem(CHOICES, "net", (*CHOICES["net"], "tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photos of two kinds, reddish and bluish noise, of several sizes: 22 for training, 7 for validation."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 11), ("val", 3)):
        for label, colour in enumerate(("blue", "red")):
            (root / split / colour).mkdir(parents=True)
            for i in range(count + label * (split == "val")):
                pixels = rng.integers(0, 200, (36 + i, 40, 3))
                pixels[..., 0 if colour == "red" else 2] += 55
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / colour / f"{i}.jpg")
    return str(root)


def config(folder, **changes):
    values = {
        "data": folder, "net": "tiny", "fc": (24, 16), "batch_norm": True, "image_size": 32, "scale": (36, 44), "batch_size": 8,
        "epochs": 3, "learning_rate": 1e-2,
    }  # fmt: skip
    return TrainConfig(**values | changes)


def lasting(history):
    """What of the records does not depend on the clock."""
    return [{name: value for name, value in record.items() if name not in ("time", "seconds", "images_per_second")} for record in history]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run of three epochs and its history."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "tiny", TINY)
        patch.setitem(CHOICES, "net", (*CHOICES["net"], "tiny"))
        workdir = tmp_path_factory.mktemp("run")
        return workdir, fit(config(folder), workdir).history


def test_each_epoch_is_recorded_and_counts_every_image(finished):
    workdir, history = finished
    assert [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()] == history
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert {(record["train"]["count"], record["validation"]["count"]) for record in history} == {(22, 7)}


def test_load_gives_the_net_of_the_best_epoch(finished, folder):
    workdir, history = finished
    model, variables, metadata = vgg_jax.load(workdir)
    best = max(history, key=lambda record: record["validation"]["accuracy"])
    assert metadata["epoch"] == best["epoch"]
    assert metadata["classes"] == ("blue", "red")
    assert metadata["config"] == config(folder)
    right = total = 0
    _, validation = open_splits(folder)
    for batch in eval_batches(validation, metadata["config"], 3):
        logits = model.apply(variables, preprocess(batch["image"], metadata["preprocessing"]["mean_rgb"]))
        right += ((np.asarray(logits).argmax(1) == batch["label"]) & batch["mask"]).sum()
        total += batch["mask"].sum()
    assert total == 7
    assert right / total == pytest.approx(best["validation"]["accuracy"])


@pytest.mark.parametrize(
    "stop_at",
    [
        pytest.param(2, id="mid_epoch"),
        pytest.param(4, id="in_validation", marks=pytest.mark.slow),
        pytest.param(5, id="in_second_epoch", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(stop_at, folder, finished, tmp_path, monkeypatch):
    """Bit by bit: parameters, momentum, statistics, metrics; with dropout, scale jitter, flips and colour shift on."""
    calls, send = 0, vgg_jax.train.on_devices

    def interrupted(batch, mesh):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return send(batch, mesh)

    monkeypatch.setattr(vgg_jax.train, "on_devices", interrupted)
    outcome = fit(config(folder), tmp_path)
    assert outcome.stopped
    assert len(outcome.history) == (stop_at == 5)
    outcome = fit(config(folder), tmp_path)
    assert not outcome.stopped
    workdir, history = finished
    assert lasting(outcome.history) == lasting(history)
    one, other = (arrays_of_last(path, folder) for path in (workdir, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def arrays_of_last(workdir, folder):
    """Everything that the last checkpoint holds, as arrays."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(workdir / "last") as manager:
        state = manager.restore(manager.latest_step(), args=ocp.args.Composite(arrays=ocp.args.StandardRestore())).arrays
    return jax.tree.map(np.asarray, {name: value for name, value in state.items() if name != "key"})


def test_a_finished_run_is_not_trained_again(finished, folder, capsys):
    workdir, history = finished
    assert lasting(fit(config(folder), workdir).history) == lasting(history)
    assert "done: best validation accuracy" in capsys.readouterr().out


def test_another_configuration_is_refused_with_the_differences(finished, folder):
    workdir, _ = finished
    with pytest.raises(InputError, match=r"seed is 0 there and 1 here; .*--workdir") as error:
        fit(config(folder, seed=1, momentum=0.5), workdir)
    assert "momentum is 0.9 there and 0.5 here" in str(error.value)
    assert "epochs" not in str(error.value)


def test_microbatches_train_on_every_image(folder, tmp_path):
    outcome = fit(config(folder, microbatch=2, epochs=1, batch_norm=False), tmp_path)
    assert outcome.history[0]["train"]["count"] == 22


def test_start_from_another_run_says_what_came(finished, folder, tmp_path, capsys):
    workdir, _ = finished
    fit(config(folder, init_from=str(workdir), epochs=1, learning_rate=1e-9), tmp_path)
    out = capsys.readouterr().out
    assert "new: nothing" in out
    _, source, _ = vgg_jax.load(workdir)
    _, copy, _ = vgg_jax.load(tmp_path)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), source["params"], copy["params"])


@pytest.mark.parametrize("batch_size", ["8", "22"], ids=["in_the_second_step", "by_the_only_step"])
def test_divergence_is_not_saved(batch_size, folder, tmp_path, capsys):
    argv = ["train", folder, "--net", "tiny", "--image-size", "32", "--scale", "36", "--fc", "24", "16", "--batch-size", batch_size]
    code = cli.main([*argv, "--learning-rate", "1e20", "--workdir", str(tmp_path / "w")])
    err = capsys.readouterr().err
    assert code == 4
    assert "is not finite" in err
    assert "epoch 1" in err
    assert "--learning-rate" in err
    assert not list((tmp_path / "w").glob("*/[0-9]*"))


def test_loss_at_chance_is_named_once():
    def history(*losses):
        return [{"train": {"loss": loss}} for loss in losses]

    chance = math.log(10)
    assert not vgg_jax.train.stuck(history(chance), 10)
    assert vgg_jax.train.stuck(history(chance, 1.001 * chance), 10)
    assert not vgg_jax.train.stuck(history(chance, chance, chance), 10)
    assert not vgg_jax.train.stuck(history(chance, 0.9 * chance), 10)
    assert "ln(10) = 2.303" in vgg_jax.train.advice(10)
    assert "--init-from" in vgg_jax.train.advice(10)


def test_a_corrupt_image_is_named(tmp_path, capsys):
    for colour in ("blue", "red"):
        (tmp_path / "data" / "train" / colour).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (40, 40), colour).save(tmp_path / "data" / "train" / colour / f"{i}.jpg")
    bad = tmp_path / "data" / "train" / "red" / "3.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    argv = [
        "train",
        str(tmp_path / "data"),
        "--net",
        "tiny",
        "--image-size",
        "32",
        "--scale",
        "36",
        "--fc",
        "24",
        "16",
        "--batch-size",
        "2",
    ]
    argv += ["--epochs", "1", "--workdir", str(tmp_path / "w")]
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert str(bad) in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_tiny_net_learns_the_digits(tmp_path):
    digits = dataclasses.replace(vgg_jax.preset("digits"), net="tiny", fc=(64, 64), epochs=6)
    accuracies = [record["validation"]["accuracy"] for record in fit(digits, tmp_path).history]
    assert max(accuracies) > 0.9
