"""From a run and a folder of photos to errors and files; what is computed is compared in `test_posteriors`."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny import init
from vgg_jax import IMAGENET, InputError, TrainConfig, cli
from vgg_jax.configs.evaluation import EvalProtocol
from vgg_jax.data import decode, open_train_val, resize_shorter_side
from vgg_jax.evaluation.dense import class_posteriors
from vgg_jax.evaluation.evaluate import Evaluation, evaluate, fuse, load_evaluation, save_evaluation
from vgg_jax.metrics import wilson_interval
from vgg_jax.model import build_model
from vgg_jax.runs.checkpoint import CheckpointStore
from vgg_jax.runs.metadata import RunMetadata, create_run
from vgg_jax.weights import read as weights_of
from vgg_jax.weights import save as save_weights

COUNT = 7


pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(COUNT):
        for split in ("train", "val"):
            path = root / split / ("blue", "red")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20 + 3 * i, 30, 3)).astype(np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """The workdir of a run that has saved its net once."""
    workdir = tmp_path_factory.mktemp("run")
    config = TrainConfig(
        data=str(photos),
        net="shallow",
        fc=(24, 16),
        image_size=16,
        scale=(16, 24),
        learning_rate=0.1,
    )
    create_run(
        workdir,
        RunMetadata(
            config, ("blue", "red"), IMAGENET, open_train_val(str(photos))[0].storage, COUNT, COUNT
        ),
    )
    with CheckpointStore(workdir / "best") as best:
        best.save(1, init(build_model(config, 2)), {"epoch": 1, "validation": {}})
    return workdir


def test_posteriors_labels_and_names_are_in_the_order_of_the_data(run, photos):
    evaluation, facts = evaluate(run, scales=(18, 24))
    files = [
        photos / "val" / label / f"{i}.png"
        for label, start in (("blue", 0), ("red", 1))
        for i in range(start, COUNT, 2)
    ]
    assert evaluation.files.tolist() == [str(file) for file in files]
    assert evaluation.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert evaluation.classes.tolist() == ["blue", "red"]
    from vgg_jax import load

    model, variables, _ = load(run)
    images = [
        [resize_shorter_side(decode(file.read_bytes()), scale).numpy() for scale in (18, 24)]
        for file in files
    ]
    np.testing.assert_allclose(
        evaluation.posteriors, class_posteriors(model, variables, images), atol=1e-6
    )
    wrong = (evaluation.posteriors.argmax(1) != evaluation.labels).mean()
    assert facts["top1_error"] == pytest.approx(wrong)
    assert (facts["top5_error"], facts["count"], facts["scales"]) == (0, COUNT, [18, 24])


def test_a_file_of_weights_on_some_of_its_classes_in_another_order(
    run, photos, tmp_path, monkeypatch, capsys
):
    """Exported, it gives what the run gives; "n00000001" is the net's "n00000001 blue things"."""
    weights = weights_of(run)
    params = {
        **weights.params,
        "fc8": {
            leaf: np.roll(np.asarray(array), 1, -1) for leaf, array in weights.params["fc8"].items()
        },
    }
    classes = ("n00000002 red things", "n00000001 blue things")
    save_weights(
        tmp_path / "net.safetensors", dataclasses.replace(weights, params=params, classes=classes)
    )
    shutil.copytree(photos, tmp_path / "photos")
    for split in ("train", "val"):
        for name, synset in (("blue", "n00000001"), ("red", "n00000002")):
            (tmp_path / "photos" / split / name).rename(tmp_path / "photos" / split / synset)
    ours, facts = evaluate(run)
    found, _ = evaluate(tmp_path / "net.safetensors", str(tmp_path / "photos"))
    np.testing.assert_allclose(found.posteriors[:, ::-1], ours.posteriors, atol=1e-6)
    np.testing.assert_array_equal(found.labels, 1 - ours.labels)
    assert found.errors()["top1_error"] == facts["top1_error"]
    with pytest.raises(InputError, match="is a file of weights and DATA is not given"):
        evaluate(tmp_path / "net.safetensors")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "net.safetensors", "photos", "--protocol", "center"]) == 0
    assert (
        tmp_path / "net.safetensors-evaluated" / "photos-val-center-20" / "posteriors.npz"
    ).exists()
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "net.safetensors").read_bytes()[:100])
    assert cli.main(["evaluate", "cut.safetensors", "photos"]) == 2
    assert not (tmp_path / "cut.safetensors-evaluated").exists()
    capsys.readouterr()


def test_the_command_prints_and_writes(run, photos, capsys):
    assert cli.main(["evaluate", str(run), "--protocol", "center"]) == 0
    assert cli.main(["evaluate", str(run), "--protocol", "center", "--flip", "--ceil"]) == 0
    out = capsys.readouterr().out
    assert "center, Q = 20: top-1 error" in out  # the middle of the jitter
    assert f"{COUNT} images" in out
    facts = json.loads((run / "val-center-20" / "evaluation.json").read_text())
    assert facts["protocol"] == {
        "name": "center",
        "flip": False,
        "softmax_first": False,
        "ceil": False,
    }
    assert facts["data"] == str(photos)
    assert load_evaluation(run / "val-center-20" / "posteriors.npz").posteriors.shape == (COUNT, 2)
    assert (run / "val-center-20-mirrored-ceil" / "posteriors.npz").exists()


