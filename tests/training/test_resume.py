"""A run that is stopped anywhere and continued is, to the bit, the run that was not: for each storage, with all that is random on."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

import vgg_jax.training.loop
from tests.helpers.tiny_data import encode, noise
from tools.soak import result
from vgg_jax import TrainConfig, preset
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.training.loop import fit

pytestmark = pytest.mark.usefixtures("small_nets")


def configured(data, **changes):
    """Dropout, scale jitter, mirrors, colour shift, micro-batches, and a plateau that divides the rate behind each epoch."""
    values = {
        "data": data, "net": "shallow", "fc": (24, 16), "batch_norm": True, "image_size": 16, "scale": (18, 22), "batch_size": 8,
        "microbatch": 4, "epochs": 3, "learning_rate": 1e-2, "schedule": "plateau", "patience": 1, "validation_fraction": 0.3,
    }  # fmt: skip
    return TrainConfig(**values | changes)


@pytest.fixture
def data(request, tmp_path, prepared):
    """The arguments of `fit` for a storage."""
    if request.param == "digits":
        small = {
            "net": "shallow",
            "image_size": 16,
            "scale": (16,),
            "fc": (8, 8),
            "epochs": 2,
            "batch_size": 512,
            "microbatch": 256,
        }
        return dataclasses.replace(
            preset("digits"), schedule="plateau", drop_epochs=(), **small
        ), None
    if request.param in prepared:
        return configured("numbers"), prepared[request.param]
    for label in ("ants", "bees"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(12):
            (tmp_path / "data" / label / f"{i}.png").write_bytes(encode(noise(20, 24, i)))
    return configured(str(tmp_path / "data"), cache=request.param == "cache"), None


@pytest.mark.parametrize(
    "data",
    [
        "tfrecord",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("folder", "cache", "digits")),
    ],
    indirect=True,
)
def test_a_run_that_is_stopped_twice_ends_as_the_quiet_one(data, tmp_path, monkeypatch):
    """In its second step, and in a validation."""
    config, data_dir = data
    quiet = fit(config, tmp_path / "quiet", data_dir)
    send, evaluate, stopped = (
        vgg_jax.training.loop.batch_to_devices,
        vgg_jax.training.loop.validate,
        set(),
    )

    def once(name):
        if name not in stopped:
            stopped.add(name)
            os.kill(os.getpid(), signal.SIGTERM)

    def on_devices(batch, mesh):
        once("step")
        return send(batch, mesh)

    def evaluate_all(*arguments):
        once("validation")
        return evaluate(*arguments)

    monkeypatch.setattr(vgg_jax.training.loop, "batch_to_devices", on_devices)
    monkeypatch.setattr(vgg_jax.training.loop, "validate", evaluate_all)
    assert [fit(config, tmp_path / "disturbed", data_dir).stopped for _ in range(3)] == [
        True,
        True,
        False,
    ]
    assert len({record["learning_rate"] for record in quiet.history}) == (
        1 if config.data == "digits" else 2
    )
    (arrays, said), (same_arrays, same_said) = (
        result(tmp_path / name) for name in ("quiet", "disturbed")
    )
    assert said == same_said
    jax.tree.map(np.testing.assert_array_equal, arrays, same_arrays)


@pytest.mark.slow
def test_with_another_number_of_devices_it_goes_on_in_the_same_order(tmp_path, monkeypatch):
    """Begun on two devices, continued on one: the same images in the same order, and the same numbers but for rounding."""
    assert len(jax.devices()) == 2
    for label in ("ants", "bees"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(12):
            (tmp_path / "data" / label / f"{i}.png").write_bytes(encode(noise(20, 24, i)))
    config = configured(str(tmp_path / "data"), microbatch=None, learning_rate=1e-3)
    order, send, devices = [], vgg_jax.training.loop.batch_to_devices, []

    def on_devices(batch, mesh):
        order.append([index for index in batch["index"].tolist() if index >= 0])
        devices.append(mesh.size)
        return send(batch, mesh)

    monkeypatch.setattr(vgg_jax.training.loop, "batch_to_devices", on_devices)
    fit(config, tmp_path / "quiet")
    quiet_order = list(order)
    order.clear()

    def interrupted(batch, mesh):
        if len(order) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return on_devices(batch, mesh)

    monkeypatch.setattr(vgg_jax.training.loop, "batch_to_devices", interrupted)
    assert fit(config, tmp_path / "both").stopped
    monkeypatch.setattr(vgg_jax.training.loop, "batch_to_devices", on_devices)
    monkeypatch.setattr(
        vgg_jax.training.loop,
        "make_mesh",
        lambda batch_size, layout: make_mesh(batch_size, jax.devices()[:1]),
    )
    fit(config, tmp_path / "both")
    assert order == quiet_order
    assert set(devices) == {1, 2}
    (arrays, said), (same_arrays, same_said) = (
        result(tmp_path / name) for name in ("quiet", "both")
    )
    for one, other in zip(said[0], same_said[0], strict=True):
        assert one["train"]["loss"] == pytest.approx(other["train"]["loss"], rel=1e-4)
        assert one["validation"]["accuracy"] == other["validation"]["accuracy"]
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5),
        arrays,
        same_arrays,
    )
