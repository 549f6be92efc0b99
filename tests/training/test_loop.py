"""Runs from the first epoch to the last, stopped and continued, on small images made here."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import vgg_jax
import vgg_jax.training.loop
from vgg_jax import IMAGENET, InputError, TrainConfig, cli, compiler_options
from vgg_jax.data import eval_batches, measure_colours, open_train_val
from vgg_jax.distributed.multihost import ProcessLostError
from vgg_jax.distributed.sharding import make_mesh, shard_batch
from vgg_jax.metrics import MetricSums
from vgg_jax.model import build_model
from vgg_jax.preprocessing import preprocess
from vgg_jax.runs.checkpoint import CheckpointSaveError, CheckpointStore
from vgg_jax.runtime.signals import graceful_stop
from vgg_jax.training.init_from import init_from_pretrained
from vgg_jax.training.loop import FitResult, fit
from vgg_jax.training.optimizer import sgd
from vgg_jax.training.step import init_state, jit_steps

pytestmark = pytest.mark.usefixtures("small_nets")


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
        "data": folder, "net": "shallow", "fc": (24, 16), "batch_norm": True, "image_size": 16, "scale": (18, 22), "batch_size": 8,
        "epochs": 3, "learning_rate": 1e-2, "schedule": "step", "drop_epochs": (1,),
    }  # fmt: skip
    return TrainConfig(**values | changes)


def lasting(history):
    """What of the records does not depend on the clock."""
    return [
        {
            name: value
            for name, value in record.items()
            if name not in ("time", "seconds", "images_per_second", "input_wait_seconds")
        }
        for record in history
    ]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run of three epochs and its history."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, fit(config(folder), workdir).history


def test_each_epoch_is_recorded_and_counts_every_image(finished):
    workdir, history = finished
    assert [
        json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ] == history
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert {(record["train"]["count"], record["validation"]["count"]) for record in history} == {
        (22, 7)
    }


def test_a_run_from_memory_is_the_run_from_the_files(finished, folder, tmp_path):
    history = fit(config(folder, cache=True), tmp_path).history
    for ours, theirs in zip(lasting(history), lasting(finished[1]), strict=True):
        assert ours["train"]["loss"] == pytest.approx(theirs["train"]["loss"], rel=1e-3)
        assert ours["validation"]["accuracy"] == theirs["validation"]["accuracy"]


def test_an_interrupt_while_the_net_is_made_is_not_lost(finished, folder, tmp_path, monkeypatch):
    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return init_state(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(vgg_jax.training.loop, "init_state", interrupted)
        assert fit(config(folder), tmp_path) == FitResult([], stopped=True)
    assert lasting(fit(config(folder), tmp_path).history) == lasting(finished[1])


def test_a_signal_is_heard_while_the_step_is_compiled(finished, folder, tmp_path, monkeypatch):
    compile_steps, let_go, sent = vgg_jax.training.loop.compile_steps, threading.Event(), []

    def slowly_compiled(*arguments, **options):
        _, eval_step = compile_steps(*arguments, **options)

        def lower(*_):
            sent.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)
            let_go.wait(60)

        return SimpleNamespace(lower=lower), eval_step

    with monkeypatch.context() as patched:
        patched.setattr(vgg_jax.training.loop, "compile_steps", slowly_compiled)
        assert fit(config(folder), tmp_path) == FitResult([], stopped=True)
        assert time.monotonic() - sent[0] < 30
    let_go.set()
    assert lasting(fit(config(folder), tmp_path).history) == lasting(finished[1])


@pytest.mark.parametrize("slow", ["input", "device"])
def test_the_line_says_what_bounds_the_rate(folder, tmp_path, monkeypatch, capsys, slow):
    batches_of, compiled = vgg_jax.training.loop.train_batches, vgg_jax.training.loop.compile_steps

    def slow_batches(*arguments, **options):
        for batch in batches_of(*arguments, **options):
            time.sleep(0.5 if slow == "input" else 0)
            yield batch

    def slow_steps(*arguments, **options):
        train_step, eval_step = compiled(*arguments, **options)

        def slow_step(state, batch):
            time.sleep(0.5 if slow == "device" else 0)
            return train_step(state, batch)

        slow_step.lower = train_step.lower
        return slow_step, eval_step

    monkeypatch.setattr(vgg_jax.training.loop, "train_batches", slow_batches)
    monkeypatch.setattr(vgg_jax.training.loop, "compile_steps", slow_steps)
    [_, second] = fit(config(folder, epochs=2), tmp_path).history
    share = second["input_wait_seconds"] / second["seconds"]
    assert share > 0.4 if slow == "input" else share < 0.1
    assert f"bound by the {slow} (waited " in capsys.readouterr().out.splitlines()[-2]


def test_load_gives_the_net_of_the_best_epoch(finished, folder):
    workdir, history = finished
    model, variables, metadata = vgg_jax.load(workdir)
    best = max(history, key=lambda record: record["validation"]["accuracy"])
    assert metadata["epoch"] == best["epoch"]
    assert metadata["classes"] == ("blue", "red")
    assert metadata["config"] == config(folder)
    right = total = 0
    _, validation = open_train_val(folder)
    apply = jax.jit(model.apply, compiler_options=compiler_options())
    for batch in eval_batches(validation, metadata["config"], 3):
        logits = apply(variables, preprocess(batch["image"], metadata["preprocessing"]["mean_rgb"]))
        right += ((np.asarray(logits).argmax(1) == batch["label"]) & batch["mask"]).sum()
        total += batch["mask"].sum()
    assert total == 7
    assert right / total == pytest.approx(best["validation"]["accuracy"])


def test_a_run_compiles_each_step_once_and_reuses_the_states_memory(
    folder, tmp_path, monkeypatch, caplog
):
    """Over epochs and a change of the rate."""
    states, compiled = [], vgg_jax.training.loop.compile_steps

    def compile_steps(*arguments, **options):
        train_step, eval_step = compiled(*arguments, **options)

        def remembered(state, batch):
            states.append(state)
            return train_step(state, batch)

        remembered.lower = train_step.lower
        return remembered, eval_step

    monkeypatch.setattr(vgg_jax.training.loop, "compile_steps", compile_steps)
    jax.config.update("jax_log_compiles", True)  # in every thread
    try:
        history = fit(config(folder), tmp_path).history
    finally:
        jax.config.update("jax_log_compiles", False)
    assert [record["learning_rate"] for record in history] == pytest.approx([1e-2, 1e-3, 1e-3])
    for step in ("train_step", "eval_step"):
        assert (
            sum(
                record.getMessage().startswith(f"Compiling jit({step})")
                for record in caplog.records
            )
            == 1
        )
    assert len(states) == 9
    assert all(state.params["fc6"]["kernel"].is_deleted() for state in states)


class KilledError(BaseException):
    """Stands for kill -9: nothing of the run's own code saves anything behind it."""


