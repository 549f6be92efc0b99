"""`vgg-jax preview`."""

import dataclasses
import os
import re

import numpy as np
import pytest
from PIL import Image

from tests.helpers.storages import arrays, write_photos
from vgg_jax import TrainConfig, cli
from vgg_jax.cli.parser import parser

# Settings of training that change no crop.
OTHER_GROUPS = ("model", "optimiser", "schedule")


def run_cli(capsys, *argv):
    """Returns the exit code, and the text printed to stdout and stderr."""
    try:
        code = cli.main(["preview", *map(str, argv)])
    except SystemExit as error:  # argparse raises it
        code = error.code
    return code, *capsys.readouterr()


def test_preview_has_the_flags_that_decide_the_crops():
    """Those that are not passed stay absent, so that the preset decides."""
    train = vars(parser().parse_args(["train"]))
    assert vars(parser().parse_args(["preview"])) == {
        name: train[name] for name in ("data", "data_dir", "download", "verbose")
    } | {"command": "preview", "out": "preview.png", "overwrite": False, "images": 8, "epochs": 6}
    flags = [
        "--image-size",
        "64",
        "--scale",
        "70",
        "--crop",
        "centre",
        "--no-flip",
        "--colour-shift",
        "0",
        "--colour-convention",
        "variance",
        "--no-exif",
        "--statistics",
        "measure",
        "--validation-fraction",
        "0.2",
        "--skip-bad",
        "--exclude",
        "list",
        "--cache",
        "--seed",
        "7",
    ]
    passed = vars(parser().parse_args(["preview", *flags]))
    decisive = {
        field.name
        for field in dataclasses.fields(TrainConfig)
        if field.metadata and field.metadata["group"] not in OTHER_GROUPS
    }
    assert decisive - passed.keys() == {"cache_features"}


def test_preview_of_digits(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(capsys, "--images", 2, "--epochs", 3, "--scale", 32, 40)
    assert (code, err) == (0, "")
    assert out == (
        "wrote preview.png: 2 of the 1617 images of digits train, epochs 1 to 3; S = 32 to 40, "
        "random crops of 32 pixels, no flip, no colour shift, Q = 36\n"
    )
    with Image.open("preview.png") as image:
        assert image.format == "PNG"
        # Five panels of 160 pixels side by side, the margins of 16 and the gaps.
        assert image.width == 5 * 160 + 2 * 16 + 2 * 16 + 2 * 8
    code, _, err = run_cli(capsys, "--images", 2)
    assert code == 2
    assert err == (
        "vgg-jax: preview.png exists: expected a name that is free; pass another one, or "
        "--overwrite\n"
    )
    before = os.stat("preview.png").st_size
    code, _, _ = run_cli(capsys, "--images", 1, "--epochs", 1, "--overwrite")
    assert code == 0 and os.stat("preview.png").st_size != before
    assert os.listdir() == ["preview.png"]


def test_preview_shows_all_images_of_a_small_folder(capsys, tmp_path):
    folder = write_photos(tmp_path)
    out = tmp_path / "sheet.svg"
    code, text, _ = run_cli(capsys, folder, "--image-size", 32, "-o", out, "--images", 50)
    assert code == 0
    assert f"wrote {out}: all 13 images of {folder} train" in text
    assert "epochs 1 to 6 (50 were asked for); S = 37, random crops of 32 pixels, flip, " in text
    assert out.read_text().startswith("<?xml")


def test_preview_of_npz_file(capsys, tmp_path):
    np.savez(tmp_path / "x.npz", images=arrays()[0], labels=arrays()[1])
    out = tmp_path / "sheet.PDF"
    code, text, _ = run_cli(capsys, tmp_path / "x.npz", "--out", out, "--images", 2)
    assert code == 0
    assert "x.npz train, epochs 1 to 6; S = 32 to 40, random crops of 32 pixels" in text
    assert out.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("FOLDER/none --images 2", "none': expected .*none/<class>/.*; pass another one as DATA"),
        ("digits --images 0", "images is 0: expected a number from 1 to 100"),
        ("digits --images x", "argument --images: invalid int value: 'x'"),
        ("digits --out FOLDER/x.jpg", r"x.jpg': expected a file ending in .png, .pdf, .svg"),
        ("digits --out FOLDER/none/x.png", "cannot write .*: expected .* in an existing folder"),
        ("digits --out gs://bucket/x.png", "is in an object store: expected a local path"),
        ("digits --scale 30", "scale is .*: expected at least the image size, 32"),
        ("digits --net E", "unrecognized arguments: --net E"),
    ],
)
def test_preview_rejects(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(capsys, *argv.replace("FOLDER", str(tmp_path)).split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert not os.listdir()


def test_preview_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    """As on a full disk. No part of a file is left."""

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    code, _, err = run_cli(capsys, "--images", 1, "--out", tmp_path / "x.png")
    assert code == 2
    assert "x.png (No space left on device): expected room in a folder" in err
    assert not os.listdir(tmp_path)
