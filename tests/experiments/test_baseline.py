"""The baseline: its colours, its lines and figures, resumed runs, and PyTorch's curves."""

import argparse
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

import vgg_jax
from experiments.paper import baseline
from experiments.paper.baseline_images import crop_images, load_images
from experiments.paper.framework_curves import QUANTITIES, compare, epoch_line, plot
from experiments.paper.scan_training import build_small_model, train
from tests.helpers.arrays import save_bright_images
from vgg_jax import CONFIGS
from vgg_jax.configs.models import VGGConfig
from vgg_jax.configs.presets import preset
from vgg_jax.data import cache_in_memory, open_train_val
from vgg_jax.errors import InputError
from vgg_jax.reporting.style import figure_bytes

SMALL = ["--image-size", "16", "--width-divisor", "64", "--epochs", "2", "--step-size", "1"]


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
    """50 training images of two classes, which differ in brightness, and two test images."""
    return save_bright_images(tmp_path_factory.mktemp("data"), 50, 2, 16)


@pytest.fixture
def two_stages(monkeypatch):
    """Net D with two convolutions, of four and six channels when its widths are divided by 64."""
    config = VGGConfig(((vgg_jax.Conv(256),), (vgg_jax.Conv(384),)))
    monkeypatch.setitem(CONFIGS, "D", config)


@pytest.fixture
def call(npz, two_stages, tmp_path, monkeypatch, capsys):
    """Runs the script on a tiny net. Returns its stderr, its stdout and the saved results."""

    def run(*flags):
        out = tmp_path / "baseline.json"
        words = ["baseline", str(npz), "--device", "a test", "--out", str(out), *SMALL, *flags]
        monkeypatch.setattr(sys, "argv", words)
        baseline.main()
        captured = capsys.readouterr()
        return captured.err, captured.out, json.loads(out.read_text())

    return run


def test_mean_and_deviation_of_images_by_hand(tmp_path):
    """Both are means over the images. The deviation of all pixels is larger."""
    images = np.zeros((20, 2, 2, 3), np.uint8)
    images[::2, 0] = 100  # mean 50, deviation 50
    images[1::2, 0], images[1::2, 1] = 210, 190  # mean 200, deviation 10
    labels = np.arange(20) % 2
    path = tmp_path / "two.npz"
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels)
    data, std = load_images(str(path), None)
    np.testing.assert_allclose(data.colours.mean_rgb, [125] * 3)
    np.testing.assert_allclose(std, [30] * 3)
    flat = np.full_like(images, 7)
    np.savez(path, x_train=flat, y_train=labels, x_test=flat, y_test=labels)
    with pytest.raises(InputError, match=r"have the deviations \[0.0, 0.0, 0.0\]: expected"):
        load_images(str(path), None)


def test_digits_are_those_of_train():
    """The pixels and the division are those of `vgg-jax train digits`, which TensorFlow reads."""
    data, _ = load_images("digits", None)
    assert (data.train.size, data.validation.size, len(data.train.classes)) == (1617, 180, 10)
    for ours, source in zip(data[:2], open_train_val("digits"), strict=True):
        theirs = cache_in_memory(source, preset("digits", cache=True)).pixels
        np.testing.assert_array_equal(ours.indices, theirs.indices)
        np.testing.assert_array_equal(ours.labels, theirs.labels)
        pixels = np.broadcast_to(ours.images[ours.indices], (ours.size, 8, 8, 3))
        np.testing.assert_array_equal(pixels, theirs.images)
    with pytest.raises(InputError, match="1798 train images are asked for: expected 1 to 1797"):
        load_images("digits", 1798)


def test_adam_has_no_weight_decay_and_the_rate_drops_like_steplr():
    args = baseline.parse(
        ["digits", "--device", "x", "--optimizer", "adam", "--epochs", "7", "--step-size", "3"]
    )
    config = baseline.make_config(args, 5)
    assert (config.optimizer, config.weight_decay, config.learning_rate) == ("adamw", 0, 1e-4)
    assert (config.net, config.batch_norm, config.fc) == ("D", True, (4096, 4096))
    assert (config.drop_epochs, config.batch_size, config.seed) == ((3, 6), 4, 5)


def test_epoch_line():
    epoch = {"seconds": 61.25} | dict(zip(QUANTITIES, (2.25, 2.125, 0.25, 0.5), strict=True))
    assert epoch_line("jax seed 0", 3, epoch) == (
        "jax seed 0: time 61.2 s, epoch 3, train loss 2.2500, valid loss 2.1250, "
        "train accuracy 0.2500, valid accuracy 0.5000"
    )


def curve(framework, seed, value):
    return {"framework": framework, "seed": seed, "epochs": [dict.fromkeys(QUANTITIES, value)]}


def test_compare_by_hand():
    """Deviations of 1 each. Student's 97.5 % quantile with four degrees of freedom is 2.776."""
    ours = [curve("jax", seed, value) for seed, value in enumerate((1.0, 2.0, 3.0))]
    theirs = [curve("torch", seed, value) for seed, value in enumerate((3.0, 4.0, 5.0))]
    (row,) = compare(ours + theirs)
    assert (row["epoch"], row["seeds"]) == (1, [0, 1, 2])
    cell = row["valid_loss"]
    assert (cell["jax"], cell["torch"], cell["difference"]) == (2, 4, -2)
    assert cell["deviation"] == pytest.approx(1)
    assert cell["limit"] == pytest.approx(2.776 * (2 / 3) ** 0.5, rel=1e-3)
    assert cell["within_noise"] is True
    far = [curve("torch", seed, value) for seed, value in enumerate((5.0, 6.0, 7.0))]
    assert compare(ours + far)[0]["valid_loss"]["within_noise"] is False


