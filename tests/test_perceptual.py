"""Content, style and LPIPS against loops, PyTorch and the package lpips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import init
from vgg_jax import VGG, Conv, InputError, VGGConfig, compiler_options
from vgg_jax.perceptual import (
    LPIPS_LAYERS,
    content_loss,
    gram_matrix,
    load_lpips_weights,
    lpips,
    style_loss,
)

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


def test_style_loss_other_image_size():
    features = {"a": activations(0), "b": activations(1, (2, 2, 2, 3))}
    target = {"a": activations(4, (2, 7, 2, 4)), "b": activations(5, (2, 4, 1, 3))}
    assert np.isfinite(style_loss(features, target)).all()


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


@pytest.mark.slow
def test_lpips_of_equal_images():
    """The distance is 0 and its gradient is finite, also at activations of 0."""
    model = VGG(NARROW_D, image_size=32, num_classes=3)
    variables = init(model)
    weights = {
        name: jnp.ones(channels)
        for name, channels in zip(LPIPS_LAYERS, NARROW_D_CHANNELS, strict=True)
    }
    black = jnp.zeros((1, 32, 32, 3))  # biases are 0, so every activation is 0
    distance_to_black = jax.jit(
        jax.value_and_grad(lambda x: lpips(model, variables, weights, x, black).sum()),
        compiler_options=compiler_options(),
    )
    distance, gradient = distance_to_black(black)
    assert distance == 0
    assert np.isfinite(gradient).all()
    assert distance_to_black(activations(0, (1, 32, 32, 3)) * 50)[0] > 0


@pytest.mark.filterwarnings(
    "ignore:The parameter 'pretrained':UserWarning",
    "ignore:Arguments other than a weight enum:UserWarning",
)
def test_lpips_equals_package(tmp_path):
    """Random weights of VGG-16 in torchvision's layout, published LPIPS weights, two images."""
    torch = pytest.importorskip("torch", reason="needs torch, torchvision and lpips")
    package = pytest.importorskip(
        "lpips", reason="needs torch, torchvision and lpips: pip install lpips"
    )
    from safetensors.torch import save_file

    from vgg_jax import load

    torch.manual_seed(0)
    reference = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    convolutions = [
        module for module in reference.net.modules() if isinstance(module, torch.nn.Conv2d)
    ]
    positions = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    state = {}
    for position, module in zip(positions, convolutions, strict=True):
        torch.nn.init.kaiming_normal_(module.weight)
        state[f"features.{position}.weight"] = module.weight.data
        state[f"features.{position}.bias"] = module.bias.data
    save_file(state, tmp_path / "vgg16.safetensors")
    model, variables, metadata = load(tmp_path / "vgg16.safetensors")
    weights = load_lpips_weights(package.__path__[0] + "/weights/v0.1/vgg.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 64, 64, 3)).astype(np.float32)
    pixels[1, 1] = np.clip(pixels[0, 1] + 20, 0, 255)
    tensors = (torch.from_numpy(x.transpose(0, 3, 1, 2)) / 127.5 - 1 for x in pixels)
    expected = reference(*tensors).detach().numpy().ravel()
    images, other_images = pixels - np.float32(metadata["preprocessing"]["mean_rgb"])
    actual = lpips(model, variables, weights, images, other_images)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert expected[0] > 2 * expected[1] > 0


def test_load_lpips_weights_rejects_other_file(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "weights.pth")
    with pytest.raises(
        InputError, match=r"no lin1\.model\.1\.weight of the shape \(1, 128, 1, 1\)"
    ):
        load_lpips_weights(tmp_path / "weights.pth")
