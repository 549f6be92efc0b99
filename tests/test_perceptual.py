"""Content, style and LPIPS against loops and the package lpips."""

import hashlib
import sys
from functools import partial
from types import SimpleNamespace

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny import init
from vgg_jax import CONFIGS, VGG, Conv, InputError, VGGConfig, compiler_options, load
from vgg_jax.perceptual import (
    _normalize_channels,
    _published_linear_weights,
    content_loss,
    gram_matrix,
    lpips,
    style_loss,
)

LPIPS_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3")

NARROW_D = VGGConfig(
    ((Conv(4),) * 2, (Conv(6),) * 2, (Conv(6),) * 3, (Conv(8),) * 3, (Conv(8),) * 3), fc=(8, 8)
)
NARROW_D_CHANNELS = (4, 6, 6, 8, 8)  # of the LPIPS layers


def activations(seed, shape=(2, 3, 5, 4)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gram_by_loop(features):
    h, w, c = features.shape
    matrix = np.zeros((c, c))
    for y in range(h):
        for x in range(w):
            matrix += np.outer(features[y, x], features[y, x])
    return matrix / (h * w * c)


def test_content_and_style_loss_by_hand():
    features = {"a": activations(0), "b": activations(1, (2, 2, 2, 3))}
    target = {"a": activations(2), "b": activations(3, (2, 2, 2, 3))}
    content, style = np.zeros(2), np.zeros(2)
    for name in features:
        for n in range(2):
            a, b = features[name][n], target[name][n]
            content[n] += ((a - b) ** 2).mean()
            style[n] += ((gram_by_loop(a) - gram_by_loop(b)) ** 2).sum()
    np.testing.assert_allclose(content_loss(features, target), content, rtol=1e-5)
    np.testing.assert_allclose(style_loss(features, target), style, rtol=1e-5)
    assert gram_matrix(jnp.asarray(features["a"])).shape == (2, 4, 4)


@pytest.mark.parametrize("num_targets", [1, 2])
def test_style_loss_of_targets_of_other_size(num_targets):
    features, target = activations(0), activations(4, (num_targets, 7, 2, 4))
    grams = [gram_by_loop(image) for image in features]
    target_grams = [gram_by_loop(image) for image in target] * (2 // num_targets)
    expected = [((a - b) ** 2).sum() for a, b in zip(grams, target_grams, strict=True)]
    np.testing.assert_allclose(style_loss({"a": features}, {"a": target}), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", [content_loss, style_loss])
def test_losses_reject_other_layers(loss):
    a = {"relu1_2": activations(0), "relu2_2": activations(1)}
    with pytest.raises(
        InputError, match=r"layers relu1_2, relu2_2, and target has relu2_2: expected the same"
    ):
        loss(a, {"relu2_2": activations(1)})
    with pytest.raises(InputError, match="features has the layers relu1_2, and target has relu3_3"):
        loss({"relu1_2": activations(0)}, {"relu3_3": activations(0)})
    with pytest.raises(InputError, match="features has the layers none, and target has none"):
        loss({}, {})


def test_losses_reject_other_shapes():
    features = {"a": activations(0)}
    for shape in ((2, 3, 4, 4), (1, 3, 5, 4)):
        with pytest.raises(InputError, match=r"a has the shape \(2, 3, 5, 4\) in features and"):
            content_loss(features, {"a": activations(1, shape)})
    for shape in ((2, 3, 5, 1), (3, 3, 5, 4)):
        with pytest.raises(InputError, match=r"a has the shape \(2, 3, 5, 4\) in features and"):
            style_loss(features, {"a": activations(1, shape)})


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_gram_matrix_of_large_map(dtype):
    """The sums over 512 x 512 positions are as large as those of a photo at relu1_2."""
    features = jnp.asarray(200 * np.abs(activations(0, (1, 512, 512, 8))), dtype)
    positions = np.float64(features).reshape(-1, 8)
    expected = positions.T @ positions / positions.size
    np.testing.assert_allclose(gram_matrix(features)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_losses_of_narrow_types_sum_in_float32(dtype):
    """Sums of activations as large as a VGG's overflow in float16."""
    features, target = (
        {"a": jnp.asarray(1000 * np.abs(activations(seed, (2, 20, 20, 8))), dtype)}
        for seed in (0, 1)
    )
    wide, wide_target = ({"a": np.float64(x["a"])} for x in (features, target))
    style = np.array(
        [
            ((gram_by_loop(a) - gram_by_loop(b)) ** 2).sum()
            for a, b in zip(wide["a"], wide_target["a"], strict=True)
        ]
    )
    content = ((wide["a"] - wide_target["a"]) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(style_loss(features, target), style, rtol=1e-3)
    np.testing.assert_allclose(content_loss(features, target), content, rtol=1e-5)


def narrow_d():
    model = VGG(NARROW_D, image_size=32, num_classes=3)
    weights = {
        name: jnp.ones(channels)
        for name, channels in zip(LPIPS_LAYERS, NARROW_D_CHANNELS, strict=True)
    }
    return model, init(model), weights


@pytest.mark.slow
def test_lpips_of_equal_images():
    """The distance is 0 and its gradient is finite, also at activations of 0."""
    model, variables, weights = narrow_d()
    mean_rgb = (100.0, 110.0, 120.0)
    gray = jnp.zeros((1, 32, 32, 3)) + np.float32(mean_rgb)[None, None, None]  # activations of 0
    distance_to_gray = jax.jit(
        jax.value_and_grad(
            lambda x: lpips(
                model, variables, x, gray, mean_rgb=mean_rgb, linear_weights=weights
            ).sum()
        ),
        compiler_options=compiler_options(),
    )
    distance, gradient = distance_to_gray(gray)
    assert distance == 0
    assert np.isfinite(gradient).all()
    assert distance_to_gray(gray + activations(0, (1, 32, 32, 3)) * 50)[0] > 0


def test_normalize_channels_gradient_at_zero():
    """A ReLU before it would hide a NaN."""
    gradient = jax.grad(lambda x: _normalize_channels(x)[..., 0].sum())
    np.testing.assert_array_equal(gradient(jnp.zeros((1, 1, 1, 4))), np.zeros((1, 1, 1, 4)))


@pytest.mark.slow
def test_lpips_of_float16_activations():
    """The squares of activations above 255 overflow in float16."""
    model, variables, weights = narrow_d()
    variables["params"]["conv1_1"]["bias"] += 1000
    images, other_images = np.random.default_rng(0).integers(0, 256, (2, 2, 32, 32, 3), np.uint8)
    expected, actual = (
        jax.jit(
            partial(
                lpips,
                model.clone(dtype=dtype),
                mean_rgb=(120.0, 120.0, 120.0),
                linear_weights=weights,
            )
        )(variables, images, other_images)
        for dtype in (jnp.float32, jnp.float16)
    )
    np.testing.assert_allclose(actual, expected, rtol=0.02)


def test_published_linear_weights():
    """SHA-256 of lin0 to lin4 of the package lpips 0.1.4, computed by PyTorch."""
    weights = _published_linear_weights()
    assert tuple(weights) == LPIPS_LAYERS
    assert [w.shape for w in weights.values()] == [(64,), (128,), (256,), (512,), (512,)]
    data = b"".join(w.astype("<f4").tobytes() for w in weights.values())
    assert (
        hashlib.sha256(data).hexdigest()
        == "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78"
    )


SIZE = (37, 50)  # of the images; the poolings round it down


@pytest.fixture
def reference(monkeypatch):
    """LPIPS of the package lpips on random weights of net D. Biases are not 0.

    The package uses torchvision for one thing: the layers of VGG-16. Here they are the tests' own.
    """
    torch = pytest.importorskip("torch", reason="needs torch and lpips: pip install torch")
    from tests.helpers.torch_vgg import randomize, torch_vgg

    layers = randomize(torch_vgg("D", (8, 8), 3), seed=0)[:31]
    models = SimpleNamespace(vgg16=lambda pretrained: SimpleNamespace(features=layers))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    package = pytest.importorskip(
        "lpips", reason="needs torch and lpips: pip install --no-deps lpips"
    )
    # The package reads its names of torchvision once, when it is imported.
    monkeypatch.setattr(package.pretrained_networks, "tv", models)
    return SimpleNamespace(
        layers=layers,
        convolutions=[layer for layer in layers if isinstance(layer, torch.nn.Conv2d)],
        weights_file=package.__path__[0] + "/weights/v0.1/vgg.pth",
        module=package.LPIPS(net="vgg", verbose=False).requires_grad_(False),
    )


def to_torch(images):
    """RGB (N, H, W, 3) in 0-255 as the package takes it: (N, 3, H, W) in -1 to 1."""
    import torch

    return torch.from_numpy(np.float32(images).transpose(0, 3, 1, 2)) / 127.5 - 1


def assert_equals_package(reference, loaded, images, other_images):
    """Compares distances and maps of two batches of images in 0-255."""
    model, variables, metadata = loaded
    mean_rgb = metadata["preprocessing"]["mean_rgb"]
    for spatial in (False, True):
        reference.module.spatial = spatial
        expected = reference.module(to_torch(images), to_torch(other_images)).numpy()
        actual = lpips(model, variables, images, other_images, mean_rgb=mean_rgb, spatial=spatial)
        assert actual.shape == images.shape[: 3 if spatial else 1]
        np.testing.assert_allclose(actual, expected.reshape(actual.shape), rtol=1e-4, atol=1e-6)
    return actual


def test_published_linear_weights_equal_package(reference):
    import torch

    tensors = torch.load(reference.weights_file, map_location="cpu", weights_only=True)
    expected = {
        name: tensors[f"lin{i}.model.1.weight"].numpy().ravel()
        for i, name in enumerate(LPIPS_LAYERS)
    }
    weights = _published_linear_weights()
    assert weights.keys() == expected.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(values, expected[name])


@pytest.mark.slow
def test_lpips_equals_package(reference, tmp_path):
    """Random weights in torchvision's layout, and images of uint8 and of float."""
    from safetensors.torch import save_file

    state = {
        f"features.{i}.{name}": parameter.contiguous()
        for i, layer in enumerate(reference.layers)
        for name, parameter in layer.named_parameters()
    }
    save_file(state, tmp_path / "vgg16.safetensors")
    loaded = load(tmp_path / "vgg16.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, *SIZE, 3), np.uint8)
    pixels[1, 1] = np.clip(pixels[0, 1].astype(int) + 20, 0, 255)
    maps = assert_equals_package(reference, loaded, *pixels)
    assert maps[0].mean() > 2 * maps[1].mean() > 0
    assert_equals_package(reference, loaded, *np.float32(pixels + 0.25))


def test_lpips_of_authors_weights_equals_package(reference, shared_data):
    """The authors' convolutions, with their mean, on photos."""
    import torch

    (path,) = (shared_data / "vgg16-oxford").glob("*.h5")
    with h5py.File(path) as file:
        arrays: list[np.ndarray] = []
        file.visititems(lambda _, x: arrays.append(x[()]) if hasattr(x, "shape") else None)
    kernels, biases = arrays[::2], arrays[1::2]
    kernels[0] = kernels[0][:, :, ::-1]  # the file has blue, green, red
    for layer, kernel, bias in zip(reference.convolutions, kernels, biases, strict=True):
        layer.weight.copy_(torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()))
        layer.bias.copy_(torch.from_numpy(bias))
    # From -1 to 1 back to 0-255, less the mean that Caffe's models have.
    mean = torch.tensor([123.68, 116.779, 103.939])[None, :, None, None]
    reference.module.scaling_layer.shift = mean / 127.5 - 1
    reference.module.scaling_layer.scale = torch.tensor(1 / 127.5)

    photos = sorted((shared_data / "imagenet-sample").rglob("*.JPEG"))[:2]
    images = np.stack(
        [np.asarray(Image.open(photo).convert("RGB").resize(SIZE[::-1])) for photo in photos]
    )
    noise = np.random.default_rng(0).normal(0, 10, images.shape[1:])
    other_images = np.stack([images[1], images[1] + noise])
    assert_equals_package(reference, load(path), images, np.clip(other_images, 0, 255))


def test_lpips_rejects_other_net():
    message = "published LPIPS weights belong to net D with max pooling"
    for model in (
        VGG(NARROW_D),
        VGG(CONFIGS["E"]),
        VGG(CONFIGS["D"], batch_norm=True),
        VGG(CONFIGS["D"], pool="avg"),
    ):
        image = jnp.zeros((1, 32, 32, 3))
        with pytest.raises(InputError, match=message):
            lpips(model, {}, image, image, mean_rgb=(0.0, 0.0, 0.0))


def test_lpips_rejects_other_shapes():
    model, variables, weights = narrow_d()
    options = {"mean_rgb": (0.0, 0.0, 0.0), "linear_weights": weights}
    image = jnp.zeros((1, 32, 32, 3))
    for a, b in ((image, image[:, :16]), (image[0], image[0]), (image[..., :1],) * 2):
        with pytest.raises(InputError, match=r"expected \(N, H, W, 3\), the same for both"):
            lpips(model, variables, a, b, **options)
    options["linear_weights"] = weights | {"relu2_2": jnp.ones(7)}
    with pytest.raises(
        InputError, match=r"weights of relu2_2 have the shape \(7,\): expected \(6,\)"
    ):
        jax.eval_shape(partial(lpips, model, **options), variables, image, image)
