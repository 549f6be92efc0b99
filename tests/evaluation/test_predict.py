"""Predictions for image files: the classes, and the reports of unreadable files."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny import SHALLOW, init
from tests.helpers.tiny_data import noise
from vgg_jax import CONFIGS, IMAGENET, VGG, InputError, cli, evaluate, preprocess
from vgg_jax.configs.evaluation import ROUNDINGS, EvalProtocol
from vgg_jax.data import decode, resize_shorter_side
from vgg_jax.evaluation import dense
from vgg_jax.evaluation.dense import class_posteriors
from vgg_jax.evaluation.evaluate import load_evaluation
from vgg_jax.evaluation.predict import expand_paths, predict
from vgg_jax.weights import Weights, load, read, save
from vgg_jax.weights.layouts import Preprocessing

CLASSES = ("ants", "bees", "wasps", "flies", "bugs", "moths")


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory):
    """A weight file of a small net."""
    model = VGG(SHALLOW, len(CLASSES), image_size=16)
    params = jax.tree.map(np.asarray, init(model)["params"])
    params["fc8"]["kernel"] = params["fc8"]["kernel"] * 0.2
    weights = Weights(
        net="shallow",
        layout="vgg_jax",
        model=model,
        params=params,
        batch_stats={},
        top=True,
        preprocessing=Preprocessing(IMAGENET.mean_rgb),
        classes=CLASSES,
    )
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "shallow", SHALLOW)
        save(path, weights)
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


def test_predict_breaks_ties_as_the_metrics_do(weight_file, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "shallow", SHALLOW)
    weights = read(weight_file)
    fc8 = jax.tree.map(np.zeros_like, weights.params["fc8"])
    path = str(tmp_path / "collapsed.safetensors")
    save(path, dataclasses.replace(weights, params={**weights.params, "fc8": fc8}))
    (prediction,) = predict(path, [str(photos / "b.png")], top=3)
    assert [name for name, _ in prediction.top] == list(CLASSES[:3])


def test_predict_matches_class_posteriors(weight_file, photos):
    paths = [str(photos / "b.png"), str(photos / "deep")]
    predictions = list(predict(weight_file, paths, top=2))
    files = [photos / "b.png", photos / "deep/er/c.jpeg"]
    assert [prediction.file for prediction in predictions] == list(map(str, files))
    model, variables, metadata = load(weight_file)
    scale = metadata["preprocessing"]["scale"]
    images = [resize_shorter_side(decode(file.read_bytes()), scale).numpy() for file in files]
    posteriors = class_posteriors(model, variables, images)
    for prediction, posterior in zip(predictions, posteriors, strict=True):
        names, probabilities = zip(*prediction.top, strict=True)
        assert list(names) == [CLASSES[i] for i in posterior.argsort()[::-1][:2]]
        assert list(probabilities) == pytest.approx(np.sort(posterior)[::-1][:2], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_predict_center_reads_the_crop_of_preprocess(rounding, weight_file, tmp_path, monkeypatch):
    """`predict`, `evaluate` and `preprocess` agree. `test_preprocessing` checks the pixels."""
    monkeypatch.setitem(CONFIGS, "shallow", SHALLOW)
    weights, path = read(weight_file), str(tmp_path / "net.safetensors")
    preprocessing = weights.preprocessing._replace(rounding=rounding, scale=21)
    save(path, dataclasses.replace(weights, preprocessing=preprocessing))
    rng = np.random.default_rng(0)
    for name in CLASSES:
        pixels = rng.integers(0, 256, (*rng.integers(16, 60, 2), 3), np.uint8)
        for split in ("train", "val"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / split / name / "1.png")
    files = [str(tmp_path / "val" / name / "1.png") for name in sorted(CLASSES)]
    model, variables, metadata = load(path)
    assert metadata["preprocessing"]["rounding"] == rounding
    logits = model.apply(variables, preprocess(files, metadata))
    expected = np.asarray(jax.nn.softmax(logits))
    for prediction, row in zip(
        predict(path, files, protocol=EvalProtocol("center"), top=6), expected, strict=True
    ):
        values = dict(prediction.top)
        np.testing.assert_allclose([values[name] for name in CLASSES], row, atol=1e-6)
    out = tmp_path / "out"
    evaluate(model, variables, metadata, str(tmp_path), protocol="center", out=out)
    evaluation = load_evaluation(out / "posteriors.npz")
    np.testing.assert_allclose(evaluation.posteriors, expected, atol=1e-4)


@pytest.mark.slow
def test_predict_keeps_order_of_files(weight_file, tmp_path):
    """Images of one width fill a batch first; the others, and bad files, are between them."""
    rng = np.random.default_rng(1)
    files = []
    for i in range(12):
        sides = (20, 20 + 7 * (i % 3))
        files.append(str(tmp_path / f"{i * 7 % 12}.png"))
        Image.fromarray(rng.integers(0, 256, (*sides, 3), np.uint8)).save(files[-1])
    files[3:3] = [str(tmp_path / "missing.png")]
    files.append(str(tmp_path / "gone.png"))
    predictions = list(predict(weight_file, files))
    assert [prediction.file for prediction in predictions] == files
    failed = [i for i, prediction in enumerate(predictions) if prediction.error]
    assert failed == [3, 13]
    for prediction in predictions[::4]:
        (alone,) = predict(weight_file, [prediction.file])
        assert [name for name, _ in prediction.top] == [name for name, _ in alone.top]


@pytest.mark.slow
def test_predict_real_photos_as_tensorflow(weight_file, shared_data):
    """Posteriors differ by the pixels' rounding only."""
    files = sorted(map(str, shared_data.glob("ants-bees/val/*/*")))[::30]
    model, variables, metadata = load(weight_file)
    protocol = EvalProtocol("both")
    scaled = [
        [resize_shorter_side(decode(Path(file).read_bytes()), scale).numpy() for scale in (64, 96)]
        for file in files
    ]
    mean_rgb = metadata["preprocessing"]["mean_rgb"]
    expected = class_posteriors(model, variables, scaled, protocol=protocol, mean_rgb=mean_rgb)
    predictions = predict(weight_file, files, protocol=protocol, scales=(64, 96), top=6)
    for prediction, posterior in zip(predictions, expected, strict=True):
        values = {CLASSES.index(name): value for name, value in prediction.top}
        np.testing.assert_allclose([values[i] for i in range(6)], posterior, atol=1e-4)


