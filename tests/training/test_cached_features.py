"""Runs on features that the frozen layers computed once."""

import collections
import dataclasses
import logging
import os
import signal
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vgg_jax
from tests.helpers.runs import load_last_arrays, make_config, without_times
from vgg_jax import IMAGENET, InputError, TrainConfig
from vgg_jax.data import eval_batches, open_train_val, train_batches
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.model import build_model
from vgg_jax.training.loop import fit
from vgg_jax.training.nan_check import first_nonfinite
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import init_state, train_step
from vgg_jax.training.trainer import FitResult, Trainer

pytestmark = pytest.mark.usefixtures("small_nets")

SAME_IMAGES = {"crop": "centre", "flip": False, "colour_shift": 0.0, "scale": (18,)}


def config_with_cache(photos, **changes):
    return make_config(photos, freeze=("conv",), **SAME_IMAGES | {"cache_features": True} | changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param({"microbatch": 4, "batch_norm": False}, marks=pytest.mark.slow)],
)
def test_same_run_as_without_cache(changes, finished_run, photos, tmp_path, caplog):
    """All losses are equal up to rounding: the order, the dropout and the images are the same.

    Each batch holds the features of pool2, which are computed once.
    """
    caplog.set_level(logging.INFO, "vgg_jax")
    seen = []

    class Recorder(Trainer):
        def train_step(self, state, batch):
            seen.append({name: array.shape for name, array in batch.items()})
            return super().train_step(state, batch)

    config = config_with_cache(photos, init_from=str(finished_run[0]), **changes)
    cached = fit(config, tmp_path / "cached", trainer_class=Recorder).history
    assert seen == [{"features": (8, 4, 4, 16), "label": (8,), "mask": (8,)}] * 9
    lines = [r.getMessage() for r in caplog.records if "computed pool2" in r.getMessage()]
    assert len(lines) == 2 and "of 22 images" in lines[0] and "of 7 images" in lines[1]
    usual = fit(dataclasses.replace(config, cache_features=False), tmp_path / "usual").history
    for record, expected in zip(cached, usual, strict=True):
        for split in ("train", "validation"):
            assert record[split]["count"] == expected[split]["count"]
            np.testing.assert_allclose(record[split]["loss"], expected[split]["loss"], rtol=1e-4)
    kernels = [
        vgg_jax.load(tmp_path / name)[1]["params"]["fc8"]["kernel"] for name in ("cached", "usual")
    ]
    np.testing.assert_allclose(*kernels, atol=1e-4)


@pytest.mark.slow
def test_resumed_run_equals_undisturbed_run(photos, tmp_path):
    config = config_with_cache(photos)

    class Stopper(Trainer):
        def train_step(self, state, batch):
            if self.progress.history and self.progress.batch == 1:
                signal.raise_signal(signal.SIGTERM)
            return super().train_step(state, batch)

    assert fit(config, tmp_path / "resumed", trainer_class=Stopper).stopped
    resumed = fit(config, tmp_path / "resumed").history
    undisturbed = fit(config, tmp_path / "undisturbed").history
    assert without_times(resumed) == without_times(undisturbed)
    arrays = [load_last_arrays(tmp_path / name) for name in ("resumed", "undisturbed")]
    jax.tree.map(np.testing.assert_array_equal, *arrays)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 4])
def test_fit_stops_while_features_are_computed(number, photos, tmp_path):
    """At the first batch or a later one, of a new run or of a resumed one."""
    config, calls, may_finish = config_with_cache(photos), 0, threading.Event()

    class Stopper(Trainer):
        def put_batch(self, batch):
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGTERM)
                may_finish.wait(60)
            return super().put_batch(batch)

    for _ in range(2):
        calls, start = 0, time.monotonic()
        may_finish.clear()
        assert fit(config, tmp_path / "run", trainer_class=Stopper) == FitResult([], stopped=True)
        assert time.monotonic() - start < 30
        may_finish.set()
    history = fit(config, tmp_path / "run").history
    assert without_times(history) == without_times(fit(config, tmp_path / "undisturbed").history)


@pytest.mark.slow
def test_skipped_image_is_left_out(photos, tmp_path):
    """An image that cannot be decoded does not count, in any epoch."""
    import shutil

    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    broken = next(path for path in sorted((folder / "train").rglob("*.*")) if path.suffix == ".jpg")
    broken.write_bytes(broken.read_bytes()[:200])
    history = fit(config_with_cache(str(folder), skip_bad=True), tmp_path / "run").history
    assert [record["train"]["count"] for record in history] == [21] * 3


