"""Training with all steps of an epoch in one program, compared with `vgg_jax.fit`."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

import vgg_jax
from experiments.paper.scan_training import (
    build_small_model,
    divide_widths,
    keep_gains,
    load_data,
    make_programs,
    padded_order,
    posteriors,
    train,
)
from tests.helpers.arrays import save_bright_images
from vgg_jax import CONFIGS, VGG, TrainConfig
from vgg_jax.configs.evaluation import EvalProtocol
from vgg_jax.errors import InputError
from vgg_jax.training.step import init_variables

SETTINGS = {
    "net": "narrow",
    "fc": (12, 8),
    "image_size": 16,
    "scale": (16, 20),
    "batch_size": 16,
    "learning_rate": 1e-5,  # larger ones let rounding errors grow
    "epochs": 3,
    "statistics": "measure",
}


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """60 training and 20 test images of two classes, which differ in brightness."""
    return save_bright_images(tmp_path_factory.mktemp("data"), 60, 20, 20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"batch_norm": True, "schedule": "cosine", "warmup_epochs": 1, "optimizer": "adamw"},
    ],
)
def test_train_equals_fit(settings, npz, narrow, tmp_path):
    """The losses and accuracies of all epochs."""
    config = TrainConfig(data=str(npz), **SETTINGS | settings)
    result = train(config, build_small_model(config, 1, 2), load_data(npz))
    history = vgg_jax.fit(config, tmp_path / "run").history
    assert len(history) == len(result.epochs) == 3
    for ours, epoch in zip(result.epochs, history, strict=True):
        for split in ("train", "validation"):
            assert ours[split]["loss"] == pytest.approx(epoch[split]["loss"], rel=1e-4)
            assert ours[split]["accuracy"] == pytest.approx(epoch[split]["accuracy"])
    assert len(result.losses) == 3 * 4  # 54 images, of which the last batch of 16 has 6


def test_train_starts_from_changed_variables(npz, narrow):
    config = TrainConfig(data=str(npz), **SETTINGS | {"epochs": 1, "learning_rate": 1e-30})
    model, data = build_small_model(config, 1, 2), load_data(npz)
    result = train(
        config, model, data, change=lambda variables: jax.tree.map(lambda x: x + 1, variables)
    )
    start = init_variables(model, jax.random.key(0))
    for before, after in zip(
        jax.tree.leaves(start["params"]), jax.tree.leaves(result.variables["params"]), strict=True
    ):
        np.testing.assert_allclose(after, before + 1, rtol=1e-6)


def test_interrupted_training_goes_on_after_its_last_epoch(npz, narrow, tmp_path):
    config = TrainConfig(data=str(npz), **SETTINGS | {"batch_norm": True, "learning_rate": 0.01})
    run = partial(train, config, build_small_model(config, 1, 2), load_data(npz))
    whole, path, lines = run(), tmp_path / "state.npz", []

    def interrupt(line):
        if line.startswith("epoch 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(log=interrupt, checkpoint=path)
    resumed = run(log=lines.append, checkpoint=path)
    assert lines[0] == "goes on after epoch 2" and len(lines) == 2
    assert resumed.epochs == whole.epochs and resumed.losses == whole.losses
    jax.tree.map(np.testing.assert_array_equal, resumed.variables, whole.variables)


@pytest.mark.parametrize("kept_bytes", [0, 1000])
def test_damaged_checkpoint_is_named(kept_bytes, npz, narrow, tmp_path):
    config = TrainConfig(data=str(npz), **SETTINGS | {"epochs": 1})
    run = partial(train, config, build_small_model(config, 1, 2), load_data(npz))
    path = tmp_path / "state.npz"
    run(checkpoint=path)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(
        InputError, match=r"state\.npz is damaged: expected the state after an epoch"
    ):
        run(checkpoint=path)


def test_load_data_divides_the_training_images(npz):
    data = load_data(npz, num_train=40, num_test=10)
    assert (data.train.size, data.validation.size, data.test.size) == (36, 4, 10)
    with np.load(npz) as arrays:
        pixels = arrays["x_train"][data.train.indices].reshape(-1, 3)
    np.testing.assert_allclose(data.colours.mean_rgb, pixels.mean(0))
    with pytest.raises(InputError, match="61 train images are asked for: expected 1 to 60"):
        load_data(npz, num_train=61)


def test_padded_order_has_each_image_once(npz):
    data = load_data(npz)
    config = TrainConfig(data=str(npz), **SETTINGS | {"net": "A", "image_size": 32, "scale": (32,)})
    first, second = (padded_order(data.train, config, epoch) for epoch in (0, 1))
    assert first.shape == (4, 16) and (first != second).any()
    assert sorted(first.ravel()) == [-1] * 10 + sorted(data.train.indices)


def test_divide_widths():
    """Net D with an eighth of its widths, and its number of parameters by hand."""
    config = divide_widths(CONFIGS["D"], 8)
    widths = [[conv.features for conv in stage] for stage in config.stages]
    assert widths == [[8, 8], [16, 16], [32] * 3, [64] * 3, [64] * 3]
    assert config.fc == (512, 512)


def test_keep_gains_gives_each_layer_the_gain_of_full_width():
    """Deviation · sqrt(inputs) of net D's layers at 224 pixels, with the deviation 0.01."""
    config = TrainConfig(net="D", initializer="paper", image_size=32)
    model = build_small_model(config, 8, 10)
    variables = keep_gains(model, VGG(CONFIGS["D"]), init_variables(model, jax.random.key(0)))
    inputs = {"conv1_1": 27, "conv1_2": 9 * 64, "conv4_2": 9 * 512, "fc6": 7 * 7 * 512, "fc8": 4096}
    for name, number in inputs.items():
        kernel = np.asarray(variables["params"][name]["kernel"])
        gain = kernel.std() * np.prod(kernel.shape[:-1]) ** 0.5
        assert gain == pytest.approx(0.01 * number**0.5, rel=0.15), name  # a small sample