@pytest.mark.parametrize(
    ("at_batch", "killed"),
    [
        pytest.param(2, False, id="mid_epoch"),
        pytest.param(4, False, id="in_validation"),
        pytest.param(5, False, id="in_second_epoch"),
        pytest.param(3, True, id="killed_behind_a_save"),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    at_batch, killed, folder, finished, tmp_path, monkeypatch
):
    """Bit by bit: parameters, momentum, statistics, metrics; with dropout, scale jitter, flips and colour shift on."""
    calls, send = 0, vgg_jax.training.loop.batch_to_devices

    def interrupted(batch, mesh):
        nonlocal calls
        calls += 1
        if calls == at_batch and killed:
            raise KilledError
        if calls == at_batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return send(batch, mesh)

    monkeypatch.setattr(vgg_jax.training.loop, "batch_to_devices", interrupted)
    if killed:
        with pytest.raises(KilledError):
            fit(config(folder), tmp_path, save_seconds=0)
    else:
        outcome = fit(config(folder), tmp_path)
        assert outcome.stopped
        assert len(outcome.history) == (at_batch == 5)
    before = calls
    outcome = fit(config(folder), tmp_path)
    assert not outcome.stopped
    # An epoch is 3 batches of training and 1 of validation. The one that a stop comes with is used in training, and not in validation.
    assert calls - before == 12 - at_batch + (killed or at_batch == 4)
    workdir, history = finished
    assert lasting(outcome.history) == lasting(history)
    one, other = (arrays_of_last(path, folder) for path in (workdir, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_run_whose_first_epoch_left_the_best_net_only_starts_as_it_did(
    folder, finished, tmp_path, monkeypatch, capsys
):
    """It was killed, or the disk was full, between the two: the next start takes --init-from again."""
    settings = config(folder, init_from=str(finished[0]), epochs=1)
    undisturbed = fit(settings, tmp_path / "undisturbed").history
    save = CheckpointStore.save

    def full(self, step, arrays, progress):
        if "history" in progress:
            raise CheckpointSaveError("full")
        save(self, step, arrays, progress)

    monkeypatch.setattr(CheckpointStore, "save", full)
    with pytest.raises(CheckpointSaveError):
        fit(settings, tmp_path / "w")
    monkeypatch.undo()
    again = fit(settings, tmp_path / "w").history
    assert "nothing to go on from, so it starts again" in capsys.readouterr().out
    assert lasting(again) == lasting(undisturbed)


@pytest.mark.parametrize("to_the_end", [False, True])
def test_a_full_disk_is_warned_of_and_costs_nothing(
    to_the_end, folder, finished, tmp_path, monkeypatch, capsys
):
    """Nothing can be saved at the end of the second of three epochs, or from then on."""
    save, calls = CheckpointStore.save, 0

    def full(*args):
        nonlocal calls
        calls += 1
        if calls == 3 or (to_the_end and calls > 3):  # the first epoch saves its best and its last
            raise CheckpointSaveError("cannot save to a disk (No space left on device)")
        save(*args)

    workdir, history = finished
    monkeypatch.setattr(CheckpointStore, "save", full)
    if to_the_end:
        with pytest.raises(CheckpointSaveError):
            fit(config(folder), tmp_path)
        monkeypatch.undo()
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    outcome = fit(config(folder), tmp_path)
    assert "warning: cannot save to a disk" in capsys.readouterr().err
    assert lasting(outcome.history) == lasting(history)
    one, other = (arrays_of_last(path, folder) for path in (workdir, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    (_, one, known), (_, other, known_too) = (vgg_jax.load(path) for path in (workdir, tmp_path))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert known["epoch"] == known_too["epoch"]


def test_a_second_signal_stops_at_once():
    with graceful_stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(10)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_command_at_once_within_a_call_of_xla(number):
    program = """
import jax, jax.numpy as jnp
from vgg_jax.runtime import signals
signals.hear_second_signal()
with signals.stop_signals():
    long = jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, lambda i, x: x @ x / 2, x)).lower(jnp.eye(200)).compile()
    print("on", flush=True)
    long(jnp.eye(200)).block_until_ready()
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "on\n"
        for _ in range(2):
            time.sleep(0.3)
            process.send_signal(number)
        try:
            assert process.wait(10) in (
                128 + number,
                -number,
            )  # the latter where the first was heard in time
        finally:
            process.kill()


def test_measured_colours_are_measured_once(folder, tmp_path, monkeypatch):
    settings = config(folder, statistics="measure", epochs=1, drop_epochs=(1,))
    monkeypatch.setattr(vgg_jax.training.loop, "validate", lambda *_: None)
    assert fit(settings, tmp_path).stopped
    monkeypatch.undo()
    monkeypatch.setattr(
        vgg_jax.training.loop, "measure", lambda source: pytest.fail("measured again")
    )
    fit(settings, tmp_path)
    _, _, metadata = vgg_jax.load(tmp_path)
    expected = measure_colours(open_train_val(folder)[0]).pixel_mean
    assert metadata["preprocessing"]["mean_rgb"] == pytest.approx(tuple(expected))
    assert expected[0] > 100  # the mean of these images, not ImageNet's


def arrays_of_last(workdir, folder):
    """Everything that the last checkpoint holds, as arrays."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(workdir / "last") as manager:
        state = manager.restore(
            manager.latest_step(), args=ocp.args.Composite(arrays=ocp.args.StandardRestore())
        ).arrays
    return jax.tree.map(np.asarray, {name: value for name, value in state.items() if name != "key"})


@pytest.mark.parametrize("disk_is_full", [False, True])
def test_best_is_the_best_epochs_net(disk_is_full, folder, tmp_path, monkeypatch):
    """The second of three, also where it can be saved in the third only."""
    seen, save = [], CheckpointStore.save

    def full(self, *args):
        if disk_is_full and len(seen) == 2:
            raise CheckpointSaveError("full")
        save(self, *args)

    monkeypatch.setattr(CheckpointStore, "save", full)

    def evaluate_all(eval_step, state, *_):
        seen.append(jax.tree.map(np.array, state.params))
        return MetricSums(loss=1.0, top1=[3, 5, 4][len(seen) - 1], top5=7, count=7)

    monkeypatch.setattr(vgg_jax.training.loop, "validate", evaluate_all)
    fit(config(folder), tmp_path)
    _, variables, metadata = vgg_jax.load(tmp_path)
    assert metadata["epoch"] == 2
    jax.tree.map(np.testing.assert_array_equal, variables["params"], seen[1])
    assert np.abs(seen[1]["fc6"]["kernel"] - seen[2]["fc6"]["kernel"]).max() > 0


@pytest.mark.parametrize(
    ("ends", "code", "lines"),
    [
        (FitResult([], True), 75, 0),
        (FitResult([], False), 0, 0),
        (KeyboardInterrupt(), 130, 1),
        (OSError(28, "full"), 2, 1),
        (CheckpointSaveError("full"), 74, 1),
        (ProcessLostError("gone"), 76, 1),
    ],
)
def test_exit_codes(ends, code, lines, monkeypatch, capsys):
    def fit(*_, **options):
        if isinstance(ends, BaseException):
            raise ends
        return ends

    monkeypatch.setattr(vgg_jax.training.loop, "fit", fit)
    assert cli.main(["train", "--no-compilation-cache"]) == code
    assert capsys.readouterr().err.count("\n") == lines


def test_a_finished_run_is_not_trained_again(finished, folder, capsys):
    workdir, history = finished
    assert lasting(fit(config(folder), workdir).history) == lasting(history)
    assert "done: best validation accuracy" in capsys.readouterr().out


def test_a_run_that_lost_its_best_net_is_refused(finished, folder, tmp_path):
    shutil.copytree(finished[0], tmp_path / "w")
    shutil.rmtree(tmp_path / "w" / "best")
    with pytest.raises(
        InputError, match=r"best holds no checkpoint, and epochs were done: .*restore that folder"
    ):
        fit(config(folder), tmp_path / "w")


def test_another_configuration_is_refused_with_the_differences(finished, folder):
    workdir, _ = finished
    with pytest.raises(InputError, match=r"seed is 0 there and 1 here; .*--workdir") as error:
        fit(config(folder, seed=1, momentum=0.5), workdir)
    assert "momentum is 0.9 there and 0.5 here" in str(error.value)
    assert "epochs" not in str(error.value)


def test_other_data_or_storage_is_refused(finished, folder, tmp_path):
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "w")
    content = json.loads((tmp_path / "w" / "run.json").read_text())
    (tmp_path / "w" / "run.json").write_text(
        json.dumps(content | {"storage": "numbers/1.0.0 tfrecord", "train_size": 21})
    )
    with pytest.raises(
        InputError,
        match=r"storage is 'numbers/1.0.0 tfrecord' there and 'folder, names [0-9a-f]+' here; train_size is 21 there",
    ):
        fit(config(folder), tmp_path / "w")


def test_a_cut_checkpoint_is_named_and_kept(finished, folder, tmp_path):
    workdir, _ = finished
    shutil.copytree(workdir, tmp_path / "w")
    files = sorted(path for path in (tmp_path / "w" / "last").rglob("*") if path.is_file())
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"the checkpoint .*/last/\d+ cannot be read"):
        fit(config(folder), tmp_path / "w")
    assert sorted(path for path in (tmp_path / "w" / "last").rglob("*") if path.is_file()) == files


def test_microbatches_train_on_every_image(folder, tmp_path):
    outcome = fit(config(folder, microbatch=2, epochs=1, batch_norm=False), tmp_path)
    assert outcome.history[0]["train"]["count"] == 22


def test_start_from_another_run_says_what_came(finished, folder, tmp_path, capsys):
    workdir, _ = finished
    fit(
        config(folder, init_from=str(workdir), epochs=1, drop_epochs=(1,), learning_rate=1e-9),
        tmp_path,
    )
    out = capsys.readouterr().out
    assert "new: nothing" in out
    _, source, _ = vgg_jax.load(workdir)
    _, copy, _ = vgg_jax.load(tmp_path)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), source["params"], copy["params"]
    )


@pytest.mark.parametrize("net", ["shallow", "deep"])
def test_running_statistics_come_along(net, finished, folder):
    source = vgg_jax.load(finished[0])
    settings = config(folder, net=net, init_from="it")
    state = init_state(build_model(settings, 2), sgd(settings), 1, make_mesh(8))
    started = init_from_pretrained(source, settings, state, IMAGENET.mean_rgb)
    for name, layer in source[1]["batch_stats"].items():
        jax.tree.map(np.testing.assert_array_equal, started.batch_stats[name], layer)
        assert np.abs(layer["mean"]).max() > 0
    assert started.batch_stats.keys() == state.batch_stats.keys()


def test_a_deeper_net_starts_from_the_layers_that_a_has(finished, folder, tmp_path, capsys):
    workdir, _ = finished
    fit(
        config(
            folder,
            net="deep",
            init_from=str(workdir),
            epochs=1,
            drop_epochs=(1,),
            learning_rate=1e-9,
        ),
        tmp_path,
    )
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("from"))
    came, new = said.partition(": ")[2].removesuffix("; left: nothing").split("; new: ")
    assert set(came.split(", ")) == {"conv1_1", "bn1_1", "conv2_1", "bn2_1", "fc6", "fc7", "fc8"}
    assert set(new.split(", ")) == {"conv1_2", "bn1_2", "conv2_2", "bn2_2"}
    _, source, _ = vgg_jax.load(workdir)
    _, merged, _ = vgg_jax.load(tmp_path)
    for name, layer in source["params"].items():
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), layer, merged["params"][name]
        )


