"""Stacks of 3x3 convolutions and one large convolution: counts, fields and a small run."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from experiments.paper import receptive_field
from experiments.paper.convolution_stacks import Stack, measure_field, time_in_turn
from experiments.paper.receptive_field import NETS, compare_nets
from experiments.paper.scan_training import Result
from vgg_jax import CONFIGS
from vgg_jax.errors import InputError


@pytest.mark.parametrize(
    ("kernel_sizes", "weights", "biases"),
    [((3, 3), 18, 2), ((5,), 25, 1), ((3, 3, 3), 27, 3), ((7,), 49, 1)],
)
def test_counts_are_those_of_the_paper(kernel_sizes, weights, biases):
    """§2.3: 27C² weights against 49C². The multiply-adds are the weights at each position."""
    channels, side = 8, 12
    counts = Stack(kernel_sizes, channels, side).counts
    assert counts == {
        "params": weights * channels**2 + biases * channels,
        "macs": weights * channels**2 * side**2,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel_sizes", "side"), [((3, 3), 5), ((5,), 5), ((3, 3, 3), 7), ((7,), 7)]
)
def test_measured_field(kernel_sizes, side):
    field = measure_field(Stack(kernel_sizes, 8, 20), 8, 20)
    assert field == {"height": side, "width": side, "pixels": side**2}


def test_d_7x7_has_one_layer_for_three():
    for stage, deep in zip(NETS["D-7x7"].stages[2:], CONFIGS["D"].stages[2:], strict=True):
        assert [(conv.features, conv.kernel_size) for conv in stage] == [(deep[0].features, 7)]
    assert NETS["D-7x7"].stages[:2] == CONFIGS["D"].stages[:2]


def test_time_in_turn_alternates_the_order():
    calls = []
    seconds = time_in_turn([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # the first two are not timed
    assert [len(values) for values in seconds] == [3, 3]


def test_paired_differences_by_hand():
    accuracies = {("B", 0): 0.6, ("B-5x5", 0): 0.5, ("B-5x5", 1): 0.4, ("B", 1): 0.7}
    accuracies |= {("B", 2): 0.9, ("D", 0): 1.0}  # these have no partner
    runs = [
        {"net": net, "seed": seed, "test_accuracy": accuracy}
        for (net, seed), accuracy in accuracies.items()
    ]
    summary = compare_nets(runs)
    assert summary.keys() == {"B - B-5x5"}
    assert summary["B - B-5x5"]["accuracies"] == {"B": [0.6, 0.7], "B-5x5": [0.5, 0.4]}
    assert summary["B - B-5x5"]["mean"] == pytest.approx(0.2)
    assert summary["B - B-5x5"]["deviation"] == pytest.approx(0.2 / 2**0.5)
    # t = 0.2 / (0.2 / √2 / √2) = 2, with one degree of freedom: a Cauchy distribution.
    assert summary["B - B-5x5"]["p"] == pytest.approx(1 - 2 * np.arctan(2) / np.pi)


def run_main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["receptive_field", *map(str, arguments)])
    receptive_field.main()


@pytest.mark.slow
def test_layers_resume(monkeypatch, tmp_path):
    out = tmp_path / "field.json"
    flags = ["layers", "--out", out, "--device", "test", "--batch", 1, "--rounds", 2]
    run_main(monkeypatch, *flags, "--channels", 4, "--sides", 12)
    first = json.loads(out.read_text())["layers"]["runs"]
    assert [run["pair"] for run in first] == ["two 3x3, one 5x5", "three 3x3, one 7x7"]
    assert first[1]["ratios"]["macs"] == pytest.approx(49 / 27)
    assert len(first[0]["one 5x5"]["forward_all_seconds"]) == 2
    run_main(monkeypatch, *flags, "--channels", 4, "--sides", 12)
    assert json.loads(out.read_text())["layers"]["runs"] == first
    with pytest.raises(InputError, match="expected a side for each number of channels"):
        run_main(monkeypatch, *flags, "--channels", 4, 8, "--sides", 12)


def write_noise(path, seed):
    """20 training images of two classes, and 10 test images."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, n in (("train", 20), ("test", 10)):
        arrays[f"x_{split}"] = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(n) % 2
    np.savez(path, **arrays)


@pytest.fixture
def tiny_nets(monkeypatch, tmp_path):
    """B and B-5x5 with two stages. Returns the flags of `nets`."""
    nets = {
        name: dataclasses.replace(NETS[name], stages=NETS[name].stages[:2])
        for name in ("B", "B-5x5")
    }
    monkeypatch.setattr(receptive_field, "NETS", nets)
    write_noise(tmp_path / "noise.npz", seed=0)
    flags = ["nets", tmp_path / "noise.npz", "--out", tmp_path / "field.json", "--device", "test"]
    flags += ["--width-divisor", 32, "--train-images", 20, "--batch-size", 10, "--epochs", 1]
    return flags


@pytest.mark.slow
def test_nets_resume(tiny_nets, monkeypatch, tmp_path):
    flags, out = tiny_nets, tmp_path / "field.json"
    run_main(monkeypatch, *flags, "--seeds", 0)
    first = json.loads(out.read_text())["nets"]["runs"]
    assert [(run["net"], run["seed"]) for run in first] == [("B", 0), ("B-5x5", 0)]
    assert all(0 <= run["test_accuracy"] <= 1 for run in first)
    run_main(monkeypatch, *flags, "--seeds", 0, 1)
    part = json.loads(out.read_text())["nets"]
    assert part["runs"][:2] == first and len(part["runs"]) == 4
    assert part["summary"]["B - B-5x5"]["seeds"] == [0, 1]
    with pytest.raises(InputError, match=r"learning_rate 0\.05, not 0\.1"):
        run_main(monkeypatch, *flags, "--learning-rate", 0.1)
    write_noise(tmp_path / "noise.npz", seed=1)
    with pytest.raises(InputError, match=r"has runs with data_digest '.*', not '"):
        run_main(monkeypatch, *flags)
    with pytest.raises(InputError, match="no data"):
        run_main(monkeypatch, "nets", "--out", out, "--device", "test")


def test_a_diverged_run_is_refused(tiny_nets, monkeypatch):
    def diverge(config, model, data, **options):
        return Result({}, [], [2.3, float("nan")])

    monkeypatch.setattr(receptive_field, "train", diverge)
    with pytest.raises(InputError, match=r"of B, seed 0, is nan with the learning rate 0\.05: exp"):
        run_main(monkeypatch, *tiny_nets)
