"""Exported files, run by the libraries that run such files, against our own answer."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny import init
from tests.test_features import narrow
from vgg_jax import CONFIGS, IMAGENET, VGG, InputError, cli, compiler_options
from vgg_jax.export import ExportSpec, fold_batch_norm, write
from vgg_jax.export.spec import format_of
from vgg_jax.export.verify import verify
from vgg_jax.weights import Weights, read
from vgg_jax.weights.layouts import Preprocessing

CLASSES = ("ants", "bees", "wasps")
WIDE = dataclasses.replace(
    CONFIGS["A"], fc=(12, 8)
)  # its convolutions are the paper's, which a file is recognised by


def weights(net="D", batch_norm=False, size=32, config=None):
    model = VGG(config or narrow(net), len(CLASSES), batch_norm, image_size=size)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: np.asarray(x + np.float32(rng.uniform(0, 0.1, x.shape))), dict(init(model))
    )
    variables["params"]["conv1_1"]["kernel"] = (
        variables["params"]["conv1_1"]["kernel"] / 50
    )  # images are 0-255
    return Weights(
        net,
        "vgg_jax",
        model,
        variables["params"],
        variables.get("batch_stats", {}),
        True,
        Preprocessing(IMAGENET.mean_rgb),
        CLASSES,
    )


def photos(*shape, seed=3):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def ours(artefact, images):
    return np.asarray(
        jax.jit(artefact, compiler_options=compiler_options())(artefact.weights.variables, images)
    )


def same(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()


def run_onnx(path, images):
    onnxruntime = pytest.importorskip(
        "onnxruntime", reason="needs onnxruntime: pip install 'vgg-jax[onnx]'"
    )
    return onnxruntime.InferenceSession(path).run(None, {"images": images})[0]


def run_stablehlo(path, images):
    import zipfile

    from safetensors.numpy import load

    with zipfile.ZipFile(path) as file:
        program = jax.export.deserialize(bytearray(file.read("program")))
        assert program.platforms == ("cpu", "cuda", "tpu")
        return np.asarray(program.call(load(file.read("weights.safetensors")), images))


def run_savedmodel(path, images):
    import tensorflow as tf

    (answer,) = (
        tf.saved_model.load(str(path))
        .signatures["serving_default"](images=tf.constant(images))
        .values()
    )
    return answer.numpy()


RUN = {"onnx": run_onnx, "stablehlo": run_stablehlo, "savedmodel": run_savedmodel}


@pytest.mark.parametrize(
    "net", [*(pytest.param(net, marks=pytest.mark.slow) for net in "ABDE"), "A-LRN", "C"]
)
def test_onnx_of_every_net(net, tmp_path):
    pytest.importorskip("onnx", reason="needs onnx: pip install 'vgg-jax[onnx]'")
    artefact = ExportSpec(weights(net))
    write(tmp_path / "net.onnx", artefact)
    same(run_onnx(tmp_path / "net.onnx", photos(3, 32, 32)), ours(artefact, photos(3, 32, 32)))


@pytest.mark.parametrize("output", ["posteriors", "score_map"])
@pytest.mark.parametrize("kind", RUN)
def test_any_size_any_batch(kind, output, tmp_path):
    if kind == "onnx":
        pytest.importorskip("onnx", reason="needs onnx: pip install 'vgg-jax[onnx]'")
    artefact = ExportSpec(weights("A", batch_norm=True), output)
    write(tmp_path / f"net.{kind}", artefact)
    for shape in ((1, 32, 32), (2, 33, 70)):
        expected = ours(artefact, photos(*shape))
        assert expected.shape == (
            (shape[0], 1, shape[2] // 32, 3) if output == "score_map" else (shape[0], 3)
        )
        same(RUN[kind](tmp_path / f"net.{kind}", photos(*shape)), expected)


@pytest.mark.parametrize("kind", RUN)
@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_float_images_and_stored_types(kind, bfloat16, tmp_path):
    if kind == "onnx":
        pytest.importorskip("onnx", reason="needs onnx: pip install 'vgg-jax[onnx]'")
    artefact = ExportSpec(weights("A-LRN"), uint8=False, bfloat16=bfloat16)
    path = tmp_path / f"net.{kind}"
    write(path, artefact)
    images = photos(2, 32, 32).astype(np.float32) - np.float32(IMAGENET.mean_rgb)
    if not bfloat16:
        same(RUN[kind](path, images), ours(artefact, images))
        return
    rounded = jax.tree.map(
        lambda x: x.astype(artefact.dtype).astype(np.float32), artefact.weights.params
    )
    same(
        RUN[kind](path, images),
        np.asarray(artefact.weights.model.apply({"params": rounded}, images)),
    )
    whole = tmp_path / f"whole.{kind}"
    write(whole, dataclasses.replace(artefact, bfloat16=False))
    sizes = [
        sum(file.stat().st_size for file in (each.rglob("*") if each.is_dir() else [each]))
        for each in (path, whole)
    ]
    assert sizes[1] - sizes[0] > 0.8 * 2 * sum(
        array.size for array in jax.tree.leaves(artefact.weights.params)
    )


def test_a_folded_batch_normalisation_is_the_same_net():
    normed = weights("D", batch_norm=True)
    folded = fold_batch_norm(normed)
    assert not any(name.startswith("bn") for name in folded.params)
    same(ours(ExportSpec(folded), photos(2, 32, 32)), ours(ExportSpec(normed), photos(2, 32, 32)))
    assert fold_batch_norm(weights("A")).params.keys() == weights("A").params.keys()


@pytest.mark.parametrize("kind", RUN)
def test_the_scripts_that_serve_it(kind, tmp_path):
    """Without this package they give the class that it gives."""
    if kind == "onnx":
        pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'vgg-jax[onnx]'")
    artefact, image = ExportSpec(weights("A")), photos(32, 32)
    write(tmp_path / f"net.{kind}", artefact)
    Image.fromarray(image).save(tmp_path / "photo.png")
    script = Path(__file__).parents[2] / "experiments" / "examples" / f"serve_{kind}.py"
    assert "vgg_jax import" not in script.read_text()
    command = [
        sys.executable,
        str(script),
        str(tmp_path / f"net.{kind}"),
        str(tmp_path / "photo.png"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == CLASSES[ours(artefact, image[None])[0].argmax()], done.stderr


@pytest.mark.parametrize(
    "bfloat16", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("kind", ["safetensors", *RUN])
def test_verify_asks_again(kind, bfloat16, tmp_path, capsys):
    """In another process it finds the same answer; with weights that are a little larger it does not."""
    if kind == "onnx":
        pytest.importorskip("onnx", reason="needs onnx: pip install 'vgg-jax[onnx]'")
    path = tmp_path / f"net.{kind}"
    net = weights("A", config=WIDE)
    write(path, ExportSpec(net, bfloat16=bfloat16))
    done = subprocess.run(
        [sys.executable, "-m", "vgg_jax", "verify", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "A, 3 classes, logits, images uint8" in done.stdout
    more = np.float32(1.01 if bfloat16 else 1.001)
    other = ExportSpec(
        dataclasses.replace(net, params=jax.tree.map(lambda x: x * more, net.params)),
        bfloat16=bfloat16,
    )
    said = ExportSpec.metadata
    try:
        ExportSpec.metadata = lambda _: said(ExportSpec(net, bfloat16=bfloat16))
        write(tmp_path / f"other.{kind}", other)
    finally:
        ExportSpec.metadata = said
    assert cli.main(["verify", str(tmp_path / f"other.{kind}")]) == 1


def test_the_metadata_are_all_that_is_to_be_known(tmp_path):
    from safetensors import safe_open

    net = weights("A-LRN", config=dataclasses.replace(CONFIGS["A-LRN"], fc=(12, 8)))
    write(tmp_path / "net.safetensors", ExportSpec(net))
    with safe_open(tmp_path / "net.safetensors", "numpy") as file:
        said = json.loads(file.metadata()["vgg_jax"])
    assert said["classes"] == list(CLASSES)
    assert (said["net"], said["image_size"], said["channels"]) == ("A-LRN", 32, "RGB")
    assert said["mean_rgb"] == list(IMAGENET.mean_rgb)
    back = read(tmp_path / "net.safetensors")
    assert (back.net, back.classes, back.preprocessing.mean_rgb) == (
        "A-LRN",
        CLASSES,
        IMAGENET.mean_rgb,
    )
    jax.tree.map(np.testing.assert_array_equal, back.params, net.params)


def test_bfloat16_weights_are_read_back(tmp_path):
    net = weights("A", config=WIDE)
    write(tmp_path / "net.safetensors", ExportSpec(net, bfloat16=True))
    back = read(tmp_path / "net.safetensors").params["conv3_1"]["kernel"]
    assert back.dtype == np.float32
    np.testing.assert_array_equal(
        back, net.params["conv3_1"]["kernel"].astype(jax.numpy.bfloat16).astype(np.float32)
    )
    assert cli.main(["verify", str(tmp_path / "net.safetensors")]) == 0


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated:UserWarning")
def test_litert_takes_the_savedmodel(tmp_path):
    import tensorflow as tf

    artefact = ExportSpec(weights("A"), uint8=False)
    write(tmp_path / "net.savedmodel", artefact)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "net.savedmodel"))
    interpreter = tf.lite.Interpreter(model_content=converter.convert())
    images = photos(1, 32, 32).astype(np.float32) - np.float32(IMAGENET.mean_rgb)
    ask = interpreter.get_signature_runner("serving_default")
    same(ask(images=images)["logits"], ours(artefact, images))


def test_the_savedmodel_is_what_tf_serving_asks_for(tmp_path):
    """Its tag, its kind of signature, any batch size, and no operation that a server without Python lacks."""
    from tensorflow.core.protobuf import saved_model_pb2

    write(tmp_path / "net.savedmodel", ExportSpec(weights("A-LRN")))
    (graph,) = saved_model_pb2.SavedModel.FromString(
        (tmp_path / "net.savedmodel" / "saved_model.pb").read_bytes()
    ).meta_graphs
    assert list(graph.meta_info_def.tags) == ["serve"]
    signature = graph.signature_def["serving_default"]
    assert signature.method_name == "tensorflow/serving/predict"
    assert {
        name: [dim.size for dim in info.tensor_shape.dim] for name, info in signature.inputs.items()
    } == {"images": [-1, 32, 32, 3]}
    assert {
        name: [dim.size for dim in info.tensor_shape.dim]
        for name, info in signature.outputs.items()
    } == {"logits": [-1, 3]}
    operations = {operation.name for operation in graph.meta_info_def.stripped_op_list.op}
    assert {"Conv2D", "LRN", "MaxPool"} <= operations
    assert not {name for name in operations if "Py" in name or "Xla" in name}


def test_what_cannot_be_exported_or_verified(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'vgg-jax[onnx]'")
    with pytest.raises(InputError, match=r"ends in '.pb': expected \.safetensors, \.onnx"):
        format_of("net.pb")
    with pytest.raises(InputError, match="output is 'scores': expected one of logits"):
        ExportSpec(weights("A"), "scores")
    with pytest.raises(InputError, match="the fully connected layers are not there"):
        ExportSpec(dataclasses.replace(weights("A"), top=False))
    (tmp_path / "taken.onnx").mkdir()
    with pytest.raises(InputError, match=r"taken\.onnx is a folder"):
        write(tmp_path / "taken.onnx", ExportSpec(weights("A")))
    write(tmp_path / "net.savedmodel", ExportSpec(weights("A")))
    write(tmp_path / "net.savedmodel", ExportSpec(weights("A")))  # an earlier export is replaced
    for kind in ("safetensors", "stablehlo", "onnx"):
        (tmp_path / f"cut.{kind}").write_bytes(b"PK\x03\x04nothing")
        assert cli.main(["verify", str(tmp_path / f"cut.{kind}")]) == 2
        assert f"cut.{kind} cannot be asked" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "net.savedmodel" / "assets.extra")
    with pytest.raises(InputError, match=r"net\.savedmodel cannot be asked"):
        verify(tmp_path / "net.savedmodel")
    with pytest.raises(
        InputError, match=r"net\.savedmodel is a folder"
    ):  # it may be somebody else's
        write(tmp_path / "net.savedmodel", ExportSpec(weights("A")))
    with pytest.raises(InputError, match=r"net\.safetensors holds weights only"):
        write(tmp_path / "net.safetensors", ExportSpec(weights("A"), uint8=False))
    with pytest.raises(InputError, match=r"layout is .timm.: expected a \.safetensors file"):
        write(tmp_path / "net.onnx", ExportSpec(weights("A")), "timm")
    assert not list(tmp_path.glob("*.new"))
    with pytest.raises(InputError, match="the net is A-LRN, which torchvision does not have"):
        write(tmp_path / "net.safetensors", ExportSpec(weights("A-LRN")), "torchvision")
    with pytest.raises(InputError, match=r"cannot write .*none/net\.safetensors"):
        write(tmp_path / "none" / "net.safetensors", ExportSpec(weights("A")))