def test_mirror_images_count_where_the_run_was_trained_with_them(run, tmp_path):
    assert evaluate(run)[1]["protocol"]["flip"]
    shutil.copytree(run, tmp_path / "run")
    text = (tmp_path / "run" / "run.json").read_text()
    (tmp_path / "run" / "run.json").write_text(text.replace('"flip": true', '"flip": false'))
    assert not evaluate(tmp_path / "run")[1]["protocol"]["flip"]
    assert evaluate(tmp_path / "run", protocol=EvalProtocol(flip=True))[1]["protocol"]["flip"]


def test_fusion_is_the_mean(run, tmp_path, capsys):
    folders = []
    for scale in ("16", "24"):
        assert (
            cli.main(["evaluate", str(run), "--scales", scale, "--out", str(tmp_path / scale)]) == 0
        )
        folders.append(str(tmp_path / scale / "posteriors.npz"))
    assert cli.main(["fuse", *folders, "--out", str(tmp_path / "fused")]) == 0
    assert "mean of 2 posteriors: top-1 error" in capsys.readouterr().out
    one, other, fused = (
        load_evaluation(path) for path in (*folders, tmp_path / "fused" / "posteriors.npz")
    )
    np.testing.assert_allclose(fused.posteriors, (one.posteriors + other.posteriors) / 2, atol=1e-7)


EVALUATION = Evaluation(
    np.float32([[0.9, 0.1], [0.4, 0.6]]),
    np.int32([0, 0]),
    np.array(["a.png", "two\nlines.png"]),
    np.array(["ants", "bees"]),
)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"files": np.array(["a.png", "c.png"])}, r"image 1 is 'c.png' and 'two\nlines.png'"),
        ({"classes": np.array(["bees", "ants"])}, "class 0 is 'bees' and 'ants'"),
        ({"labels": np.int32([0, 1])}, "label of image 1 is '1' and '0'"),
    ],
)
def test_what_does_not_fit_is_not_fused(change, words, tmp_path):
    save_evaluation(tmp_path / "a", EVALUATION, {})
    save_evaluation(tmp_path / "b", dataclasses.replace(EVALUATION, **change), {})
    with pytest.raises(InputError) as error:
        fuse([tmp_path / "a" / "posteriors.npz", tmp_path / "b" / "posteriors.npz"])
    assert words in str(error.value)


def test_what_a_run_validated_on_must_be_there_unchanged(run, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    shutil.copytree(run, tmp_path / "run")
    text = (tmp_path / "run" / "run.json").read_text()
    (tmp_path / "run" / "run.json").write_text(text.replace(str(photos), str(tmp_path / "photos")))
    evaluate(tmp_path / "run", protocol=EvalProtocol("center"))
    (tmp_path / "photos" / "train" / "blue" / "0.png").rename(
        tmp_path / "photos" / "train" / "blue" / "00.png"
    )
    with pytest.raises(
        InputError,
        match=r"is not what .*run was trained on: storage and sizes were \('folder, names",
    ):
        evaluate(tmp_path / "run", protocol=EvalProtocol("center"))


def test_a_file_that_is_cut_or_foreign(tmp_path):
    save_evaluation(tmp_path, EVALUATION, {})
    whole = (tmp_path / "posteriors.npz").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no archive", whole[:-1]):
        (tmp_path / "cut.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"cut\.npz cannot be read"):
            load_evaluation(tmp_path / "cut.npz")
    np.savez(
        tmp_path / "pickled.npz",
        **dataclasses.asdict(EVALUATION) | {"files": np.array([{}, {}], object)},
    )
    with pytest.raises(InputError, match=r"pickled\.npz cannot be read"):
        load_evaluation(tmp_path / "pickled.npz")
    np.savez(tmp_path / "short.npz", **dataclasses.asdict(EVALUATION) | {"labels": np.int32([0])})
    with pytest.raises(
        InputError, match=r"short\.npz cannot be read \(its arrays do not fit together\)"
    ):
        load_evaluation(tmp_path / "short.npz")


def test_errors_by_hand():
    errors = dataclasses.replace(EVALUATION, labels=np.int32([0, 0])).errors()
    assert errors["top1_error"] == 0.5
    assert errors["loss"] == pytest.approx(-(np.log(0.9) + np.log(0.4)) / 2)


def test_wilsons_interval():
    """Against the roots of the quadratic it solves: (p - observed)² = z² p (1 - p) / n."""
    for observed, n in ((0.25, 500), (0.0, 10), (1.0, 7)):
        z2 = 1.959964**2
        low, high = np.sort(np.roots([1 + z2 / n, -2 * observed - z2 / n, observed**2]))
        assert wilson_interval(observed, n) == pytest.approx((max(low, 0), min(high, 1)), abs=1e-9)


@pytest.mark.parametrize(
    ("argv", "words"),
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
)
def test_bad_input_gets_one_sentence(argv, words, run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = cli.main(["evaluate", str(run), *argv])
    except SystemExit as error:
        code = error.code
    err = capsys.readouterr().err
    assert code == 2
    assert all(word in err.strip().splitlines()[-1] for word in words), err