def test_compare_needs_both_frameworks_and_two_seeds_for_the_noise():
    assert compare([curve("jax", 0, 1.0), curve("torch", 1, 1.0)]) is None
    (row,) = compare([curve("jax", 0, 1.0), curve("torch", 0, 1.5), curve("torch", 1, 9.0)])
    assert row["seeds"] == [0]
    assert row["train_loss"]["difference"] == -0.5
    assert row["train_loss"]["within_noise"] is None


def test_figures_show_each_curve():
    figure = plot([curve("jax", 0, 1.0), curve("torch", 0, 2.0), curve("jax", 1, 3.0)], "loss")
    (axes,) = figure.axes
    assert [line.get_ydata()[0] for line in axes.lines] == [1, 1, 2, 2, 3, 3]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "jax, train",
        "jax, valid",
        "torch, train",
        "torch, valid",
    ]
    image = Image.open(io.BytesIO(figure_bytes(figure, "png")))
    assert image.format == "PNG" and image.width > 500


@pytest.mark.slow
def test_resumed_run_equals_an_uninterrupted_one(call, tmp_path):
    err, out, results = call("--frameworks", "jax", "--seeds", "0")
    assert "Total params: 138,365,992" not in err  # D is another net in these tests
    assert "jax seed 0: time" in err and out == "null\n"
    first = results["bright_sgd_64"]["runs"][0]
    flags = ("--frameworks", "jax", "--seeds", "0", "1", "--figures", str(tmp_path / "figures"))
    err, _, results = call(*flags)
    assert "jax seed 0: skipped" in err
    assert results.keys() == {"bright_sgd_64"}
    part = results["bright_sgd_64"]
    assert part["runs"][0] == first and part["runs"][1]["seed"] == 1
    assert "bright.npz" in part["command"] and str(tmp_path) not in part["command"]
    assert part["nets"]["trained"]["params"] > 0 and part["summary"] is None
    for kind in ("loss", "accuracy"):
        with Image.open(tmp_path / "figures" / f"bright-sgd-{kind}.png") as image:
            assert image.format == "PNG"

    (tmp_path / "baseline.json").unlink()
    _, _, whole = call("--frameworks", "jax", "--seeds", "0", "1")
    for resumed, uninterrupted in zip(part["runs"], whole["bright_sgd_64"]["runs"], strict=True):
        for epoch in resumed["epochs"] + uninterrupted["epochs"]:
            assert epoch.pop("seconds") > 0
        assert resumed == uninterrupted
    with pytest.raises(InputError, match="has runs with settings epochs 2, not 3: expected those"):
        call("--frameworks", "jax", "--epochs", "3")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--step-size", "0"], "step_size is 0: expected at least 1"),
        (["--width-divisor", "65"], "width_divisor is 65: expected 1 to 64"),
    ],
)
def test_wrong_values_are_refused(flags, message):
    args = baseline.parse(["digits", "--device", "x", "--frameworks", "jax", *flags])
    with pytest.raises(InputError, match=message):
        baseline.check(args)


def test_summary_of_the_review():
    """Those that its page prints, for 1,000 classes; and the net with ten classes."""
    args = argparse.Namespace(width_divisor=1, image_size=224)
    tables = baseline.summaries(args, 10)
    lines = tables["imagenet"][0].splitlines()
    assert "Total params: 138,365,992" in lines
    assert [line.split(": ")[1] for line in lines if "(MB)" in line] == [
        "0.57",
        "321.95",
        "527.82",
        "850.35",
    ]
    assert tables["trained"][1]["params"] == 134_309_962


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_curves_equal_those_of_pytorch(optimizer, npz, two_stages, monkeypatch):
    """Without dropout, both nets take the same steps. 45 images leave a last batch of one."""
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    from experiments.paper import torch_baseline
    from tests.helpers.torch_vgg import STAGES, to_jax, torch_vgg

    words = [str(npz), "--device", "x", "--optimizer", optimizer, "--dropout-rate", "0", *SMALL]
    args = baseline.parse(words)
    data, std = load_images(args.data, None)
    config = baseline.make_config(args, 3)
    model = build_small_model(config, args.width_divisor, 2)
    result = train(config, model, data, std_rgb=std)
    curves = []
    net = torch_baseline.train(config, model, data, std, curves.append)
    assert len(curves) == 2 and data.train.size == 45
    for ours, theirs in zip(result.epochs, curves, strict=True):
        for split in ("train", "validation"):
            assert ours[split]["loss"] == pytest.approx(theirs[split]["loss"], rel=1e-3)
            assert ours[split]["accuracy"] == pytest.approx(theirs[split]["accuracy"])

    # The names and shapes are those of the net that was written from the paper.
    monkeypatch.setitem(STAGES, "two", [[4], [6]])
    expected = torch_vgg("two", model.config.fc, 2, batch_norm=True, image_size=16)
    shapes = {name: tensor.shape for name, tensor in expected.state_dict().items()}
    assert {name: tensor.shape for name, tensor in net.state_dict().items()} == shapes
    _, batch_stats = to_jax(net, 4)
    for name, statistics in batch_stats.items():
        for key, values in statistics.items():
            ours = result.variables["batch_stats"][name][key]
            np.testing.assert_allclose(ours, values, rtol=1e-2, atol=1e-3)


def test_crops_of_small_images_are_the_images(npz, two_stages):
    """The crop of an image of the right size is the image."""
    args = baseline.parse([str(npz), "--device", "x", *SMALL])
    data, _ = load_images(args.data, None)
    crops = crop_images(data.validation, baseline.make_config(args, 0), data)
    np.testing.assert_array_equal(crops, data.train.images[data.validation.indices])
