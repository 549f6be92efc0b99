"""`fit`, `evaluate` and `export` in Python: they do what the commands of the same names do."""

import json
import zipfile

import jax
import numpy as np
import pytest
from safetensors import safe_open

import vgg_jax
from tests.helpers.compare import assert_close_to_largest
from tests.helpers.export_files import run_stablehlo
from tests.helpers.photos import make_photo_folder
from tests.helpers.runs import make_config, without_times
from vgg_jax import InputError, cli
from vgg_jax.evaluation.evaluate import format_errors
from vgg_jax.export.verify import TOLERANCE, verify

pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(photos, small_nets, tmp_path_factory):
    """The folder of a run that `fit` made."""
    folder = tmp_path_factory.mktemp("run")
    result = vgg_jax.fit(make_config(photos, epochs=1, flip=False), folder)
    assert [record["epoch"] for record in result.history] == [1]
    return folder


@pytest.fixture(scope="module")
def net(run):
    return vgg_jax.load(run)


@pytest.mark.slow
def test_evaluate_gives_numbers_of_command(run, net, capsys):
    metrics = vgg_jax.evaluate(*net, protocol="ten-crop", scales=[18, 22])
    assert (metrics["count"], metrics["scales"], metrics["epoch"]) == (7, [18, 22], 1)
    flags = ["--protocol", "ten-crop", "--scales", "18", "22"]
    assert cli.main(["evaluate", str(run), *flags]) == 0
    assert f": {format_errors(metrics, 2)}\n" in capsys.readouterr().out
    results = json.loads((run / "val-ten-crop-18-22" / "evaluation.json").read_text())
    assert without_times([json.loads(json.dumps(metrics))]) == without_times([results])


@pytest.mark.slow
def test_classes_of_run_can_be_replaced(run):
    assert vgg_jax.load(run, classes=["sea", "fire"])[2]["classes"] == ("sea", "fire")
    with pytest.raises(InputError, match="classes has 1 names and the net has 2 classes"):
        vgg_jax.load(run, classes=["sea"])


def test_evaluate_saved_net(net, photos, tmp_path):
    """Also with no more metadata than `save` takes."""
    vgg_jax.save(tmp_path / "net.safetensors", *net)
    saved = vgg_jax.load(tmp_path / "net.safetensors")
    least = {name: net[2][name] for name in ("net", "classes", "preprocessing")}
    expected = vgg_jax.evaluate(*net)
    of_file = vgg_jax.evaluate(*saved, photos)
    of_variables = vgg_jax.evaluate(net[0], net[1], least | {"flip": False}, photos)
    for name in ("top1_error", "loss", "count", "scales", "protocol"):
        assert of_file[name] == of_variables[name] == expected[name]
    with pytest.raises(InputError, match="the net is not a run and no data is given: expected an"):
        vgg_jax.evaluate(net[0], net[1], least)


def test_evaluate_rejects_classes_of_another_head(net, photos):
    model, variables = vgg_jax.with_new_head(*net[:2], 3, jax.random.key(0))
    with pytest.raises(InputError, match="the metadata has 2 classes and the model 3"):
        vgg_jax.evaluate(model, variables, net[2], photos)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, []),
        ({"fold_batch_norm": True, "bfloat16": True}, ["--fold-batch-norm", "--bfloat16"]),
    ],
    ids=["default", "folded"],
)
def test_export_writes_file_of_command(options, flags, run, net, tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    vgg_jax.export.export(ours, *net, **options)
    assert cli.main(["export", str(run), str(theirs), *flags]) == 0
    with safe_open(ours, "numpy") as one, safe_open(theirs, "numpy") as other:
        assert one.metadata() == other.metadata()
        assert {*one.keys()} == {*other.keys()}
        for name in one.keys():  # noqa: SIM118 - the file is no dict
            np.testing.assert_array_equal(one.get_tensor(name), other.get_tensor(name))
    assert verify(ours)[1] < TOLERANCE


def test_export_writes_program_of_command(run, net, tmp_path):
    ours, theirs = tmp_path / "ours.stablehlo", tmp_path / "theirs.stablehlo"
    vgg_jax.export.export(ours, *net, output="posteriors", uint8=False)
    flags = ["--output", "posteriors", "--no-uint8"]
    assert cli.main(["export", str(run), str(theirs), *flags]) == 0
    with zipfile.ZipFile(ours) as one, zipfile.ZipFile(theirs) as other:
        for name in ("metadata.json", "weights.safetensors"):
            assert one.read(name) == other.read(name)
    assert verify(ours)[1] < TOLERANCE
    images = np.random.default_rng(0).normal(0, 50, (2, 16, 16, 3)).astype(np.float32)
    posteriors = jax.nn.softmax(net[0].apply(net[1], images))
    assert_close_to_largest(run_stablehlo(ours, images), posteriors)


def test_export_rejects_layout_and_ending(net, tmp_path):
    with pytest.raises(InputError, match="the net is shallow, which timm does not have"):
        vgg_jax.export.export(tmp_path / "net.safetensors", *net, layout="timm")
    with pytest.raises(InputError, match=r"ends in '.pb': expected \.safetensors, \.onnx"):
        vgg_jax.export.export(tmp_path / "net.pb", *net)
    assert not list(tmp_path.iterdir())
