"""Images with other channels than RGB, and of other sizes than image_size."""

import itertools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close_to_largest
from tests.helpers.tiny import SHALLOW, images, init
from vgg_jax import VGG, InputError, compile_inference, with_in_channels
from vgg_jax.model import adaptive_avg_pool
from vgg_jax.preprocessing import subtract_mean

# More, fewer and as many positions as fc6 reads, and sizes that are no multiple of theirs.
MAP_SIZES = ((7, 7), (9, 12), (14, 21), (1, 3), (4, 8), (30, 11))


@pytest.fixture(scope="module")
def tiny_net():
    """A net whose fc6 reads 2x2 positions."""
    model = VGG(SHALLOW, num_classes=7, image_size=8)
    return model, init(model)


def fc_layers(params, window):
    """fc6 to fc8 on one window (n, k, k, C), in NumPy."""
    y = np.asarray(window, np.float64).reshape(len(window), -1)
    for name in ("fc6", "fc7", "fc8"):
        y = y @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"])
        y = y if name == "fc8" else np.maximum(y, 0)
    return y


def adaptive_by_loop(x, size):
    """The definition of PyTorch's AdaptiveAvgPool2d, one output after the other."""
    n, h, w, c = x.shape
    y = np.zeros((n, size, size, c))
    for i, j in itertools.product(range(size), repeat=2):
        rows = slice(math.floor(i * h / size), math.ceil((i + 1) * h / size))
        columns = slice(math.floor(j * w / size), math.ceil((j + 1) * w / size))
        y[:, i, j] = np.asarray(x, np.float64)[:, rows, columns].mean((1, 2))
    return y


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_in_channels(channels):
    """conv1_1 against a loop over the kernel's positions; 6 channels are more than an image has."""
    model = VGG(SHALLOW, num_classes=7, image_size=8, in_channels=channels)
    variables, x = init(model), images(2, 8, 8, channels=channels)
    kernel = np.asarray(variables["params"]["conv1_1"]["kernel"], np.float64)
    assert kernel.shape == (3, 3, channels, 8)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = sum(
        padded[:, i : i + 8, j : j + 8] @ kernel[i, j]
        for i, j in itertools.product(range(3), repeat=2)
    )
    features = model.apply(variables, x, ("conv1_1", "fc8"), method="features")
    assert_close_to_largest(features["conv1_1"], expected)
    inferred = compile_inference(model, variables, "features", layers=("conv1_1", "fc8"))(x)
    assert_close_to_largest(inferred["conv1_1"], expected)
    assert_close_to_largest(inferred["fc8"], features["fc8"])
    assert_close_to_largest(model.apply(variables, x), features["fc8"][:, 0, 0])


def test_in_channels_errors(tiny_net):
    model, variables = tiny_net
    grey = images(1, 8, 8, channels=1)
    message = r"\(1, 8, 8, 1\): expected \(N, H, W, 3\), because in_channels is 3; .*with_in_ch"
    for arguments in ({}, {"method": "score_map"}, {"method": "features", "layers": ("pool1",)}):
        with pytest.raises(InputError, match=message):
            model.apply(variables, grey, **arguments)
    with pytest.raises(InputError, match=r"conv1_1/kernel .* \(3, 3, 3, 8\): expected \(3, 3, 1,"):
        model.clone(in_channels=1).apply(variables, grey)
    with pytest.raises(InputError, match="in_channels is 0: expected at least 1"):
        with_in_channels(model, variables, 0)
    with pytest.raises(InputError, match="in_channels is 1: expected 3"):
        with_in_channels(*with_in_channels(model, variables, 1), 4)
    with pytest.raises(InputError, match="params has no conv1_1"):
        with_in_channels(model, {"params": {}}, 1)


def test_mean_of_other_channels():
    """A net for grey images cannot be evaluated on RGB photos."""
    photos = np.zeros((1, 4, 4, 3), np.uint8)
    with pytest.raises(InputError, match="the images have 3 channels and the net's mean 1:"):
        subtract_mean(photos, (100.0,))


def test_with_in_channels_grey(tiny_net, caplog):
    """A grey image gives the response of the RGB image that repeats it, up to its border."""
    model, variables = tiny_net
    with caplog.at_level(logging.INFO, logger="vgg_jax"):
        grey_model, grey_variables = with_in_channels(model, variables, 1)
    assert "the kernel of conv1_1 is summed over RGB" in caplog.text
    x = images(2, 8, 8, channels=1)
    rgb = jnp.repeat(x, 3, axis=3)
    actual = grey_model.apply(grey_variables, x, ("conv1_1", "fc8"), method="features")
    expected = model.apply(variables, rgb, ("conv1_1", "fc8"), method="features")
    for name, array in expected.items():
        assert_close_to_largest(actual[name], array, 1e-5)
    # Nothing else changes, the original included.
    assert variables["params"]["conv1_1"]["kernel"].shape == (3, 3, 3, 8)
    assert grey_variables["params"]["fc6"] is variables["params"]["fc6"]
    assert grey_model == model.clone(in_channels=1)


def test_with_in_channels_repeats_cyclically(tiny_net, caplog):
    model, variables = tiny_net
    red, green, blue = np.moveaxis(np.asarray(variables["params"]["conv1_1"]["kernel"]), 2, 0)
    for channels, expected in (
        (2, [1.5 * red, 1.5 * green]),
        (3, [red, green, blue]),
        (4, [0.75 * red, 0.75 * green, 0.75 * blue, 0.75 * red]),
        (7, [3 / 7 * kernel for kernel in (red, green, blue, red, green, blue, red)]),
    ):
        with caplog.at_level(logging.INFO, logger="vgg_jax"):
            adapted, adapted_variables = with_in_channels(model, variables, channels)
        assert f"repeated cyclically over RGB and multiplied by 3 / {channels}" in caplog.text
        kernel = adapted_variables["params"]["conv1_1"]["kernel"]
        np.testing.assert_allclose(kernel, np.stack(expected, 2), rtol=1e-6)
        assert adapted == model.clone(in_channels=channels)


