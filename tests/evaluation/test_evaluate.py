"""Errors and files of evaluations on a folder of photos. `test_dense` checks the posteriors."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vgg_jax
from tests.helpers.runs import without_times
from tests.helpers.tiny import init
from vgg_jax import IMAGENET, InputError, TrainConfig, cli, load
from vgg_jax.configs.evaluation import EvalProtocol
from vgg_jax.data import decode, open_train_val, resize_shorter_side
from vgg_jax.evaluation.class_names import map_class_indices
from vgg_jax.evaluation.dense import class_posteriors
from vgg_jax.evaluation.evaluate import (
    Evaluation,
    evaluate,
    fuse,
    load_evaluation,
    save_evaluation,
)
from vgg_jax.metrics import wilson_interval
from vgg_jax.model import build_model
from vgg_jax.runs.checkpoint import CheckpointStore
from vgg_jax.runs.metadata import RunMetadata, create_run
from vgg_jax.weights import read as read_weights
from vgg_jax.weights import save as save_weights
from vgg_jax.weights.pretrained import WEIGHTS, own_file

COUNT = 7  # photos per split

pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(COUNT):
        for split in ("train", "val"):
            path = root / split / ("blue", "red")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (20 + 3 * i, 30, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module")
def workdir(photos, tmp_path_factory):
    """The folder of a run that has saved its net once."""
    folder = tmp_path_factory.mktemp("run")
    config = TrainConfig(
        data=str(photos),
        net="shallow",
        fc=(24, 16),
        image_size=16,
        scale=(16, 24),
        learning_rate=0.1,
    )
    storage = open_train_val(str(photos))[0].storage
    create_run(folder, RunMetadata(config, ("blue", "red"), IMAGENET, storage, COUNT, COUNT))
    with CheckpointStore(folder / "best") as best:
        best.save(1, init(build_model(config, 2)), {"epoch": 1, "validation": {}})
    return folder


def copy_run(workdir, target, old, new):
    """Copies a run's folder and edits its run.json."""
    shutil.copytree(workdir, target)
    text = (target / "run.json").read_text()
    assert old in text
    (target / "run.json").write_text(text.replace(old, new))
    return target


IMAGENET_LIKE = (
    "n01440764 tench, Tinca tinca",
    "n02012849 crane",
    "n03126707 crane",
    "Great_White",
)


@pytest.mark.parametrize(
    ("match", "names", "expected"),
    [
        ("exact", ["n03126707", "Great_White"], [2, 3]),
        ("order", ["a", "b", "c", "d"], [0, 1, 2, 3]),
        ("synset", ["n02012849-bird", "n01440764_tench"], [1, 0]),
        ("name", ["great white", "TENCH", "tinca-tinca", "n9 no"], [3, 0, 0, None]),
        ("name", ["crane"], [None]),  # two classes fit
        ("order", ["a"], [None]),
        ("exact", ["tench"], [None]),
        ("synset", ["n014407640"], [None]),
    ],
)
def test_map_class_indices(match, names, expected):
    if None not in expected:
        assert map_class_indices(names, IMAGENET_LIKE, "message", match).tolist() == expected
        return
    with pytest.raises(InputError, match=r"message: .*; pass .*--classes FILE"):
        map_class_indices(names, IMAGENET_LIKE, "message", match)


def test_map_class_indices_proposes_a_match():
    with pytest.raises(InputError, match="pass --match name, or the net's names with --classes"):
        map_class_indices(["tench"], IMAGENET_LIKE, "message")
    with pytest.raises(InputError, match="pass --match order or name, or"):
        map_class_indices(["x-y", "z"], ["X y", "Z"], "message")


@pytest.mark.slow
def test_evaluate_keeps_order_of_data(workdir, photos, tmp_path):
    results = evaluate(*load(workdir), scales=(18, 24), out=tmp_path)
    evaluation = load_evaluation(tmp_path / "posteriors.npz")
    files = [
        photos / "val" / label / f"{i}.png"
        for label, start in (("blue", 0), ("red", 1))
        for i in range(start, COUNT, 2)
    ]
    assert evaluation.files.tolist() == [str(file) for file in files]
    assert evaluation.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert evaluation.classes.tolist() == ["blue", "red"]
    model, variables, _ = load(workdir)
    images = [
        [resize_shorter_side(decode(file.read_bytes()), scale).numpy() for scale in (18, 24)]
        for file in files
    ]
    expected = class_posteriors(model, variables, images)
    np.testing.assert_allclose(evaluation.posteriors, expected, atol=1e-6)
    error_rate = (evaluation.posteriors.argmax(1) != evaluation.labels).mean()
    assert results["top1_error"] == pytest.approx(error_rate)
    assert (results["top5_error"], results["count"], results["scales"]) == (0, COUNT, [18, 24])


