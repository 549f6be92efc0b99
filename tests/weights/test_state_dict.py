"""Checkpoints as training scripts save them: the same weights as the plain state_dict."""

import argparse
import collections
import datetime
import enum
import logging
import pathlib
from fractions import Fraction

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers.weights_files import FC, NUM_CLASSES, random_tensors, torchvision_state
from vgg_jax import InputError
from vgg_jax.weights import read
from vgg_jax.weights.state_dict import find_state_dict, plain_names

CONVS = ((64,), (128,), (256, 256), (512, 512), (512, 512))


@pytest.fixture(scope="module")
def state():
    """The state_dict of a net A, as NumPy arrays."""
    return torchvision_state(random_tensors("A"), "A")


@pytest.fixture(scope="module")
def params(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "net.safetensors"
    save_file(state, path)
    return read(path).params


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="needs torch: pip install torch")


@pytest.fixture
def net(torch, state):
    """A net A of torchvision's modules."""

    class VGG(torch.nn.Module):
        def __init__(self):
            super().__init__()
            nn, layers, in_features = torch.nn, [], 3
            for stage in CONVS:
                for features in stage:
                    layers += [nn.Conv2d(in_features, features, 3, padding=1), nn.ReLU()]
                    in_features = features
                layers.append(nn.MaxPool2d(2))
            self.features = nn.Sequential(*layers)
            fc6, fc7 = nn.Linear(512 * 4, FC[0]), nn.Linear(*FC)
            fc8 = nn.Linear(FC[1], NUM_CLASSES)
            self.classifier = nn.Sequential(
                fc6, nn.ReLU(), nn.Dropout(), fc7, nn.ReLU(), nn.Dropout(), fc8
            )

    net = VGG()
    net.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
    return net


def assert_same(path, params):
    jax.tree.map(np.testing.assert_array_equal, read(path).params, params)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "net.", "module._orig_mod.backbone.", "1."]
)
def test_prefix(prefix, state, params, tmp_path):
    """Also in safetensors files, where accelerate and Lightning's users leave them."""
    path = tmp_path / "net.safetensors"
    save_file({prefix + name: array for name, array in state.items()}, path)
    assert_same(path, params)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")  # from PyTorch itself
def test_wrapped_modules(torch, net, params, tmp_path):
    """Wrapped by PyTorch itself."""
    path = tmp_path / "net.pth"
    for wrapped in (
        torch.nn.DataParallel(net),
        torch.compile(net),
        torch.nn.Sequential(torch.nn.Identity(), net),
        torch.nn.Sequential(collections.OrderedDict(vgg=torch.nn.DataParallel(net))),
    ):
        torch.save(wrapped.state_dict(), path)
        assert_same(path, params)
    net.features = torch.nn.DataParallel(net.features)  # as PyTorch's ImageNet example does
    torch.save(net.state_dict(), path)
    assert "features.module.0.weight" in net.state_dict()
    assert_same(path, params)


@pytest.mark.parametrize("prefix", ["", "module.", "net.vgg."])
@pytest.mark.parametrize("part", ["features", "classifier", "features.0", "features.18"])
def test_wrapped_part(prefix, part, state, params, tmp_path):
    """A part of a net was compiled, or is in parallel, or both."""
    path = tmp_path / "net.safetensors"
    for wrapper in ("_orig_mod", "module", "module._orig_mod"):
        names = {name: name.replace(f"{part}.", f"{part}.{wrapper}.") for name in state}
        save_file({prefix + names[name]: array for name, array in state.items()}, path)
        assert_same(path, params)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")  # from PyTorch itself