def test_other_sizes_mean(tiny_net):
    """The mean of the three matrices on every window of pool2 (§3.2)."""
    model, variables = tiny_net
    x = images(2, 13, 21)
    pool2 = model.apply(variables, x, ("pool2",), method="features")["pool2"]
    assert pool2.shape[1:3] == (3, 5)
    windows = [
        fc_layers(variables["params"], pool2[:, i : i + 2, j : j + 2])
        for i, j in itertools.product(range(2), range(4))
    ]
    logits = model.clone(other_sizes="mean").apply(variables, x)
    assert_close_to_largest(logits, np.mean(windows, 0))


@pytest.mark.parametrize("size", [(13, 21), (4, 5), (8, 12), (28, 28)])
def test_other_sizes_adaptive(tiny_net, size):
    """The three matrices on the adaptive average of pool2; also for smaller images."""
    model, variables = tiny_net
    x = images(2, *size)
    pool2 = model.apply(variables, x, ("pool2",), method="features")["pool2"]
    logits = jax.jit(model.clone(other_sizes="adaptive").apply)(variables, x)
    assert_close_to_largest(logits, fc_layers(variables["params"], adaptive_by_loop(pool2, 2)))


@pytest.mark.parametrize("size", MAP_SIZES)
def test_adaptive_avg_pool(size):
    x = images(2, *size, channels=5)
    assert_close_to_largest(adaptive_avg_pool(x, 7), adaptive_by_loop(x, 7), 1e-6)


@pytest.mark.parametrize("size", MAP_SIZES)
def test_adaptive_avg_pool_is_pytorch(size):
    """Values and gradients."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    x, g = images(2, *size, channels=5), images(2, 7, 7, channels=5, seed=1)
    reference = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2), requires_grad=True)
    expected = torch.nn.AdaptiveAvgPool2d(7)(reference)
    expected.backward(torch.tensor(np.asarray(g).transpose(0, 3, 1, 2)))
    actual, pullback = jax.vjp(lambda x: adaptive_avg_pool(x, 7), x)
    channels_last = (0, 2, 3, 1)
    assert_close_to_largest(actual, expected.detach().numpy().transpose(channels_last), 1e-6)
    assert_close_to_largest(pullback(g)[0], reference.grad.numpy().transpose(channels_last), 1e-6)


@pytest.mark.parametrize("other_sizes", ["mean", "adaptive"])
def test_other_sizes_of_image_size(tiny_net, other_sizes):
    model, variables = tiny_net
    x = images(2, 8, 8)
    logits = model.clone(other_sizes=other_sizes).apply(variables, x)
    np.testing.assert_array_equal(logits, model.apply(variables, x))


@pytest.mark.slow
@pytest.mark.parametrize("other_sizes", ["mean", "adaptive"])
def test_other_sizes_gradient(tiny_net, other_sizes):
    """The slope along the gradient, in training."""
    model = tiny_net[0].clone(other_sizes=other_sizes, dropout_rate=0)
    params, x = tiny_net[1]["params"], images(2, 12, 9)

    @jax.jit
    def loss(params):
        return (1e4 * model.apply({"params": params}, x, train=True) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(params)
    norm = jnp.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
    assert all(gradient[name]["kernel"].any() for name in ("conv1_1", "fc6", "fc8"))
    ends = [
        jax.tree.map(lambda p, g, s=sign: p + s * 1e-3 * g / norm, params, gradient)
        for sign in (1, -1)
    ]
    slope = (loss(ends[0]) - loss(ends[1])) / 2e-3
    assert float(slope) == pytest.approx(float(norm), rel=0.02)


def test_other_sizes_with_symbolic_size(tiny_net):
    """One exported program serves all sizes by "mean"; "adaptive" says that it cannot."""
    pytest.importorskip("flatbuffers", reason="needs flatbuffers: pip install '.[stablehlo]'")
    from jax import export

    model, variables = tiny_net
    shape = export.symbolic_shape("n, h, w, 3", constraints=("h >= 8", "w >= 8"))
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    mean = model.clone(other_sizes="mean")
    program = export.export(jax.jit(mean.apply))(variables, x)
    for size in ((8, 8), (13, 21)):
        photo = images(1, *size)
        assert_close_to_largest(program.call(variables, photo), mean.apply(variables, photo))
    with pytest.raises(InputError, match=r"symbolic .*'adaptive' needs a fixed size; use 'mean'"):
        export.export(jax.jit(model.clone(other_sizes="adaptive").apply))(variables, x)


def test_other_sizes_errors(tiny_net):
    model, variables = tiny_net
    with pytest.raises(InputError, match=r"12x8: expected 8x8; .*=\"mean\".*=\"adaptive\""):
        model.apply(variables, images(1, 12, 8))
    with pytest.raises(InputError, match=r"7x10: fc8 needs at least 8x8"):
        model.clone(other_sizes="mean").apply(variables, images(1, 7, 10))
    with pytest.raises(InputError, match=r"3x10: pool2 needs at least 4x4"):
        model.clone(other_sizes="adaptive").apply(variables, images(1, 3, 10))