@pytest.fixture
def exported(workdir, photos, tmp_path):
    """The run's weights with the classes in another order, and photos named by WordNet id."""
    weights = read_weights(workdir)
    fc8 = {name: np.roll(np.asarray(array), 1, -1) for name, array in weights.params["fc8"].items()}
    weights = dataclasses.replace(
        weights,
        params={**weights.params, "fc8": fc8},
        classes=("n00000002 red things", "n00000001 blue things"),
    )
    save_weights(tmp_path / "net.safetensors", weights)
    shutil.copytree(photos, tmp_path / "photos")
    for split in ("train", "val"):
        for name, wordnet_id in (("blue", "n00000001"), ("red", "n00000002")):
            (tmp_path / "photos" / split / name).rename(tmp_path / "photos" / split / wordnet_id)
    return tmp_path / "net.safetensors", str(tmp_path / "photos")


def test_evaluate_weight_file_matches_run(workdir, exported, tmp_path):
    file, data = exported
    results = evaluate(*load(workdir), out=tmp_path / "run")
    evaluate(*load(file), data, out=tmp_path / "file")
    expected, actual = (
        load_evaluation(tmp_path / name / "posteriors.npz") for name in ("run", "file")
    )
    np.testing.assert_allclose(actual.posteriors[:, ::-1], expected.posteriors, atol=1e-6)
    np.testing.assert_array_equal(actual.labels, 1 - expected.labels)
    assert actual.errors()["top1_error"] == results["top1_error"]
    with pytest.raises(InputError, match=r"net\.safetensors is not a run and no data is given"):
        evaluate(*load(file))


def test_evaluate_command_on_weight_file(exported, monkeypatch, capsys):
    folder = exported[0].parent
    monkeypatch.chdir(folder)
    assert cli.main(["evaluate", "net.safetensors", "photos", "--protocol", "center"]) == 0
    results = folder / "net.safetensors-evaluated" / "photos-val-center-20"
    assert (results / "posteriors.npz").exists()
    (folder / "cut.safetensors").write_bytes(exported[0].read_bytes()[:100])
    assert cli.main(["evaluate", "cut.safetensors", "photos"]) == 2
    assert not (folder / "cut.safetensors-evaluated").exists()
    capsys.readouterr()


def test_evaluate_command_by_name(exported, monkeypatch, capsys):
    """The results of a file in a cache go to the current folder."""
    name = "timm/vgg11_bn.tv_in1k"  # no digest of it is known, so another file can stand for it
    folder = exported[0].parent
    monkeypatch.setenv("VGG_JAX_CACHE", str(folder / "cache"))
    cached = own_file(WEIGHTS[name])
    cached.parent.mkdir(parents=True)
    shutil.copy(exported[0], cached)
    (folder / "work").mkdir()
    monkeypatch.chdir(folder / "work")
    assert cli.main(["evaluate", name, exported[1], "--protocol", "center"]) == 0
    (results,) = Path("timm-vgg11_bn.tv_in1k-evaluated").iterdir()
    assert f"{results}/evaluation.json" in capsys.readouterr().out
    assert json.loads((results / "evaluation.json").read_text())["run"] == name
    assert cli.main(["evaluate", name, "nowhere", "--protocol", "center", "--out", "out"]) == 2
    assert [path.name for path in Path().iterdir()] == [results.parent.name]


def test_evaluate_command_prints_and_writes(workdir, photos, capsys):
    command = ["evaluate", str(workdir), "--protocol", "center"]
    assert cli.main(command) == 0
    assert cli.main([*command, "--flip", "--ceil"]) == 0
    out = capsys.readouterr().out
    assert "center, Q = 20: top-1 error" in out  # the middle of the jitter
    assert f"{COUNT} images" in out
    results = json.loads((workdir / "val-center-20" / "evaluation.json").read_text())
    protocol = {"name": "center", "flip": False, "softmax_first": False, "ceil": False}
    protocol |= {"rounding": "nearest"}
    assert results["protocol"] == protocol
    assert results["data"] == str(photos)
    metrics = vgg_jax.evaluate(*load(workdir), protocol="center")
    assert without_times([json.loads(json.dumps(metrics))]) == without_times([results])
    evaluation = load_evaluation(workdir / "val-center-20" / "posteriors.npz")
    assert evaluation.posteriors.shape == (COUNT, 2)
    assert (workdir / "val-center-20-mirrored-ceil" / "posteriors.npz").exists()


