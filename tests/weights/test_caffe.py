"""Caffe's files, written by protobuf."""

import pytest

from tests.helpers.compare import assert_close_to_largest
from tests.helpers.weights_files import (
    add_caffe_blob,
    assert_maps_back,
    caffe_messages,
    logits,
    random_tensors,
    torch_logits,
)
from vgg_jax import IMAGENET, InputError
from vgg_jax.weights import read


@pytest.mark.slow
@pytest.mark.parametrize(
    ("encoding", "net"),
    [*(pytest.param("V1", net, marks=pytest.mark.slow) for net in "DE"), ("new", "D")],
)
def test_caffe_layout(encoding, net, tmp_path):
    tensors, path = random_tensors(net), tmp_path / "VGG_ILSVRC_layers.caffemodel"
    message = caffe_messages()(name="VGG_ILSVRC_layers")
    is_v1 = encoding == "V1"
    layers = message.layers if is_v1 else message.layer
    for name, arrays in tensors.items():
        layer = layers.add(name=name, type=4 if is_v1 else "Convolution")
        for array in arrays:
            add_caffe_blob(layer, array, is_v1)
        layers.add(name=name.replace("conv", "relu"))
    path.write_bytes(message.SerializeToString())
    assert_maps_back(path, "caffe", tensors)
    assert read(path).net == net
    assert_close_to_largest(logits(path), torch_logits(tensors, IMAGENET.mean_rgb, bgr=True))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([2**20, 2**20], "conv1_1 has the shape .* and 1 values"),
        ([2] * 100_000, "conv1_1 has 9 or more axes: expected at most 8"),
    ],
    ids=["large", "many-axes"],
)
def test_caffe_rejects_false_shape(shape, message, tmp_path):
    net = caffe_messages()()
    net.layer.add(name="conv1_1").blobs.add(data=[1.0]).shape.dim.extend(shape)
    (tmp_path / "vgg.caffemodel").write_bytes(net.SerializeToString())
    with pytest.raises(InputError, match=message):
        read(tmp_path / "vgg.caffemodel")