def test_a_file_of_weights_for_other_images_and_classes(finished, folder, tmp_path, capsys):
    """fc6 of another image size and fc8 of other classes are new, with the shapes said; what the net does not have is left."""
    _, variables, _ = vgg_jax.load(finished[0])
    rng = np.random.default_rng(0)
    params = {
        name: dict(layer)
        for name, layer in variables["params"].items()
        if not name.startswith("bn")
    }
    params["fc6"]["kernel"] = rng.normal(size=(8 * 8 * 16, 24))
    params["fc8"] = {"kernel": rng.normal(size=(16, 5)), "bias": rng.normal(size=5)}
    tensors = {
        f"{name}/{leaf}": np.float32(array)
        for name, layer in params.items()
        for leaf, array in layer.items()
    }
    save_file(
        tensors,
        tmp_path / "weights.safetensors",
        {"vgg_jax": json.dumps({"mean_rgb": [1, 2, 3], "std_rgb": [1, 1, 1]})},
    )
    settings = config(
        folder,
        batch_norm=False,
        init_from=str(tmp_path / "weights.safetensors"),
        epochs=1,
        drop_epochs=(1,),
    )
    fit(dataclasses.replace(settings, freeze=("conv", "fc7")), tmp_path / "w")
    out = capsys.readouterr().out
    assert (
        "conv1_1, conv2_1, fc7; new: fc6 (its kernel is (1024, 24) there and (256, 24) here), fc8"
        in out
    )
    assert (
        "less the mean (1.00, 2.00, 3.00), those of this run are less (123.68, 116.78, 103.94)"
        in out
    )
    _, trained, _ = vgg_jax.load(tmp_path / "w")
    for name in ("conv1_1", "conv2_1", "fc7"):
        for leaf in ("kernel", "bias"):
            np.testing.assert_array_equal(trained["params"][name][leaf], tensors[f"{name}/{leaf}"])