def test_expand_paths(photos):
    names = ("a.jpg", "b.png", "broken.jpg", "d [1].webp", "deep/er/c.jpeg")
    a, b, broken, d, c = (str(photos / name) for name in names)
    assert sorted(expand_paths([str(photos)])) == [a, b, broken, d, c]
    unmatched = str(photos / "no*.gif")
    assert expand_paths([str(photos / "*.png"), d, unmatched]) == [b, d, unmatched]
    assert expand_paths([str(photos / "**" / "*.jpeg")]) == [c]
    remote = "gs://bucket/photo [1].jpg"
    assert expand_paths([remote]) == [remote]


def test_expand_paths_of_a_folder(tmp_path, caplog):
    """Images are known by their first bytes, links are followed, and a line counts the rest."""
    image = Image.fromarray(noise(8, 9))
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("photos/b.png", "photos/sub/a", "elsewhere/c.tif"):
        image.save(tmp_path / name, "TIFF" if name.endswith("tif") else "PNG")
    (tmp_path / "photos" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos" / "sub" / "loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "broken.jpg").write_text("no image")
    os.mkfifo(tmp_path / "photos" / "pipe.jpg")  # reading it would never end
    (tmp_path / "photos" / "@eaDir").mkdir()  # thumbnails
    image.save(tmp_path / "photos" / "@eaDir" / "b.png")
    for name in ("notes.txt", "clip.mp4", "Thumbs.db", "._b.png", ".hidden"):
        (tmp_path / "photos" / name).write_text("no image")
    with caplog.at_level("INFO", "vgg_jax"):
        files = expand_paths([str(tmp_path / "photos")])
    names = ["b.png", "broken.jpg", "link/c.tif", "sub/a"]
    assert files == [str(tmp_path / "photos" / name) for name in names]
    assert "skipped 7 files of" in caplog.text and "._b.png" in caplog.text


