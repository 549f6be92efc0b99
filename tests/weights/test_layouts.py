"""Files in each library's layout, in and out again."""

import re

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers.compare import assert_close_to_largest
from tests.helpers.weights_files import (
    FC,
    IMAGE_SIZE,
    NUM_CLASSES,
    TORCHVISION_CONVS,
    TORCHVISION_MEAN,
    TORCHVISION_STD,
    assert_maps_back,
    assert_round_trip,
    logits,
    pytorch_state,
    random_tensors,
    reorder_kernel,
    torch_logits,
    torchvision_state,
)
from vgg_jax import CONFIGS, IMAGENET
from vgg_jax.weights import read
from vgg_jax.weights.layouts import LAYOUTS, tensor_table


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_tensor_mapping_inverts_exactly(layout):
    """An array of indices is reordered and comes back."""
    for tensor in tensor_table(layout, CONFIGS["C"], NUM_CLASSES, False, IMAGE_SIZE):
        array = np.arange(np.prod(tensor.foreign_shape)).reshape(tensor.foreign_shape)
        reordered = tensor.from_foreign(array)
        assert reordered.shape == tensor.shape
        np.testing.assert_array_equal(tensor.to_foreign(reordered), array)


def test_layouts_keys_are_names():
    assert [layout.name for layout in LAYOUTS.values()] == list(LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "batch_norm"), [("A", False), ("D", False), ("A", True)], ids=["A", "D", "A-batch-norm"]
)
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_torchvision_layout(net, batch_norm, suffix, tmp_path):
    tensors = random_tensors(net, batch_norm)
    state = torchvision_state(tensors, net, batch_norm)
    path = tmp_path / f"vgg.{suffix}"
    if suffix == "pth":
        torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
        counters = {
            name.replace("running_mean", "num_batches_tracked"): torch.tensor(7)
            for name in state
            if "running_mean" in name
        }
        torch.save(
            {name: torch.from_numpy(array) for name, array in state.items()} | counters, path
        )
    else:
        save_file(state, path)
    weights = read(path)
    assert weights.layout == "torchvision"
    assert (weights.net, weights.model.batch_norm) == (net, batch_norm)
    assert weights.model.config.fc == FC
    assert_close_to_largest(logits(path), torch_logits(tensors, TORCHVISION_MEAN, TORCHVISION_STD))
    assert_round_trip(path, state, "torchvision", tmp_path)


def test_timm_layout(tmp_path):
    tensors = random_tensors("A")
    state = pytorch_state(
        tensors,
        [f"features.{i}" for i in TORCHVISION_CONVS["A"]],
        ["pre_logits.fc1", "pre_logits.fc2", "head.fc"],
    )
    state["pre_logits.fc1.weight"] = state["pre_logits.fc1.weight"].reshape(FC[0], 512, 2, 2)
    state["pre_logits.fc2.weight"] = state["pre_logits.fc2.weight"].reshape(FC[1], FC[0], 1, 1)
    path = tmp_path / "vgg.safetensors"
    save_file(state, path)
    assert read(path).layout == "timm"
    assert_close_to_largest(logits(path), torch_logits(tensors, TORCHVISION_MEAN, TORCHVISION_STD))
    assert_round_trip(path, state, "timm", tmp_path)


@pytest.mark.parametrize(
    ("style", "net"),
    [
        ("2016", "D"),
        pytest.param("2016", "E", marks=pytest.mark.slow),
        ("tf.keras", "D"),
        ("nested", "D"),
    ],
)
def test_keras_layouts(style, net, tmp_path):
    """`vgg16_weights_tf_dim_ordering_tf_kernels.h5`, `vgg19…`, and the names of later versions.

    The style "nested" has the state of an optimizer, too.
    """
    path = tmp_path / "vgg.h5"
    tensors = random_tensors(net)
    written = {
        name: (reorder_kernel(kernel, "HWIO", "HWI O"), bias)
        for name, (kernel, bias) in tensors.items()
    }
    names = {name: re.sub(r"conv(\d)_(\d)", r"block\1_conv\2", name) for name in tensors}
    names |= {"fc6": "fc1", "fc7": "fc2", "fc8": "predictions"}
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in names.values()]
        for name, arrays in written.items():
            layer = names[name]
            paths = {
                "2016": (f"{layer}/{layer}_W_1:0", f"{layer}/{layer}_b_1:0"),
                "tf.keras": (f"{layer}/{layer}/kernel:0", f"{layer}/{layer}/bias:0"),
                "nested": (
                    f"model_weights/{layer}/vgg16/{layer}/kernel",
                    f"model_weights/{layer}/vgg16/{layer}/bias",
                ),
            }[style]
            for dataset, array in zip(paths, arrays, strict=True):
                file[dataset] = array
        if style == "nested":
            file["optimizer_weights/SGD/m/fc1/kernel"] = np.zeros(3, np.float32)
    assert_maps_back(path, "keras", written)
    assert read(path).net == net
    assert_close_to_largest(logits(path), torch_logits(tensors, IMAGENET.mean_rgb, bgr=True))


def test_flaxmodels_layout(tmp_path):
    path = tmp_path / "vgg16_weights.h5"
    tensors = random_tensors("D")
    written = {
        name: (reorder_kernel(kernel, "HWIO", "IHW O"), bias)
        for name, (kernel, bias) in tensors.items()
    }
    with h5py.File(path, "w") as file:
        for name, (kernel, bias) in written.items():
            file[f"{name}/weight"], file[f"{name}/bias"] = kernel, bias
    assert_maps_back(path, "flaxmodels", written)
    assert_close_to_largest(logits(path), torch_logits(tensors, TORCHVISION_MEAN, TORCHVISION_STD))
