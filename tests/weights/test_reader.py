"""Preprocessing and classes of files and runs."""

import dataclasses
import json
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import vgg_jax
from tests.helpers.tiny import init
from tests.helpers.weights_files import random_tensors, torchvision_state
from vgg_jax import CONFIGS, IMAGENET, VGG, InputError, load
from vgg_jax.weights import imagenet, read, save


def test_read_torchvision_features_only(tmp_path):
    """IMAGENET1K_FEATURES: the authors' convolutions and preprocessing, a classifier of NaN."""
    state = torchvision_state(random_tensors("D"), "D")
    state |= {
        name: np.full_like(array, np.nan)
        for name, array in state.items()
        if name.startswith("classifier")
    }
    save_file(state, tmp_path / "features.safetensors")
    weights = read(tmp_path / "features.safetensors")
    assert not weights.top
    assert weights.params.keys() == {
        name for name in random_tensors("D") if name.startswith("conv")
    }
    np.testing.assert_allclose(weights.preprocessing.mean_rgb, (123, 117, 104), atol=0.01)
    np.testing.assert_array_equal(
        weights.variables["params"]["conv1_1"]["kernel"],
        state["features.0.weight"].transpose(2, 3, 1, 0),
    )
    with pytest.raises(InputError, match="torchvision's IMAGENET1K_FEATURES: expected no pre"):
        read(tmp_path / "features.safetensors", preprocessing="caffe")


def test_diverged_head_is_kept(tmp_path):
    """NaN in one layer is no sign of IMAGENET1K_FEATURES: the head and the mean stay."""
    state = torchvision_state(random_tensors("A"), "A")
    state["classifier.6.weight"] = np.full_like(state["classifier.6.weight"], np.nan)
    save_file(state, tmp_path / "vgg.safetensors")
    weights = read(tmp_path / "vgg.safetensors")
    assert weights.top and np.isnan(weights.params["fc8"]["kernel"]).all()
    np.testing.assert_allclose(weights.preprocessing.mean_rgb[0], 0.485 * 255)


@pytest.mark.parametrize("file", ["safetensors", "pth"])
def test_integers_are_no_weights(file, tmp_path):
    """A quantised kernel without its scale would be wrong by a factor."""
    state = torchvision_state(random_tensors("A"), "A")
    state["features.3.weight"] = np.int8(100 * state["features.3.weight"])
    path = tmp_path / f"vgg.{file}"
    if file == "pth":
        torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
        torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path)
    else:
        save_file(state, path)
    with pytest.raises(InputError, match=r"features.3.weight is int8: expected float16, bf"):
        read(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_small_floats_in_safetensors(dtype, tmp_path):
    """The file is whole, and its type is named."""
    path, header, size = tmp_path / "vgg.safetensors", {}, 0
    for name, array in torchvision_state(random_tensors("A"), "A").items():
        offsets = [size, size := size + array.size]
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(InputError, match=rf"features.0.weight is {dtype}: .*; convert a quantised"):
        read(path)


def test_small_floats_in_pytorch(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    state = torchvision_state(random_tensors("A"), "A")
    small = {name: torch.tensor(array).to(torch.float8_e5m2) for name, array in state.items()}
    torch.save(small, tmp_path / "vgg.pth")
    with pytest.raises(InputError, match=r"features.0.weight is torch.float8_e5m2: expected flo"):
        read(tmp_path / "vgg.pth")


def test_read_run_keeps_preprocessing(tmp_path, monkeypatch):
    """A file of a run keeps Q, flip and EXIF; its net is float32, in place of the run's dtype."""
    save_file(torchvision_state(random_tensors("A"), "A"), tmp_path / "vgg.safetensors")
    model, variables, metadata = load(tmp_path / "vgg.safetensors")
    preprocessing = metadata["preprocessing"]
    assert (preprocessing["scale"], metadata["flip"], preprocessing["exif"]) == (73, True, True)
    preprocessing |= {"scale": 70, "exif": False}
    trained = model.clone(dtype=jnp.bfloat16), variables, metadata | {"flip": False}
    monkeypatch.setattr("vgg_jax.runs.checkpoint.load_best", lambda _: trained)
    (tmp_path / "run").mkdir()
    weights = read(tmp_path / "run")
    assert weights.model.dtype == np.float32
    save(tmp_path / "run.safetensors", weights)
    _, _, saved = load(tmp_path / "run.safetensors")
    preprocessing = saved["preprocessing"]
    assert (preprocessing["scale"], saved["flip"], preprocessing["exif"]) == (70, False, False)


def test_imagenet_class_order():
    """The order of the released models: by WordNet id."""
    ids = [name.split()[0] for name in imagenet.CLASSES]
    assert len(set(ids)) == 1000
    assert ids == sorted(ids)
    assert [imagenet.CLASSES[i] for i in (0, 207, 999)] == [
        "n01440764 tench, Tinca tinca",
        "n02099601 golden retriever",
        "n15075141 toilet tissue, toilet paper, bathroom tissue",
    ]


@pytest.mark.parametrize("file", ["safetensors", "pth"])
def test_weights_survive_a_change_of_the_file(file, tmp_path):
    """Files may be mapped into memory. A new version of a file must not change a net in use."""
    state = torchvision_state(random_tensors("A"), "A")
    path = tmp_path / f"vgg.{file}"
    if file == "pth":
        torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
        tensors = {name: torch.from_numpy(array) for name, array in state.items()}
        # A kernel of another library, transposed without a copy.
        name = "classifier.6.weight"
        tensors[name] = torch.from_numpy(np.ascontiguousarray(state[name].T)).T
        torch.save(tensors, path)
    else:
        save_file(state, path)
    params = read(path).params
    before = jax.tree.map(np.copy, params)
    with path.open("r+b") as stream:
        stream.write(bytes(path.stat().st_size))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    np.testing.assert_array_equal(params["fc8"]["kernel"], state["classifier.6.weight"].T)


def test_own_files_are_read_without_a_second_copy(tmp_path):
    model = VGG(dataclasses.replace(CONFIGS["A"], fc=(512, 8)), image_size=32)
    preprocessing = {"mean_rgb": IMAGENET.mean_rgb, "range": (0, 255), "channels": "RGB"}
    classes = tuple(map(str, range(1000)))
    path = tmp_path / "net.safetensors"
    metadata = {"net": "A", "classes": classes, "preprocessing": preprocessing}
    vgg_jax.save(path, model, init(model), metadata)
    tracemalloc.start()
    read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The one copy is in memory that tracemalloc does not see.
    assert peak < 0.2 * path.stat().st_size