def test_frozen_layers_stay_to_the_bit(finished, folder):
    """Their values, their batch normalisation's, and their part of the optimizer's state; the others move."""
    source = vgg_jax.load(finished[0])
    settings = config(
        folder, init_from="it", freeze=("conv",), decay_biases=True, learning_rate=0.1
    )
    model, mesh = build_model(settings, 2), make_mesh(8)
    state = init_from_pretrained(
        source, settings, init_state(model, sgd(settings), 1, mesh), IMAGENET.mean_rgb
    )
    before = jax.tree.map(np.asarray, (state.params, state.batch_stats))
    train_step, _ = jit_steps(settings, model, IMAGENET.mean_rgb, mesh)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8),
        "colour_shift": np.zeros((8, 3), np.float32),
        "label": np.arange(8, dtype=np.int32) % 2,
        "mask": np.ones(8, bool),
    }
    for _ in range(3):
        state, _ = train_step(state, shard_batch(batch, mesh))
    velocity = state.opt_state.inner_state[1][0].trace
    for name, layer in state.params.items():
        for leaf, array in layer.items():
            same = np.array_equal(array, before[0][name][leaf])
            assert same == name.startswith(("conv", "bn")), name
            assert same == (np.asarray(velocity[name][leaf]) == 0).all()
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, before[1])