def test_compiled_parts(torch, net, params, tmp_path):
    """Compiled by PyTorch itself."""
    net.features = torch.compile(net.features)
    net.classifier[3] = torch.nn.DataParallel(torch.compile(net.classifier[3]))
    torch.save(torch.nn.Sequential(net).state_dict(), tmp_path / "net.pth")
    assert "features._orig_mod.0.weight" in net.state_dict()
    assert_same(tmp_path / "net.pth", params)
    torch.save(net.features.state_dict(), tmp_path / "features.pth")
    convs = {name: layer for name, layer in params.items() if name.startswith("conv")}
    assert_same(tmp_path / "features.pth", convs)


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "net", "model_ema"])
def test_training_checkpoint(torch, net, key, params, tmp_path):
    """With the arguments of the script, an optimizer and a schedule."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 30)
    checkpoint = {
        key: net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, data_path="imagenet", distributed=False),
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pth")
    assert_same(tmp_path / "checkpoint.pth", params)


class Phase(enum.Enum):
    """A class of a training script."""

    TRAIN = 1


BESIDE = {
    "accuracies": [np.float64(71.5), np.float32(0.7), np.float16(1), np.int64(3), np.bool_(True)],
    "types": [np.float32, np.dtype("float32"), np.int64],
    "confusion": np.eye(2),
    "random_state": np.random.RandomState(0).get_state(),
    "counts": collections.Counter("aab"),
    "history": collections.defaultdict(list, loss=[1.0, 0.5]),
    "nested": collections.defaultdict(dict, a={"b": collections.OrderedDict(c=1)}),
    "totals": [collections.defaultdict(kind, a=kind()) for kind in (int, float, str, set)],
    "time": datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC),
    "day": datetime.date(2026, 1, 2),
    "took": datetime.timedelta(hours=3),
    "args": argparse.Namespace(output=pathlib.Path("runs"), rate=np.float32(0.1)),
}


@pytest.mark.parametrize("is_zip", [True, False])
def test_values_beside_weights(torch, net, params, is_zip, tmp_path):
    """They are skipped, and no code of their classes runs."""
    path = tmp_path / "checkpoint.pth"
    checkpoint = {"state_dict": net.state_dict()} | BESIDE
    torch.save(checkpoint, path, _use_new_zipfile_serialization=is_zip)
    assert_same(path, params)
    weights = collections.defaultdict(list, net.state_dict())
    torch.save({"model": weights}, path, _use_new_zipfile_serialization=is_zip)
    assert_same(path, params)


def test_state_dict_of_numpy_arrays(torch, net, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({name: array.numpy() for name, array in net.state_dict().items()}, path)
    with pytest.raises(InputError, match="weight is not a plain tensor: expected a state_dict"):
        read(path)


@pytest.mark.parametrize("value", [Phase.TRAIN, collections.defaultdict(Phase), Fraction(1, 3)])
def test_other_objects_are_named(torch, net, value, tmp_path):
    """To make them, their own code would run."""
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": net.state_dict(), "value": value}, path)
    message = (
        r"a Python object, \S+\.(Phase|Fraction), .*: expected a state_dict; where the file was"
    )
    with pytest.raises(InputError, match=message):
        read(path)


def test_allowed_globals_of_the_caller_stay(torch, net, params, tmp_path):
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": net.state_dict(), "args": argparse.Namespace(lr=0.1)}, path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert_same(path, params)
        assert argparse.Namespace in torch.serialization.get_safe_globals()


def test_unknown_key(torch, net, params, tmp_path):
    """It is read if no other key holds a VGG."""
    path = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 3, "weights": net.state_dict()}, path)
    assert_same(path, params)
    torch.save({"student": net.state_dict(), "teacher": net.state_dict()}, path)
    with pytest.raises(InputError, match="several nets, under the keys 'student', 'teacher': exp"):
        read(path)


@pytest.mark.parametrize("known", ["net", "model", "state_dict"])
def test_known_key_without_tensors(torch, net, known, params, tmp_path, caplog):
    """It names the architecture, and the weights have a key of their own."""
    path = tmp_path / "checkpoint.pth"
    for other in ("weights", "model_ema"):
        torch.save({known: {"arch": "vgg11"}, other: net.state_dict()}, path)
        assert_same(path, params)
    optimizer = {"momentum": {0: torch.zeros(3)}, known: {}}
    torch.save(optimizer | {"features": net.features.state_dict()}, path)
    assert read(path).net == "A"
    assert not [record for record in caplog.records if "the key" in record.getMessage()]


def test_key_of_another_net(torch, net, params, tmp_path):
    """The message tells what is under the key."""
    path = tmp_path / "checkpoint.pth"
    torch.save({"net": {"arch": "x"}, "model": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, path)
    with pytest.raises(InputError, match=r"these are not the weights of a VGG.* conv1\.weight"):
        read(path)
    torch.save({"net": {}, "epoch": 3}, path)
    with pytest.raises(InputError, match="holds no floating-point tensors"):
        read(path)


def test_warning_names_all_other_nets(torch, net, params, tmp_path, caplog):
    path = tmp_path / "checkpoint.pth"
    torch.save({"best": net.state_dict(), "model": net.state_dict(), "ema": {"decay": 0.9}}, path)
    assert_same(path, params)
    assert "the key 'model' is read; left out: 'best'; to read another" in caplog.text


def test_moving_average_is_left_out(torch, net, params, tmp_path, caplog):
    """The net itself is read, and a warning says so. timm itself reads the average first."""
    average = torch.optim.swa_utils.AveragedModel(net)
    with torch.no_grad():
        average.module.features[0].weight.zero_()
    path = tmp_path / "checkpoint.pth"
    torch.save({"model_ema": average.state_dict(), "model": net.state_dict()}, path)
    assert_same(path, params)
    (record,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
    assert "the key 'model' is read; left out: 'model_ema'; to read another" in record.getMessage()
    torch.save({"model_ema": average.state_dict()}, path)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="vgg_jax"):
        assert not read(path).params["conv1_1"]["kernel"].any()
    assert "the net is under 'module.'; left out: n_averaged" in caplog.text


def test_features_by_themselves(torch, net, params, tmp_path):
    torch.save(net.features.state_dict(), tmp_path / "features.pth")
    convs = {name: layer for name, layer in params.items() if name.startswith("conv")}
    assert_same(tmp_path / "features.pth", convs)


def test_dropout_first(torch, net, params, tmp_path):
    """fc6 to fc8 are numbers 1, 4 and 6 of such a classifier."""
    fc6, relu, drop, fc7, *_, fc8 = net.classifier
    net.classifier = torch.nn.Sequential(drop, fc6, relu, drop, fc7, relu, fc8)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    assert "classifier.4.weight" in net.state_dict()
    assert_same(tmp_path / "net.pth", params)


def test_two_nets(state, tmp_path):
    """For example a student and its teacher. None of them is guessed."""
    path = tmp_path / "net.safetensors"
    both = {prefix + name: array for name, array in state.items() for prefix in ("a.", "b.")}
    save_file(both, path)
    with pytest.raises(InputError, match=r"net.safetensors: it holds several nets, under 'a.', 'b"):
        read(path)


def test_two_tensors_for_one_layer(state, tmp_path):
    path = tmp_path / "net.safetensors"
    other = {"features.module.0.weight": state["features.0.weight"] + 1}
    save_file(state | other, path)
    with pytest.raises(InputError, match=r"tensors for one layer, features\.0\.weight, feat"):
        read(path)


def test_pickled_module(torch, net, tmp_path):
    """A whole module is code. It is no damaged file."""
    torch.save(torch.nn.Sequential(torch.nn.ReLU()), tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"a Python object, torch.nn.modules.\S+, .*run code: ex"):
        read(tmp_path / "net.pth")


def test_names_of_other_libraries_stay():
    names = ("conv1_1/kernel", "fc8/bias", "layers/conv2d/vars/0", "block1_conv1/0")
    assert plain_names(dict.fromkeys(names, ())).plain == {name: name for name in names}
    assert find_state_dict({"model": 3, "conv1_1": {}}) == ({"model": 3, "conv1_1": {}}, "", ())