def test_evaluate_flips_if_run_did(workdir, tmp_path):
    def uses_flip(path, **settings):
        return evaluate(*load(path), **settings)["protocol"]["flip"]

    assert uses_flip(workdir)
    unflipped = copy_run(workdir, tmp_path / "run", '"flip": true', '"flip": false')
    assert not uses_flip(unflipped)
    assert uses_flip(unflipped, protocol=EvalProtocol(flip=True))


def test_evaluate_rejects_changed_validation_data(workdir, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    moved = copy_run(workdir, tmp_path / "run", str(photos), str(tmp_path / "photos"))
    net = load(moved)
    evaluate(*net, protocol="center")
    photo = tmp_path / "photos" / "train" / "blue" / "0.png"
    photo.rename(photo.with_name("00.png"))
    message = r"is not what .*run was trained on: expected .* images \(folder, names"
    with pytest.raises(InputError, match=message):
        evaluate(*net, protocol="center")


def test_evaluate_held_out_images_of_moved_data(workdir, photos, tmp_path):
    """A run that held out a tenth evaluates it in a copy of the data, and not in other data."""
    data, moved = tmp_path / "photos", tmp_path / "moved"
    shutil.copytree(photos / "train", data)
    train, validation = open_train_val(str(data))
    run = copy_run(workdir, tmp_path / "run", str(photos), str(data))
    content = json.loads((run / "run.json").read_text()) | {
        "storage": train.storage,
        "train_size": train.size,
        "validation_size": validation.size,
    }
    (run / "run.json").write_text(json.dumps(content))
    evaluate(*load(run), protocol="center", out=tmp_path / "before")
    data.rename(moved)
    with pytest.raises(InputError, match=f"no folder '{data}'"):
        evaluate(*load(run), protocol="center")
    evaluate(*load(run), moved, protocol="center", out=tmp_path / "after")
    before, after = (load_evaluation(tmp_path / name) for name in ("before", "after"))
    np.testing.assert_array_equal(before.posteriors, after.posteriors)
    assert len(after.files) == validation.size < COUNT
    assert len(fuse([tmp_path / "before", tmp_path / "after"]).labels) == validation.size
    (moved / "blue" / "0.png").rename(moved / "blue" / "00.png")
    with pytest.raises(InputError, match=r"moved is not what .*run was trained on"):
        evaluate(*load(run), moved, protocol="center")


def test_evaluate_other_data_without_validation_split(workdir, photos, tmp_path):
    """It is compared with the run's before it is divided, which one class does not allow."""
    net, one_class, test = load(workdir), tmp_path / "one class", tmp_path / "test only"
    shutil.copytree(photos / "train" / "blue", one_class / "blue")
    shutil.copytree(photos / "train", test / "test")
    with pytest.raises(InputError, match=r"one class is not what .* was trained on: .*split train"):
        evaluate(*net, one_class, protocol="center")
    assert evaluate(*net, one_class, "train", protocol="center")["count"] == COUNT - COUNT // 2
    with pytest.raises(InputError, match=r"has no split 'val': expected one of test"):
        evaluate(*net, test, protocol="center")


def test_evaluate_rejects_missing_images(workdir, monkeypatch):
    monkeypatch.setattr("vgg_jax.evaluation.evaluate.iter_posteriors", lambda *_, **__: iter([]))
    with pytest.raises(RuntimeError, match=f"0 of {COUNT} images were evaluated"):
        evaluate(*load(workdir), protocol="center")


@pytest.mark.slow
def test_fuse_command_averages(workdir, tmp_path, capsys):
    files = []
    for scale in ("16", "24"):
        out = tmp_path / scale
        assert cli.main(["evaluate", str(workdir), "--scales", scale, "--out", str(out)]) == 0
        files.append(str(out / "posteriors.npz"))
    assert cli.main(["fuse", *files, "--out", str(tmp_path / "fused")]) == 0
    assert "mean of 2 posteriors: top-1 error" in capsys.readouterr().out
    first, second = (load_evaluation(file).posteriors for file in files)
    fused = load_evaluation(tmp_path / "fused" / "posteriors.npz").posteriors
    np.testing.assert_allclose(fused, (first + second) / 2, atol=1e-7)


def test_fuse_finds_evaluation_in_folder(tmp_path):
    run, out = tmp_path / "run", tmp_path / "run" / "val-dense-256"
    run.mkdir()
    with pytest.raises(InputError, match=r"holds no evaluation: .*`vgg-jax evaluate .*run` first"):
        fuse([run])
    save_evaluation(out, EVALUATION, {})
    for path in (run, out, out / "posteriors.npz"):
        np.testing.assert_array_equal(fuse([path, path]).posteriors, EVALUATION.posteriors)
    save_evaluation(run / "val-center-256", EVALUATION, {})
    with pytest.raises(InputError, match=r"holds 2 evaluations: .*val-center-256.*val-dense-256"):
        fuse([run])


def test_fuse_absolute_and_relative_names(tmp_path):
    """As those of a list, which have no folder in common."""
    files = np.array(["/photos/a.png", "photos/b.png"])
    save_evaluation(tmp_path, dataclasses.replace(EVALUATION, files=files), {})
    assert fuse([tmp_path, tmp_path]).files.tolist() == files.tolist()


EVALUATION = Evaluation(
    np.float32([[0.9, 0.1], [0.4, 0.6]]),
    np.int32([0, 0]),
    np.array(["a.png", "two\nlines.png"]),
    np.array(["ants", "bees"]),
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"files": np.array(["a.png", "c.png"])},
            r"image 1 is 'c.png' in {b} and 'two\nlines.png' in {a}",
        ),
        ({"classes": np.array(["bees", "ants"])}, "class 0 is 'bees' in {b} and 'ants' in {a}"),
        ({"labels": np.int32([0, 1])}, "label of image 1 is '1' in {b} and '0' in {a}"),
    ],
    ids=["files", "classes", "labels"],
)
def test_fuse_rejects_other_data(change, message, tmp_path):
    save_evaluation(tmp_path / "a", EVALUATION, {})
    save_evaluation(tmp_path / "b", dataclasses.replace(EVALUATION, **change), {})
    a, b = tmp_path / "a" / "posteriors.npz", tmp_path / "b" / "posteriors.npz"
    with pytest.raises(InputError) as error:
        fuse([a, b])
    assert message.format(a=a, b=b) in str(error.value)