def test_one_program_trains_with_all_seeds(npz, narrow):
    programs = []
    data = load_data(npz)
    for seed in (0, 1):
        config = TrainConfig(data=str(npz), seed=seed, **SETTINGS)
        run = make_programs(config, build_small_model(config, 1, 2), data)
        order = padded_order(data.train, config, 0)
        arrays = (data.train.images, data.train.all_labels, np.int32(0))
        programs.append(run.run_epoch.lower(run.start(), order, *arrays).as_text())
    assert programs[0] == programs[1]


@pytest.mark.slow
def test_dense_posteriors_are_those_of_the_centre(npz, narrow):
    """Of 23 pixels, two stages see 20: all but one at the left and top, two at the other edges."""
    config = TrainConfig(data=str(npz), **SETTINGS)
    model, data = build_small_model(config, 1, 2), load_data(npz)
    variables = init_variables(model, jax.random.key(1))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 23, 23, 3), np.uint8)
    whole, centre = (
        posteriors(model, variables, data._replace(test=source), "dense", scale)
        for source, scale in (
            (replace(data.test, images=images, indices=np.arange(3)), 23),
            (replace(data.test, images=images[:, 1:21, 1:21], indices=np.arange(3)), 20),
        )
    )
    np.testing.assert_allclose(whole, centre, rtol=1e-5)


@pytest.mark.slow
def test_posteriors_are_those_of_evaluate(npz, narrow):
    config = TrainConfig(data=str(npz), **SETTINGS)
    model, data = build_small_model(config, 1, 2), load_data(npz)
    variables = init_variables(model, jax.random.key(1))
    metadata = {
        "net": "narrow",
        "classes": data.train.classes,
        "preprocessing": {"mean_rgb": data.colours.mean_rgb, "range": (0, 255), "channels": "RGB"},
    }
    arrays = (data.test.images, data.test.labels)
    for protocol in ("dense", "multi-crop"):
        ours = posteriors(model, variables, data, protocol, 20)
        assert ours.shape == (20, 2)
        loss = -np.log(ours[np.arange(20), data.test.labels]).mean()
        options = EvalProtocol(protocol, flip=True)
        theirs = vgg_jax.evaluate(
            model, variables, metadata, arrays, protocol=options, scales=(20,)
        )
        assert loss == pytest.approx(theirs["loss"], rel=1e-5)