def test_nan_in_features_is_named(photos):
    """The layer after the cached ones is named first."""
    config = config_with_cache(photos, batch_norm=False)
    model = build_model(config, 2)
    state = init_state(model, make_optimizer(config), 0, make_mesh(4))
    params = {**state.params, "fc7": {**state.params["fc7"], "bias": jnp.full(16, jnp.nan)}}
    batch = {
        "features": np.ones((4, 4, 4, 16), np.float32),
        "label": np.array([0, 1, 0, 1], np.int32),
        "mask": np.ones(4, bool),
    }
    state = dataclasses.replace(state, params=params)
    part = first_nonfinite(
        state, batch, model=model, mean_rgb=IMAGENET.mean_rgb, start_after="pool2"
    )
    assert part == "the output of fc7"


def test_feature_layer():
    def layer(**changes):
        return TrainConfig(net="D", **changes).feature_layer

    assert layer() is None
    assert layer(freeze=("conv",)) == layer(freeze=("conv",), batch_norm=True) == "pool5"
    assert layer(freeze=("conv1_1", "conv1_2")) == "pool1"
    assert layer(freeze=("conv1_1", "conv2_1")) == "relu1_1"
    assert layer(freeze=("conv", "fc6")) == "relu6"  # the dropout after it is random
    assert layer(freeze=("fc",)) is None


@pytest.mark.parametrize(
    "changes", [{"crop": "random"}, {"flip": True}, {"colour_shift": 0.1}, {"scale": (18, 20)}]
)
def test_random_images_are_refused(changes):
    with pytest.raises(InputError, match="expected images that stay the same, by --crop centre"):
        config_with_cache("photos", **changes)


def test_trained_convolutions_are_refused():
    with pytest.raises(InputError, match="expected the first layers to be frozen"):
        make_config("photos", cache_features=True, **SAME_IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [False, True])
def test_centre_crop_equals_that_of_the_validation(cache, photos):
    """Every training image is the evaluation's crop of it, in all epochs."""
    config = make_config(photos, **SAME_IMAGES, cache=cache)
    train, _ = open_train_val(str(photos), data_dir=None, validation_fraction=0.1, seed=0)
    images = {}
    for batch in eval_batches(train, config, 8):
        images |= dict(zip(batch["index"].tolist(), batch["image"], strict=True))
    count = 0
    for batch in train_batches(train, config, IMAGENET):
        for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            np.testing.assert_array_equal(image, images[index])
            count += index >= 0
    assert count == 3 * train.size


def count_primitives(function, *args):
    """Counts the primitives of a function by name, at any depth."""
    counts = collections.Counter()

    def count(jaxpr):
        for equation in jaxpr.eqns:
            counts[equation.primitive.name] += 1
            for value in equation.params.values():
                for item in value if isinstance(value, list | tuple) else [value]:
                    inner = getattr(item, "jaxpr", item)
                    if hasattr(inner, "eqns"):
                        count(inner)

    count(jax.make_jaxpr(function)(*args).jaxpr)
    return counts


def test_frozen_convolutions_have_no_backward_pass():
    """With all convolutions frozen, a step has the operations of their forward pass only."""
    operations = ("conv_general_dilated", "winograd_conv", "first_conv", "remat2", "shift_left")
    batch = {
        "image": jnp.zeros((8, 16, 16, 3), jnp.uint8),
        "colour_shift": jnp.zeros((8, 3)),
        "label": jnp.zeros(8, jnp.int32),
        "mask": jnp.ones(8, bool),
    }
    features = {
        "features": jnp.zeros((8, 4, 4, 16)),
        "label": batch["label"],
        "mask": batch["mask"],
    }
    mesh = make_mesh(8, jax.devices()[:1])

    def count(freeze, batch, start_after=None):
        config = make_config("photos", batch_norm=False, freeze=freeze)
        model, optimizer = build_model(config, 2), make_optimizer(config)
        options = {"model": model, "mean_rgb": IMAGENET.mean_rgb, "mesh": mesh}
        step = partial(train_step, optimizer=optimizer, start_after=start_after, **options)
        state = init_state(model, optimizer, 0, mesh)
        images = jnp.zeros((8, 16, 16, 3))
        forward = partial(model.apply, method="features")
        return (
            count_primitives(step, state, batch),
            count_primitives(lambda p: forward({"params": p}, images, ("pool2",)), state.params),
        )

    (frozen, forward), (head, _) = count(("conv",), batch), count((), features, "pool2")
    (free, _) = count((), batch)
    for name in operations:
        assert frozen[name] == forward[name] + head[name], name
    assert free["conv_general_dilated"] > frozen["conv_general_dilated"]
