"""Files that other libraries write themselves, and that they load back."""

import h5py
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.helpers.compare import assert_close_to_largest
from tests.helpers.weights_files import (
    NUM_CLASSES,
    TORCHVISION_MEAN,
    TORCHVISION_STD,
    forward,
    photos,
)
from vgg_jax import InputError, compiler_options, load
from vgg_jax.weights import read, save


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # from Keras' own arrays
@pytest.mark.parametrize("top", [True, False])
def test_keras_files(top, tmp_path):
    """Keras' VGG16 in its current format, with and without the model, and its legacy format."""
    keras = pytest.importorskip("keras", reason="needs keras, which comes with TensorFlow")
    from keras.src.legacy.saving import legacy_h5_format

    images = photos(1)[:, :32, :32]
    net = keras.applications.VGG16(
        weights=None,
        include_top=top,
        input_shape=(32, 32, 3),
        classes=10,
        classifier_activation=None,
    )
    path, whole, legacy = (tmp_path / name for name in ("vgg.weights.h5", "vgg.keras", "legacy.h5"))
    net.save(whole)
    net.save_weights(path)
    with h5py.File(legacy, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, net)
    size = 32 if top else None
    weights = read(path, preprocessing="caffe", image_size=size)
    others = read(whole, preprocessing="caffe", image_size=size), read(legacy, image_size=size)
    for other in others:
        jax.tree.map(np.testing.assert_array_equal, weights.params, other.params)
    assert (weights.layout, others[1].layout) == ("keras 3", "keras")
    expected = net(keras.applications.vgg16.preprocess_input(images.copy()), training=False)
    model, variables, metadata = load(path, preprocessing="caffe", image_size=size)
    x = images - np.float32(metadata["preprocessing"]["mean_rgb"])
    if top:
        output = forward(model, variables, x)
    else:
        output = model.apply(variables, x, layers=("pool5",), method="features")["pool5"]
        assert "without fully connected layers" in metadata["source"]
    assert_close_to_largest(output, np.asarray(expected))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # from Keras' own arrays
