"""Runs that start from the layers of another net, and frozen layers."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import vgg_jax
from tests.helpers.runs import make_config
from vgg_jax import IMAGENET
from vgg_jax.distributed.sharding import make_mesh, shard_batch
from vgg_jax.model import build_model
from vgg_jax.training.init_from import Pretrained, has_new_head, init_from_pretrained
from vgg_jax.training.loop import fit
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import init_state, jit_steps
from vgg_jax.weights.pretrained import WEIGHTS, own_file

pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture(autouse=True)
def log_info(caplog):
    caplog.set_level(logging.INFO, "vgg_jax")


def init_and_log(photos, workdir, caplog, **changes):
    """Trains an epoch that changes next to nothing; returns the params and the line of the log."""
    fit(make_config(photos, epochs=1, learning_rate=1e-9, **changes), workdir)
    messages = [record.getMessage() for record in caplog.records]
    [line] = [message for message in messages if message.startswith("from ")]
    _, variables, _ = vgg_jax.load(workdir)
    return variables["params"], line


def assert_layers_close(params, expected):
    for name, layer in expected.items():
        for param, array in layer.items():
            np.testing.assert_allclose(params[name][param], array, atol=1e-6)


@pytest.mark.slow
def test_init_from_run_copies_all_layers(finished_run, photos, tmp_path, caplog):
    workdir, _ = finished_run
    params, line = init_and_log(photos, tmp_path, caplog, init_from=str(workdir))
    assert "newly initialised: nothing" in line
    _, source, _ = vgg_jax.load(workdir)
    assert params.keys() == source["params"].keys()
    assert_layers_close(params, source["params"])


@pytest.mark.slow
def test_init_from_shallower_net(finished_run, photos, tmp_path, caplog):
    workdir, _ = finished_run
    params, line = init_and_log(photos, tmp_path, caplog, net="deep", init_from=str(workdir))
    copied, new = (
        line.partition(": copied: ")[2]
        .removesuffix("; unused: nothing")
        .split("; newly initialised: ")
    )
    expected = {"conv1_1", "bn1_1", "conv2_1", "bn2_1", "fc6", "fc7", "fc8"}
    assert set(copied.split(", ")) == expected
    assert set(new.split(", ")) == {"conv1_2", "bn1_2", "conv2_2", "bn2_2"}
    _, source, _ = vgg_jax.load(workdir)
    assert_layers_close(params, source["params"])


@pytest.mark.slow
@pytest.mark.parametrize("net", ["shallow", "deep"])
def test_init_from_copies_statistics(net, finished_run, photos):
    source = Pretrained(*vgg_jax.load(finished_run[0]))
    config = make_config(photos, net=net, init_from="unused")
    state = init_state(build_model(config, 2), make_optimizer(config), 1, make_mesh(8))
    started = init_from_pretrained(source, config, state, IMAGENET.mean_rgb)
    for name, layer in source.variables["batch_stats"].items():
        jax.tree.map(np.testing.assert_array_equal, started.batch_stats[name], layer)
        assert np.abs(layer["mean"]).max() > 0
    assert started.batch_stats.keys() == state.batch_stats.keys()


@pytest.mark.slow
def test_init_from_file_of_other_shapes(finished_run, photos, tmp_path, caplog, monkeypatch):
    """fc6 of another image size and fc8 of other classes are new; their shapes are logged.

    The file lies in a cache and has a name, which run.json keeps.
    """
    _, variables, _ = vgg_jax.load(finished_run[0])
    rng = np.random.default_rng(0)
    params = {k: dict(v) for k, v in variables["params"].items() if not k.startswith("bn")}
    params["fc6"]["kernel"] = rng.normal(size=(8 * 8 * 16, 24))
    params["fc8"] = {"kernel": rng.normal(size=(16, 5)), "bias": rng.normal(size=5)}
    tensors = {
        f"{name}/{param}": np.float32(array)
        for name, layer in params.items()
        for param, array in layer.items()
    }
    metadata = {"mean_rgb": [1, 2, 3], "std_rgb": [1, 1, 1]}
    name = "timm/vgg11_bn.tv_in1k"  # no digest of it is known, so another file can stand for it
    monkeypatch.setenv("VGG_JAX_CACHE", str(tmp_path / "cache"))
    path = own_file(WEIGHTS[name])
    path.parent.mkdir(parents=True)
    save_file(tensors, path, {"vgg_jax": json.dumps(metadata)})
    config = make_config(photos, batch_norm=False, init_from=name, epochs=1)
    fit(dataclasses.replace(config, freeze=("conv", "fc7")), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["init_from"] == name
    assert (
        f"from {name}: copied: conv1_1, conv2_1, fc7; "
        "newly initialised: fc6 (kernel (1024, 24) in the source, (256, 24) here), fc8"
        in caplog.text
    )
    assert (
        "was trained with mean colour (1.00, 2.00, 3.00); "
        "this run subtracts (123.68, 116.78, 103.94)" in caplog.text
    )
    _, trained, _ = vgg_jax.load(tmp_path / "run")
    for layer in ("conv1_1", "conv2_1", "fc7"):
        for param in ("kernel", "bias"):
            expected = tensors[f"{layer}/{param}"]
            np.testing.assert_array_equal(trained["params"][layer][param], expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_layers_stay_to_the_bit(optimizer, finished_run, photos):
    """Also their batch normalisation and their momentum; all other layers change."""
    source = Pretrained(*vgg_jax.load(finished_run[0]))
    config = make_config(
        photos,
        init_from="unused",
        freeze=("conv",),
        decay_biases=True,
        optimizer=optimizer,
        learning_rate=0.1,
        weight_decay=0.1,
    )
    model, mesh = build_model(config, 2), make_mesh(8)
    state = init_state(model, make_optimizer(config), 1, mesh)
    state = init_from_pretrained(source, config, state, IMAGENET.mean_rgb)
    params, batch_stats = jax.tree.map(np.asarray, (state.params, state.batch_stats))
    train_step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8),
        "colour_shift": np.zeros((8, 3), np.float32),
        "label": np.arange(8, dtype=np.int32) % 2,
        "mask": np.ones(8, bool),
    }
    for _ in range(3):
        state, _ = train_step(state, shard_batch(batch, mesh))
    inner = state.opt_state.inner_state
    velocity = inner[0].mu if optimizer == "adamw" else inner[1][0].trace
    for name, layer in state.params.items():
        for param, array in layer.items():
            is_unchanged = np.array_equal(array, params[name][param])
            assert is_unchanged == name.startswith(("conv", "bn")), name
            assert is_unchanged == (np.asarray(velocity[name][param]) == 0).all()
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, batch_stats)


@pytest.fixture(scope="module")
def convolutions(finished_run, tmp_path_factory):
    """A file with the convolutions of a net that has large activations after the last pooling."""
    model, variables, metadata = vgg_jax.load(finished_run[0])
    model = model.clone(batch_norm=False)
    params = {k: v for k, v in variables["params"].items() if k.startswith("conv")}
    # A ReLU net with biases of 0 multiplies its outputs by the factors of its kernels.
    params = {
        name: {"kernel": 3 * layer["kernel"], "bias": 0 * layer["bias"]}
        for name, layer in params.items()
    }
    path = tmp_path_factory.mktemp("weights") / "convolutions.safetensors"
    vgg_jax.save(path, model, {"params": params}, metadata)
    return path


def pool_rms(path, photos, config):
    """Root mean square of pool2 over the first batch of training images."""
    from vgg_jax.data import open_train_val, train_batches
    from vgg_jax.preprocessing import subtract_mean

    model, variables, _ = vgg_jax.load(path)
    train, _ = open_train_val(str(photos), data_dir=None, validation_fraction=0.1, seed=0)
    config = dataclasses.replace(config, batch_size=32)
    batch = next(iter(train_batches(train, config, IMAGENET)))
    images = subtract_mean(batch["image"][:22], IMAGENET.mean_rgb, batch["colour_shift"][:22])
    maps = model.apply(variables, images, ("pool2",), method="features")["pool2"]
    return float(np.sqrt((np.asarray(maps, np.float64) ** 2).mean()))


@pytest.mark.slow
def test_new_head_fits_the_activations(convolutions, photos, tmp_path, caplog):
    """fc6 begins with outputs of its usual scale, and the learning rate is lower."""
    config = make_config(
        photos, batch_norm=False, init_from=str(convolutions), epochs=1, learning_rate=None
    )
    rms = pool_rms(convolutions, photos, config)
    assert rms > 10
    fit(config, tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    np.testing.assert_allclose(run["activation_rms"], rms, rtol=1e-4)
    expected_lr = float(f"{1e-3 / rms**2:.0e}")
    assert run["config"]["learning_rate"] == expected_lr
    assert f"fc6 reads activations of root mean square {rms:.3g}" in caplog.text
    assert f"the learning rate is {expected_lr:g}" in caplog.text

    # The same command resumes, and measures nothing.
    caplog.clear()
    fit(config, tmp_path / "run")
    assert "finished in epoch 1" in caplog.text and "fc6 reads" not in caplog.text

    state = init_state(
        build_model(config, 2), make_optimizer(load_config(run)), config.seed, make_mesh(8)
    )
    pretrained = Pretrained(*vgg_jax.load(convolutions))
    started = init_from_pretrained(pretrained, load_config(run), state, IMAGENET.mean_rgb, rms)
    kernels = [np.asarray(each.params["fc6"]["kernel"]) for each in (started, state)]
    np.testing.assert_allclose(kernels[0] * rms, kernels[1], rtol=1e-5)
    for name in ("fc7", "fc8"):
        np.testing.assert_array_equal(started.params[name]["kernel"], state.params[name]["kernel"])


def test_head_on_other_activations_is_not_measured(convolutions, photos):
    """With batch normalisation, the same convolutions give fc6 other activations."""
    pretrained = Pretrained(*vgg_jax.load(convolutions))
    for batch_norm in (False, True):
        config = make_config(photos, batch_norm=batch_norm, init_from=str(convolutions))
        assert has_new_head(pretrained, config, 2) == (not batch_norm)


def load_config(run):
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in run["config"].items()}
    return vgg_jax.TrainConfig(**values)


@pytest.mark.slow
def test_given_learning_rate_is_kept(convolutions, photos, tmp_path):
    config = make_config(photos, batch_norm=False, init_from=str(convolutions), epochs=1)
    fit(config, tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["config"]["learning_rate"] == config.learning_rate
    assert run["activation_rms"] > 10


@pytest.mark.slow
def test_copied_head_keeps_the_default(finished_run, photos, tmp_path, caplog):
    config = make_config(photos, init_from=str(finished_run[0]), epochs=1, learning_rate=None)
    fit(config, tmp_path)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["activation_rms"] is None
    assert run["config"]["learning_rate"] == 1e-3
    assert "fc6 reads" not in caplog.text
