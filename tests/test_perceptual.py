"""Content, style and LPIPS against loops, against PyTorch and against the package lpips."""

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

NARROW = VGGConfig(
    ((Conv(4),) * 2, (Conv(6),) * 2, (Conv(6),) * 3, (Conv(8),) * 3, (Conv(8),) * 3), fc=(8, 8)
)


def maps(seed, shape=(2, 3, 5, 4)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_content_and_style_by_hand():
    ours, wanted = (
        {"a": maps(0), "b": maps(1, (2, 2, 2, 3))},
        {"a": maps(2), "b": maps(3, (2, 2, 2, 3))},
    )
    content, style = np.zeros(2), np.zeros(2)
    for name in ours:
        for n in range(2):
            content[n] += ((ours[name][n] - wanted[name][n]) ** 2).mean()
            matrices = []
            for features in (ours, wanted):
                h, w, c = features[name][n].shape
                matrix = np.zeros((c, c))
                for y in range(h):
                    for x in range(w):
                        matrix += np.outer(features[name][n, y, x], features[name][n, y, x])
                matrices.append(matrix / (h * w * c))
            style[n] += ((matrices[0] - matrices[1]) ** 2).sum()
    np.testing.assert_allclose(content_loss(ours, wanted), content, rtol=1e-5)
    np.testing.assert_allclose(style_loss(ours, wanted), style, rtol=1e-5)
    assert gram_matrix(jnp.asarray(ours["a"])).shape == (2, 4, 4)
    other = {"a": maps(4, (2, 7, 2, 4)), "b": maps(5, (2, 4, 1, 3))}
    assert np.isfinite(style_loss(ours, other)).all()  # a style image may have another size


@pytest.mark.slow
def test_lpips_is_zero_for_equal_images_with_a_gradient_that_is_a_number():
    model = VGG(NARROW, image_size=32, num_classes=3)
    variables = init(model)
    heads = {
        name: jnp.ones(width) for name, width in zip(LPIPS_LAYERS, (4, 6, 6, 8, 8), strict=True)
    }
    black = jnp.zeros((1, 32, 32, 3))  # with zero biases every activation is 0
    from_black = jax.jit(
        jax.value_and_grad(lambda x: lpips(model, variables, heads, x, black).sum()),
        compiler_options=compiler_options(),
    )
    distance, gradient = from_black(black)
    assert distance == 0
    assert np.isfinite(gradient).all()
    assert from_black(maps(0, (1, 32, 32, 3)) * 50)[0] > 0


@pytest.mark.filterwarnings(
    "ignore:The parameter 'pretrained':UserWarning",
    "ignore:Arguments other than a weight enum:UserWarning",
)
def test_lpips_equals_the_package(tmp_path):
    """Random weights of VGG-16 in torchvision's layout, the published heads, two images."""
    torch = pytest.importorskip("torch", reason="needs torch, torchvision and lpips")
    package = pytest.importorskip(
        "lpips", reason="needs torch, torchvision and lpips: pip install lpips"
    )
    from safetensors.torch import save_file

    from vgg_jax import load

    torch.manual_seed(0)
    theirs = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    convolutions = [
        module for module in theirs.net.modules() if isinstance(module, torch.nn.Conv2d)
    ]
    for module in convolutions:
        torch.nn.init.kaiming_normal_(module.weight)
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    state = {}
    for place, module in zip(places, convolutions, strict=True):
        state |= {
            f"features.{place}.weight": module.weight.data,
            f"features.{place}.bias": module.bias.data,
        }
    save_file(state, tmp_path / "vgg16.safetensors")
    model, variables, metadata = load(tmp_path / "vgg16.safetensors")
    heads = load_lpips_weights(package.__path__[0] + "/weights/v0.1/vgg.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 64, 64, 3)).astype(np.float32)
    pixels[1, 1] = np.clip(pixels[0, 1] + 20, 0, 255)
    expected = (
        theirs(*(torch.from_numpy(x.transpose(0, 3, 1, 2)) / 127.5 - 1 for x in pixels))
        .detach()
        .numpy()
        .ravel()
    )
    ours = lpips(
        model, variables, heads, *(pixels - np.float32(metadata["preprocessing"]["mean_rgb"]))
    )
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert expected[0] > 2 * expected[1] > 0


def test_heads_of_another_file(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    torch.save({"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)}, tmp_path / "heads.pth")
    with pytest.raises(
        InputError, match=r"no lin1\.model\.1\.weight of the shape \(1, 128, 1, 1\)"
    ):
        load_lpips_weights(tmp_path / "heads.pth")