def test_keras_pooled_head(tmp_path):
    """Three dense layers on global average pooling, as Keras' transfer learning guides add them."""
    keras = pytest.importorskip("keras", reason="needs keras, which comes with TensorFlow")
    base = keras.applications.VGG16(weights=None, include_top=False, input_shape=(96, 96, 3))
    x = keras.layers.GlobalAveragePooling2D()(base.output)
    for name, features, activation in (
        ("fc1", 40, "relu"),
        ("fc2", 30, "relu"),
        ("predictions", 10, None),
    ):
        x = keras.layers.Dense(features, activation, name=name)(x)
    net = keras.Model(base.input, x)
    net.save(tmp_path / "net.keras")
    with pytest.raises(
        InputError, match="fc6 reads one position, of 32-pixel images or after glob"
    ):
        load(tmp_path / "net.keras", preprocessing="caffe")
    model, variables, metadata = load(tmp_path / "net.keras", preprocessing="caffe", image_size=96)
    images = photos(1, 96)
    expected = net(keras.applications.vgg16.preprocess_input(images.copy()), training=False)
    output = forward(model, variables, images - np.float32(metadata["preprocessing"]["mean_rgb"]))
    assert_close_to_largest(output, np.asarray(expected))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # from Keras' own arrays
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("suffix", [".keras", ".weights.h5", ".h5"])
def test_keras_net_in_sequential(suffix, tmp_path, caplog):
    """Transfer learning as Keras' guides show it: VGG16 is one layer, before a head of its own."""
    keras = pytest.importorskip("keras", reason="needs keras, which comes with TensorFlow")
    base = keras.applications.VGG16(weights=None, include_top=False, input_shape=(64, 64, 3))
    net = keras.Sequential(
        [
            keras.layers.Input((64, 64, 3)),
            keras.layers.RandomFlip("horizontal"),
            base,
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )
    net.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    images = photos(1, 64)
    net.fit(images, np.ones((1, 2)), verbose=0)  # the optimizer has state
    (net.save_weights if suffix == ".weights.h5" else net.save)(tmp_path / f"net{suffix}")
    model, variables, metadata = load(tmp_path / f"net{suffix}", preprocessing="caffe")
    assert not metadata["top"]
    assert "left out: " in caplog.text and "dense" in caplog.text
    expected = base(keras.applications.vgg16.preprocess_input(images.copy()), training=False)
    x = images - np.float32(metadata["preprocessing"]["mean_rgb"])
    output = model.apply(variables, x, layers=("pool5",), method="features")["pool5"]
    assert_close_to_largest(output, np.asarray(expected))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # from Keras' own arrays
def test_authors_layers_equal_keras(shared_data):
    """Each layer of the authors' VGG-16 on photos. Keras preprocesses the pixels itself."""
    keras = pytest.importorskip("keras", reason="needs keras, which comes with TensorFlow")
    (path,) = (shared_data / "vgg16-oxford").glob("*.h5")
    net = keras.applications.VGG16(weights=None, include_top=False)
    net.load_weights(path)
    images = photos(2, 96)
    expected = keras.Model(net.input, [layer.output for layer in net.layers[1:]])(
        keras.applications.vgg16.preprocess_input(images.copy()), training=False
    )

    model, variables, metadata = load(path)
    # The convolutions of Keras end with a ReLU.
    layers = [layer.name for layer in model.layers() if layer.type in ("relu", "pool")]
    layers = [name for name in layers if name not in ("relu6", "relu7")]
    features = jax.jit(
        lambda variables, x: model.apply(variables, x, layers=layers, method="features"),
        compiler_options=compiler_options(),
    )(variables, images - np.float32(metadata["preprocessing"]["mean_rgb"]))
    for name, array in zip(layers, expected, strict=True):
        assert_close_to_largest(features[name], np.asarray(array), 1e-5)


@pytest.mark.parametrize(
    "name", ["vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"]
)
def test_torchvision_nets(name, tmp_path):
    """All eight nets, with a head for 64 pixels."""
    torchvision = pytest.importorskip(
        "torchvision", reason="needs torchvision", exc_type=(ImportError, RuntimeError)
    )
    from torch import nn

    net = getattr(torchvision.models, name)(weights=None, num_classes=NUM_CLASSES)
    net.avgpool = nn.Identity()
    net.classifier[0], net.classifier[3] = nn.Linear(512 * 4, 64), nn.Linear(64, 32)
    net.classifier[6] = nn.Linear(32, NUM_CLASSES)
    check_exchange("torchvision", net, photos(), tmp_path)


@pytest.mark.parametrize("name", ["vgg11_bn", "vgg16"])
def test_timm_nets(name, tmp_path):
    timm = pytest.importorskip("timm", reason="needs timm", exc_type=(ImportError, RuntimeError))
    net = timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES)
    check_exchange("timm", net, photos(1, 224), tmp_path)


def check_exchange(library, net, images, tmp_path):
    """The library's file gives the library's logits; the library loads our file, bit-equal."""
    import torch

    net.eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(net.state_dict(), tmp_path / "vgg.pth")
    model, variables, metadata = load(tmp_path / "vgg.pth")
    output = forward(model, variables, images - np.float32(metadata["preprocessing"]["mean_rgb"]))
    normalized = (images - np.float32(TORCHVISION_MEAN)) / np.float32(TORCHVISION_STD)
    with torch.inference_mode():
        expected = net(torch.from_numpy(normalized.transpose(0, 3, 1, 2).copy())).numpy()
    assert_close_to_largest(output, expected)
    save(tmp_path / "back.safetensors", read(tmp_path / "vgg.pth"), library)
    back = {
        key: torch.from_numpy(array)
        for key, array in load_file(tmp_path / "back.safetensors").items()
    }
    for key, value in net.state_dict().items():
        assert "num_batches_tracked" in key or torch.equal(back[key], value)
    net.load_state_dict(back, strict=True)