def test_expand_paths_names_empty_folder(tmp_path, caplog):
    Image.fromarray(noise(8, 9)).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    assert expand_paths([str(tmp_path / "a.png"), str(tmp_path / "empty")])
    assert "no images in" in caplog.text and "empty" in caplog.text


def test_expand_paths_follows_every_link(tmp_path):
    """As training does. A link to a folder around it is a cycle."""
    (tmp_path / "a" / "in").mkdir(parents=True)
    (tmp_path / "z").mkdir()
    Image.fromarray(noise(8, 9)).save(tmp_path / "a" / "in" / "1.png")
    for link, target in {"b": "a", "z/link": "../a", "a/in/out": "../../z", "a/up": ".."}.items():
        (tmp_path / link).symlink_to(target)
    files = [os.path.relpath(file, tmp_path) for file in expand_paths([str(tmp_path)])]
    assert files == ["a/in/1.png", "b/in/1.png", "z/link/in/1.png"]


def test_predict_command_reports_unreadable_files(weight_file, photos, tmp_path, capsys):
    Image.new("L", (12_500, 1)).save(tmp_path / "line.png")
    names = ("broken.jpg", "b.png", "missing.jpg", "notes.txt")
    files = [*(str(photos / name) for name in names), str(tmp_path / "line.png")]
    command = ["predict", weight_file, *files]
    assert cli.main([*command, "--json"]) == 3
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    predictions = {line["file"].rpartition("/")[2]: line for line in lines}
    assert {name: len(line.get("top", ())) for name, line in predictions.items()} == {
        "broken.jpg": 0,
        "b.png": 5,
        "missing.jpg": 0,
        "notes.txt": 0,
        "line.png": 0,
    }
    assert "cannot decode" in predictions["broken.jpg"]["error"]
    assert "No such file" in predictions["missing.jpg"]["error"]
    message = "line.png': at the test scale it has more than 2,000,000 pixels"
    assert message in predictions["line.png"]["error"]
    assert cli.main(command) == 3
    out, err = capsys.readouterr()
    assert "%" in out.splitlines()[0]
    assert len(out.splitlines()) == 1
    assert sum("expected JPEG" in line for line in err.splitlines()) == 4


def test_predict_command_with_crops_and_scales(weight_file, photos):
    options = ["--protocol", "ten-crop", "--scales", "16", "20"]
    assert cli.main(["predict", weight_file, str(photos / "b.png"), *options]) == 0


def test_predict_rejects_bad_input(weight_file, tmp_path, photos):
    images = [str(photos / "b.png")]
    with pytest.raises(InputError, match="no images in"):
        list(predict(weight_file, [str(tmp_path)]))
    with pytest.raises(InputError, match="top is 0: expected at least 1"):
        list(predict(weight_file, images, top=0))
    with pytest.raises(InputError, match=r"scales is \(15,\): expected at least .* 16"):
        list(predict(weight_file, images, scales=(15,)))


def test_predict_rejects_net_without_head(weight_file, tmp_path, photos):
    weights = read(weight_file)
    params = {name: layer for name, layer in weights.params.items() if name.startswith("conv")}
    headless = tmp_path / "headless.safetensors"
    save(headless, dataclasses.replace(weights, params=params, top=False))
    with pytest.raises(InputError, match=r"headless\.safetensors has no fully connected layers"):
        list(predict(headless, [str(photos / "b.png")]))


@pytest.mark.parametrize(
    "number, optimize_runtime", [(2, [False, False]), (16, [False]), (17, [True])]
)
def test_few_files_are_compiled_sooner(number, optimize_runtime, weight_file, photos, monkeypatch):
    options = []

    def compiler_options(optimize_runtime, dtype):
        options.append(optimize_runtime)
        return {}

    monkeypatch.setattr(dense, "compiler_options", compiler_options)
    dense.jitted_stages.cache_clear()
    files = [str(photos / "b.png")] * number
    assert len(list(predict(weight_file, files))) == number
    dense.jitted_stages.cache_clear()
    assert options == optimize_runtime  # the second program is for small batches
