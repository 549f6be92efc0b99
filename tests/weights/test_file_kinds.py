"""Whole files that hold no VGG: the message says what they are, and never that they are damaged."""

import gzip
import io
import json
import pickle
import sys
import tarfile
import zipfile
from fractions import Fraction

import h5py
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import vgg_jax
from tests.cli.test_commands import REFERENCE
from tests.helpers.weights_files import random_tensors, torchvision_state
from vgg_jax import InputError
from vgg_jax.cli import main
from vgg_jax.cli.messages import MAX_LENGTH
from vgg_jax.weights import read


@pytest.fixture
def refused(tmp_path, capsys):
    """Returns the message for a file, which also fits the command line."""

    def message(path):
        with pytest.raises(InputError) as error:
            vgg_jax.load(path)
        text = str(error.value)
        assert text.startswith(str(path))
        for word in ("damaged", "unmodified", "Error"):
            assert word not in text
        assert main(["import", str(path), str(tmp_path / "out.safetensors")]) == 2
        shown = capsys.readouterr().err.strip()
        assert len(shown) <= MAX_LENGTH
        assert "expected" in shown
        return text.removeprefix(str(path))

    return message


def gzipped(path):
    path.write_bytes(gzip.compress(b"weights"))


def tarred(path):
    with tarfile.open(path, "w") as file:
        file.add(__file__, "net.pth")


def zipped_images(path):
    image = io.BytesIO()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(image, "PNG")
    with zipfile.ZipFile(path, "w") as file:
        for i in range(5):
            file.writestr(f"photos/{i}.png", image.getvalue())


def pickled(path):
    path.write_bytes(pickle.dumps({"conv1_1": np.ones(3)}))


def saved_mat(path):
    scipy_io = pytest.importorskip("scipy.io")
    scipy_io.savemat(path, {"image_mean": np.ones(3)})


def saved_mat4(path):
    scipy_io = pytest.importorskip("scipy.io")
    scipy_io.savemat(path, {"image_mean": np.ones(3)}, format="4")


def index(path):
    parts = {f"layer{i}": f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)}
    path.write_text(json.dumps({"metadata": {"total_size": 3}, "weight_map": parts}, indent=2))


def resnet(path):
    save_file({"conv1.weight": np.ones((64, 3, 7, 7), np.float32)}, path)


def integers(path):
    with h5py.File(path, "w") as file:
        file["labels"] = np.arange(3)


def other_keras(path):
    """A small classifier, as model.save writes it."""
    inner = io.BytesIO()
    with h5py.File(inner, "w") as file:
        for name, shape in (("conv2d", (3, 3, 1, 32)), ("dense", (1600, 10))):
            file[f"layers/{name}/vars/0"] = np.ones(shape, np.float32)
            file[f"layers/{name}/vars/1"] = np.ones(shape[-1], np.float32)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model.weights.h5", inner.getvalue())
        file.writestr("config.json", "{}")


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        ("notes.pth", lambda path: path.write_text("layer 1: 64 features\n" * 40), "a text file"),
        ("vgg.caffemodel", lambda path: path.write_text("name: 'VGG'\n" * 40), "a text file"),
        ("config.json", lambda path: path.write_text('{"a": 1}'), "JSON text"),
        ("pytorch_model.bin.index.json", index, "the index of 2 files (pytorch_model-00001-of-"),
        ("x.npy", lambda path: np.save(path, np.ones(3)), "one NumPy array (.npy)"),
        ("net.pth.gz", gzipped, "compressed by gzip"),
        ("net.pth.tar", tarred, "a tar archive"),
        ("photos.zip", zipped_images, "a zip archive of photos/0.png, photos/1.png, photos/2.png"),
        ("net.pkl", pickled, "a pickle that torch.save did not write"),
        ("stats.mat", saved_mat, "no layers of MatConvNet: expected the weights of a VGG; it has"),
        ("stats4.mat", saved_mat4, "no file of MATLAB 5 to 7"),
        ("resnet.safetensors", resnet, "not the weights of a VGG; it has conv1.weight: exp"),
        ("labels.h5", integers, "holds no floating-point tensors"),
        ("mnist.keras", other_keras, "not the weights of a VGG; "),
        ("unknown.dat", lambda path: path.write_bytes(bytes(range(256))), "of an unknown format"),
    ],
)
def test_whole_file_is_named(name, write, words, refused, tmp_path):
    write(tmp_path / name)
    assert words in refused(tmp_path / name)


