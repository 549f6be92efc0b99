"""The command `vgg-jax explain`."""

import os

import numpy as np
import pytest
from PIL import Image

from vgg_jax import InputError, cli, load
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.reporting.explain_photo import _find_class

pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture
def photo(tmp_path, monkeypatch):
    """A photo in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 36, 3)).astype(np.uint8)
    Image.fromarray(pixels).save("photo.png")
    return pixels


def test_writes_a_picture_and_arrays(run, photo, capsys):
    assert cli.main(["explain", str(run), "photo.png"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    with Image.open("photo-explained.png") as image:
        assert image.size[0] > 1000
    with np.load("photo-explained.npz") as arrays:
        np.testing.assert_array_equal(arrays["photo"], photo)  # S is 24
        model, variables, metadata = load(run)
        inputs = subtract_mean(photo[None], metadata["preprocessing"]["mean_rgb"])
        scores = np.asarray(model.apply(variables, inputs, method="score_map"))[0]
        index = int(scores.mean((0, 1)).argmax())
        np.testing.assert_allclose(arrays["score_map"], scores[..., index], atol=1e-5)
        assert arrays["class"] == metadata["classes"][index]
        assert arrays["grad_cam"].shape == (12, 18) and arrays["layer"] == "relu2_1"
        assert line == (
            f"photo.png: {arrays['class']} {arrays['posterior'][index]:.1%}; "
            "wrote photo-explained.png and photo-explained.npz"
        )


def test_explains_another_class_at_another_scale_and_layer(run, photo):
    flags = ["--class", "red", "--scale", "32", "--layer", "pool1", "-o", "out.png"]
    assert cli.main(["explain", str(run), "photo.png", *flags]) == 0
    with np.load("out.npz") as arrays:
        assert arrays["class"] == "red" and arrays["class_index"] == 1
        assert arrays["photo"].shape == (32, 48, 3)
        assert arrays["grad_cam"].shape == (16, 24)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--class", "green"], "the class is 'green': expected one of the net's 2: 'blue', 'red'"),
        (["--layer", "fc6"], "the layer is 'fc6': expected one of conv1_1"),
        (["--scale", "8"], "expected at least the size of the net's images, 16"),
        (["-o", "out.jpg"], "expected a file ending in .png"),
        (
            ["-o", "missing/out.png"],
            "cannot write missing/out.png: expected the name",
        ),
    ],
)
def test_wrong_arguments_are_refused(run, photo, capsys, flags, message):
    before = os.listdir()
    assert cli.main(["explain", str(run), "photo.png", *flags]) == 2
    assert message in capsys.readouterr().err
    assert os.listdir() == before


def test_missing_photo_and_existing_files(run, photo, capsys):
    assert cli.main(["explain", str(run), "absent.png"]) == 3
    assert "cannot read 'absent.png'" in capsys.readouterr().err
    assert cli.main(["explain", str(run), "photo.png"]) == 0
    assert cli.main(["explain", str(run), "photo.png"]) == 2
    assert "photo-explained.png exists" in capsys.readouterr().err
    assert cli.main(["explain", str(run), "photo.png", "--overwrite"]) == 0


def test_classes_are_found_by_their_names():
    names = ["n02012849 crane, bird", "n03126707 crane, machine", "elephants", "ants"]
    for name, index in (("n02012849", 0), ("machine", 1), ("ants", 3), ("Elephants", 2)):
        assert _find_class(names, name) == index
    for name in ("crane", "ant"):  # two classes, and only a part of a name
        with pytest.raises(InputError, match=rf"^the class is '{name}': expected one of the net's"):
            _find_class(names, name)