def test_load_evaluation_rejects_damaged_files(tmp_path):
    save_evaluation(tmp_path, EVALUATION, {})
    content = (tmp_path / "posteriors.npz").read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"no archive", content[:-1]):
        (tmp_path / "cut.npz").write_bytes(damaged)
        with pytest.raises(InputError, match=r"cut\.npz cannot be read"):
            load_evaluation(tmp_path / "cut.npz")


def test_load_evaluation_rejects_foreign_arrays(tmp_path):
    arrays = dataclasses.asdict(EVALUATION)
    np.savez(tmp_path / "pickled.npz", **arrays | {"files": np.array([{}, {}], object)})
    with pytest.raises(InputError, match=r"pickled\.npz cannot be read"):
        load_evaluation(tmp_path / "pickled.npz")
    np.savez(tmp_path / "short.npz", **arrays | {"labels": np.int32([0])})
    message = (
        r"short\.npz cannot be read \(posteriors \(2, 2\), labels \(1,\), .*: expected \(N, K\)"
    )
    with pytest.raises(InputError, match=message):
        load_evaluation(tmp_path / "short.npz")


def test_errors_match_hand_computation():
    errors = EVALUATION.errors()
    assert errors["top1_error"] == 0.5
    assert errors["loss"] == pytest.approx(-(np.log(0.9) + np.log(0.4)) / 2)


def test_errors_rank_close_posteriors():
    """Their logarithms are equal in float32."""
    posteriors = np.full((3, 1000), 1e-3, np.float32)
    labels = np.array([999, 500, 2])
    posteriors[np.arange(3), labels] = np.nextafter(np.float32(1e-3), np.float32(1))
    errors = Evaluation(posteriors, labels, np.arange(3), np.arange(1000)).errors()
    assert (errors["top1_error"], errors["top5_error"]) == (0, 0)
    assert errors["loss"] == pytest.approx(np.log(1000), abs=1e-6)


def test_wilson_interval_solves_its_quadratic():
    """The bounds p are the roots of (p - observed)² = z² p (1 - p) / n."""
    for observed, n in ((0.25, 500), (0.0, 10), (1.0, 7)):
        z2 = 1.959964**2
        low, high = np.sort(np.roots([1 + z2 / n, -2 * observed - z2 / n, observed**2]))
        assert wilson_interval(observed, n) == pytest.approx((max(low, 0), min(high, 1)), abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scales", "15"], ("scales", "15", "16")),
        (["--split", "test"], ("test", "train, val")),
        (
            ["digits", "--split", "train"],
            ("classes that", "does not know: '0', '1'", "some of its 2: 'blue', 'red'"),
        ),
        (["no/such/folder"], ("no/such/folder",)),
        (["--protocol", "sparse"], ("sparse", "multi-crop")),
    ],
    ids=["scale", "split", "classes", "folder", "protocol"],
)
def test_evaluate_command_rejects_bad_input(
    arguments, words, workdir, capsys, tmp_path, monkeypatch
):
    """The last line of stderr names the value and what was expected."""
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(["evaluate", str(workdir), *arguments])
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2
    assert all(word in err.strip().splitlines()[-1] for word in words), err
