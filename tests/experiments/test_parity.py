"""Training in vgg_jax and in PyTorch, from the same weights and on the same crops."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.paper import parity
from experiments.paper.jax_training import Crops, perturb
from experiments.paper.scan_training import build_small_model, load_data
from tests.helpers.arrays import save_bright_images
from vgg_jax import TrainConfig
from vgg_jax.errors import InputError

SETTINGS = {
    "net": "narrow",
    "fc": (12, 8),
    "image_size": 16,
    "scale": (16, 20),
    "batch_size": 16,
    "learning_rate": 0.02,
    "schedule": "cosine",
    "epochs": 2,
    "dropout_rate": 0.0,
    "weight_decay": 5e-3,
    "statistics": "measure",
}


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """120 training and 20 test images of two classes, which differ in brightness."""
    return save_bright_images(tmp_path_factory.mktemp("data"), 120, 20, 20)


@pytest.fixture
def torch_training():
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    from experiments.paper import torch_training

    return torch_training


def compare(npz, batch_norm):
    """The first seven steps in float64. The last one has 12 images and padding."""
    data = load_data(npz)
    # At 0.02 the plain net's loss reaches a million, and rounding errors grow with it.
    rate = 0.02 if batch_norm else 1e-4
    settings = SETTINGS | {"batch_norm": batch_norm, "learning_rate": rate}
    config = TrainConfig(data=str(npz), **settings)
    with jax.enable_x64(True):
        model = build_small_model(config, 1, 2)
        model = model.clone(dtype=jnp.float64, param_dtype=jnp.float64)
        return parity.compare_first_steps(config, model, data, 7)


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", [True, False])
def test_first_steps_equal_pytorch(batch_norm, npz, narrow, torch_training):
    outcome = compare(npz, batch_norm)
    assert len(outcome["losses"]["jax"]) == len(outcome["losses"]["perturbed"]) == 7
    assert len({*outcome["losses"]["jax"]}) == 7
    # Above 1e-8 if the rates of the steps are rounded to float32.
    assert outcome["largest_difference"] < 1e-10
    assert outcome["validation_difference"] < 1e-10
    # 0 if the control trains from the same weights, or does not go back to the start.
    assert 1e-9 < outcome["perturbed_difference"] < 1e-4


def test_steps_within_a_bound():
    ours = [1.0, 2.0, 3.0, 4.0]
    assert parity.steps_within(ours, [1.0, 2.1, 3.3, 4.0], 0.2) == 2
    assert parity.steps_within(ours, [1.5, 2.0, 3.0, 4.0], 0.2) == 0
    assert parity.steps_within(ours, ours, 0.2) == 4


def test_perturbed_weights_by_hand():
    """Each weight changes by one part in 1e7, up or down. Biases are 0 and stay so."""
    before = {"kernel": np.full((3, 3, 4, 4), 0.1), "bias": np.zeros(4)}
    after = perturb(before)
    ratios = after["kernel"] / before["kernel"] - 1
    np.testing.assert_allclose(np.abs(ratios), 1e-7, rtol=1e-6)
    assert (ratios > 0).any() and (ratios < 0).any()
    np.testing.assert_array_equal(after["bias"], before["bias"])
    single = {"kernel": before["kernel"].astype(np.float32)}
    assert (perturb(single)["kernel"] != single["kernel"]).all()


def no_weight_decay(training):
    training.optimizer.param_groups[0]["weight_decay"] = 0.0


def decayed_biases(training):
    training.optimizer.param_groups[1]["weight_decay"] = 5e-3


def lower_momentum(training):
    for group in training.optimizer.param_groups:
        group["momentum"] = 0.8


def constant_rate(training):
    training._schedule.step = lambda: None


def larger_epsilon(training):
    training.net.bn2_1.eps = 1.0


def slower_statistics(training):
    training.net.bn2_1.momentum = 0.01


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        no_weight_decay,
        decayed_biases,
        lower_momentum,
        constant_rate,
        larger_epsilon,
        slower_statistics,
    ],
)
def test_another_recipe_is_noticed(change, npz, narrow, torch_training, monkeypatch):
    """Each change is well above what rounding does in float64."""

    class Changed(torch_training.TorchTraining):
        def __init__(self, *args):
            super().__init__(*args)
            change(self)

    monkeypatch.setattr(torch_training, "TorchTraining", Changed)
    outcome = compare(npz, batch_norm=True)
    assert max(outcome["largest_difference"], outcome["validation_difference"]) > 1e-4


def test_crops_are_those_of_the_epoch(npz, narrow):
    data = load_data(npz)
    config = TrainConfig(data=str(npz), **SETTINGS)
    crops = Crops(config, data)
    first, second = crops.train(0), crops.train(1)
    assert first["image"].shape == (7, 16, 16, 16, 3)
    assert first["mask"].sum() == 108 and not first["image"][~first["mask"]].any()
    assert (first["image"] != second["image"]).any()
    np.testing.assert_array_equal(crops.train(0, 2)["image"], first["image"][:2])
    centre = crops.centre(data.test)
    assert centre["mask"].sum() == 20
    np.testing.assert_array_equal(centre["label"][centre["mask"]], data.test.labels)


def runs(accuracies):
    return [
        {"framework": framework, "seed": seed, "test": {"accuracy": accuracy}}
        for framework, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


def test_summary_by_hand():
    summary = parity.summarize(runs({"jax": [0.5, 0.6, 0.7], "torch": [0.7, 0.7, 0.7]}))
    assert summary["difference_of_means"] == pytest.approx(-0.1)
    assert summary["jax"]["range"] == pytest.approx(0.2)
    assert summary["jax"]["deviation"] == pytest.approx(0.1)
    assert summary["standard_error"] == pytest.approx(0.1 / 3**0.5)
    assert summary["within_spread"]
    apart = parity.summarize(runs({"jax": [0.5, 0.6], "torch": [0.7, 0.7, 0.9]}))
    assert apart["seeds"] == [0, 1] and not apart["within_spread"]
    assert parity.summarize(runs({"jax": [0.5, 0.6], "torch": [0.7]})) is None


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["parity", *map(str, arguments)])
    parity.main()


@pytest.mark.slow
def test_runs_resume(npz, narrow, torch_training, monkeypatch, tmp_path):
    out = tmp_path / "parity.json"
    small = TrainConfig(data=str(npz), **SETTINGS)
    monkeypatch.setattr(
        parity, "preset", lambda data, **changes: small.__class__(**vars(small) | changes)
    )
    flags = ["--out", out, "--device", "test", "--net", "narrow", "--width-divisor", 1]
    flags += ["--train-images", 120, "--batch-size", 16, "--epochs", 2]
    run_main(monkeypatch, "runs", npz, *flags, "--seeds", 0)
    first = json.loads(out.read_text())["runs"]["runs"]
    assert [(run["framework"], run["seed"]) for run in first] == [("jax", 0), ("torch", 0)]
    assert all(len(run["epochs"]) == 2 for run in first)

    run_main(monkeypatch, "runs", npz, *flags, "--seeds", 0, 1)
    part = json.loads(out.read_text())["runs"]
    assert part["runs"][:2] == first and len(part["runs"]) == 4
    assert part["summary"]["seeds"] == [0, 1]
    assert npz.name in part["command"] and str(npz.parent) not in part["command"]
    with pytest.raises(InputError, match="epochs 2, not 3"):
        run_main(monkeypatch, "runs", npz, *flags, "--epochs", 3)


def test_missing_torch_is_one_sentence(npz, monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "experiments.paper.torch_training", raising=False)
    monkeypatch.delattr("experiments.paper.torch_training", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"needs torch .*: pip install torch"):
        run_main(monkeypatch, "runs", npz, "--out", tmp_path / "a.json", "--device", "test")