@pytest.mark.parametrize("batch_size", ["8", "22"], ids=["in_the_second_step", "by_the_only_step"])
def test_divergence_is_not_saved(batch_size, folder, tmp_path, capsys):
    argv = [
        "train",
        folder,
        "--net",
        "shallow",
        "--image-size",
        "16",
        "--scale",
        "18",
        "--fc",
        "24",
        "16",
        "--batch-size",
        batch_size,
    ]
    code = cli.main([*argv, "--learning-rate", "1e20", "--workdir", str(tmp_path / "w")])
    err = capsys.readouterr().err
    assert code == 4
    assert "is not finite" in err
    assert "epoch 1" in err
    # The loss of the second batch is the first that is not: its eight files are named, and those of the update before.
    assert len(re.findall(r"train/\w+/\d+\.jpg", err)) == (16 if batch_size == "8" else 8)
    assert ("in batch 2 (of" in err) == (batch_size == "8")
    assert "by the update of batch 1 (of" in err
    assert "--learning-rate" in err
    assert not list((tmp_path / "w").glob("*/[0-9]*"))


@pytest.mark.slow
@pytest.mark.parametrize("file", ["train/red/3.jpg", "val/red/0.jpg"])
def test_a_corrupt_image_is_named_and_with_it_replaced_the_run_goes_on(
    file, folder, finished, tmp_path, capsys
):
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    whole = (data / file).read_bytes()
    (data / file).write_bytes(whole[:200])
    with pytest.raises(InputError, match=file):
        fit(config(str(data), batch_size=2), tmp_path / "w")
    assert "saved in" in capsys.readouterr().out
    (data / file).write_bytes(whole)
    history = fit(config(str(data), batch_size=2), tmp_path / "w").history
    assert "going on at epoch 1" in capsys.readouterr().out
    assert lasting(history) == lasting(
        fit(config(folder, batch_size=2), tmp_path / "undisturbed").history
    )


@pytest.mark.slow
def test_a_small_net_learns_the_digits(tmp_path):
    digits = dataclasses.replace(
        vgg_jax.preset("digits"),
        net="deep",
        image_size=16,
        scale=(16,),
        fc=(64, 64),
        epochs=6,
        drop_epochs=(5,),
    )
    accuracies = [record["validation"]["accuracy"] for record in fit(digits, tmp_path).history]
    assert max(accuracies) > 0.9
