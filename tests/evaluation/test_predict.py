"""Image files to classes: what is read, what is reported, and the same answer as by hand."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny import SHALLOW, init
from vgg_jax import CONFIGS, IMAGENET, VGG, InputError, cli
from vgg_jax.data import decode, resize_shorter_side
from vgg_jax.evaluation.dense import class_posteriors
from vgg_jax.evaluation.predict import expand_paths, predict
from vgg_jax.weights import Weights, load, read, save
from vgg_jax.weights.layouts import Preprocessing

CLASSES = ("ants", "bees", "wasps", "flies", "bugs", "moths")


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A file of weights of a small net."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "shallow", SHALLOW)
        path = tmp_path_factory.mktemp("net") / "net.safetensors"
        model = VGG(SHALLOW, len(CLASSES), image_size=16)
        params = jax.tree.map(np.asarray, init(model)["params"])
        params["fc8"]["kernel"] = params["fc8"]["kernel"] * 0.2
        save(
            path,
            Weights(
                "shallow",
                "vgg_jax",
                model,
                params,
                {},
                True,
                Preprocessing(IMAGENET.mean_rgb),
                CLASSES,
            ),
        )
        yield str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i, name in enumerate(("b.png", "a.jpg", "deep/er/c.jpeg", "d [1].webp")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 40, 3)).astype(np.uint8)).save(root / name)
    (root / "notes.txt").write_text("no image")
    (root / "broken.jpg").write_bytes((root / "a.jpg").read_bytes()[:200])
    return root


def test_the_answers_are_those_by_hand(net, photos):
    found = sorted(predict(net, [str(photos / "b.png"), str(photos / "deep")], top=2))
    files = [photos / "b.png", photos / "deep/er/c.jpeg"]
    assert [prediction.file for prediction in found] == list(map(str, files))
    model, variables, metadata = load(net)
    images = [
        resize_shorter_side(decode(file.read_bytes()), metadata["preprocessing"]["scale"]).numpy()
        for file in files
    ]
    expected = class_posteriors(model, variables, images)
    for prediction, posterior in zip(found, expected, strict=True):
        assert [name for name, _ in prediction.top] == [
            CLASSES[i] for i in posterior.argsort()[::-1][:2]
        ]
        assert [probability for _, probability in prediction.top] == pytest.approx(
            np.sort(posterior)[::-1][:2], abs=1e-6
        )


def test_files_folders_and_patterns(photos):
    every = [
        str(photos / name)
        for name in ("a.jpg", "b.png", "broken.jpg", "d [1].webp", "deep/er/c.jpeg")
    ]
    assert sorted(expand_paths([str(photos)])) == every
    assert expand_paths(
        [str(photos / "*.png"), str(photos / "d [1].webp"), str(photos / "no*.gif")]
    ) == [
        every[1],
        every[3],
        str(photos / "no*.gif"),
    ]
    assert expand_paths([str(photos / "**" / "*.jpeg")]) == [every[4]]


def test_an_unreadable_file_is_reported_and_the_others_answered(net, photos, capsys):
    Image.new("L", (12_500, 1)).save(photos / "line.png")
    argv = [
        "predict",
        net,
        *(
            str(photos / name)
            for name in ("broken.jpg", "line.png", "b.png", "missing.jpg", "notes.txt")
        ),
    ]
    assert cli.main([*argv, "--json"]) == 3
    lines = {
        line["file"].rpartition("/")[2]: line
        for line in map(json.loads, capsys.readouterr().out.splitlines())
    }
    assert {name: len(line.get("top", ())) for name, line in lines.items()} == {
        "broken.jpg": 0,
        "b.png": 5,
        "missing.jpg": 0,
        "notes.txt": 0,
        "line.png": 0,
    }
    assert "cannot decode" in lines["broken.jpg"]["error"]
    assert "No such file" in lines["missing.jpg"]["error"]
    assert (
        "line.png': at the test scale it has more than 2,000,000 pixels"
        in lines["line.png"]["error"]
    )
    assert cli.main(argv) == 3
    out, err = capsys.readouterr()
    assert "%" in out.splitlines()[0]
    assert len(out.splitlines()) == 1
    assert sum("expected a JPEG" in line for line in err.splitlines()) == 4
    (photos / "line.png").unlink()
    assert (
        cli.main(
            [
                "predict",
                net,
                str(photos / "b.png"),
                "--protocol",
                "ten-crop",
                "--scales",
                "16",
                "20",
            ]
        )
        == 0
    )


def test_nothing_to_predict(net, tmp_path, photos):
    with pytest.raises(InputError, match="no images in"):
        list(predict(net, [str(tmp_path)]))
    with pytest.raises(InputError, match="top is 0: expected at least 1"):
        list(predict(net, [str(photos / "b.png")], top=0))
    weights = read(net)
    headless = {name: layer for name, layer in weights.params.items() if name.startswith("conv")}
    save(
        tmp_path / "headless.safetensors", dataclasses.replace(weights, params=headless, top=False)
    )
    with pytest.raises(InputError, match=r"headless\.safetensors has no fully connected layers"):
        list(predict(tmp_path / "headless.safetensors", [str(photos / "b.png")]))
    with pytest.raises(InputError, match=r"scales is \(15,\): expected at least .* 16"):
        list(predict(net, [str(photos / "b.png")], scales=(15,)))