def test_onnx_program(refused):
    assert "an ONNX program" in refused(REFERENCE / "net-0.1.0.onnx")


@pytest.mark.filterwarnings("ignore:`torch.jit")  # from PyTorch itself
def test_torchscript_program(refused, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    script = torch.jit.trace(torch.nn.Linear(3, 2), torch.zeros(1, 3))
    torch.jit.save(script, tmp_path / "net.pt")
    message = refused(tmp_path / "net.pt")
    assert "is a TorchScript program" in message
    # The remedy that the message names
    torch.save(torch.jit.load(tmp_path / "net.pt").state_dict(), tmp_path / "net.pth")
    assert "torch.jit.load('net.pt').state_dict()" in message
    assert "it has bias, weight" in refused(tmp_path / "net.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # from PyTorch itself
@pytest.mark.parametrize("zipped", [True, False])
def test_pickle_protocol(zipped, refused, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    torch.save(
        {"x": torch.ones(3)},
        tmp_path / "net.pth",
        pickle_protocol=4,
        _use_new_zipfile_serialization=zipped,
    )
    assert "has a pickle_protocol of 4 or 5" in refused(tmp_path / "net.pth")


def test_pickled_objects(refused, tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    for value in (torch.nn.Linear(3, 2), {"version": Fraction(3), "x": torch.ones(3)}):
        torch.save(value, tmp_path / "net.pth")
        assert "holds a Python object" in refused(tmp_path / "net.pth")
    torch.save({"epoch": 3, "weights": {}}, tmp_path / "net.pth")
    assert "epoch is not a plain tensor: expected a state_dict" in refused(tmp_path / "net.pth")


def test_files_of_pytorch_need_no_torch_to_be_named(refused, tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "net.pt", "w") as file:
        for name in ("net/data.pkl", "net/constants.pkl", "net/code/__torch__.py"):
            file.writestr(name, b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "is a TorchScript program" in refused(tmp_path / "net.pt")


@pytest.mark.slow
def test_tensorflow_checkpoint(refused, tmp_path):
    tf = pytest.importorskip("tensorflow", reason="needs tensorflow")
    tf.train.Checkpoint(v=tf.Variable([1.0])).write(str(tmp_path / "ckpt" / "vgg"))
    for name in ("vgg.index", "vgg.data-00000-of-00001"):
        assert "a part of a TensorFlow checkpoint" in refused(tmp_path / "ckpt" / name)
    assert "a folder of TensorFlow checkpoints" in refused(tmp_path / "ckpt")
    tf.saved_model.save(tf.Module(), str(tmp_path / "saved"))
    assert "a graph of TensorFlow" in refused(tmp_path / "saved" / "saved_model.pb")
    assert "a SavedModel of TensorFlow" in refused(tmp_path / "saved")


def test_orbax_folder(refused, tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint", reason="needs orbax")
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "net", {"x": np.ones(3)})
    assert "a checkpoint of Orbax" in refused(tmp_path / "net")


def test_folder_of_files(refused, tmp_path):
    resnet(tmp_path / "model.safetensors")
    assert "pass one, such as model.safetensors" in refused(tmp_path)


def test_shards(refused, tmp_path):
    """The convolutions in the first part are no whole net, although they could be one."""
    state = torchvision_state(random_tensors("A"), "A")
    parts = [tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({name: array for name, array in state.items() if "features" in name}, parts[0])
    assert (
        "is part 1 of 2, and model-00002-of-00002.safetensors is missing beside it: expected one "
        "file; join the parts with"
    ) in refused(parts[0])
    save_file({name: array for name, array in state.items() if "features" not in name}, parts[1])
    for part in parts:
        assert "of 2: expected one file; join the parts with" in refused(part)
    # The remedy that the message names
    save_file(load_file(parts[0]) | load_file(parts[1]), tmp_path / "net.safetensors")
    assert read(tmp_path / "net.safetensors").top
    parts[0].rename(tmp_path / "model-00001-of-00001.safetensors")
    assert not read(tmp_path / "model-00001-of-00001.safetensors").top


def test_part_of_unknown_name(refused, tmp_path):
    """Half of the tensors, in a file whose name does not tell."""
    state = torchvision_state(random_tensors("A"), "A")
    half = dict(list(state.items())[6:])
    save_file(half, tmp_path / "second.safetensors")
    message = refused(tmp_path / "second.safetensors")
    assert "features.0.weight (64, 3, 3, 3) is missing" in message
    assert message.endswith("; if it is one of several parts, join them")
