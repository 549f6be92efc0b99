"""Score maps and Grad-CAM equal those of PyTorch's autograd."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.helpers.tiny import SHALLOW, TINY, init
from vgg_jax import CONFIGS, VGG, InputError
from vgg_jax.evaluation.explain import _jitted, explain, grad_cam_layer

MEAN = (120.0, 110.0, 100.0)


def random_images(count, height, width):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def explain_by_torch(net, image, layer_name, class_index):
    """The mean scores, the score map of a class and Grad-CAM, by PyTorch's autograd."""
    import torch

    x = (torch.from_numpy(image[None]).float() - torch.tensor(MEAN)).permute(0, 3, 1, 2)
    side = 1  # fc6 reads one position of an image of 32 pixels
    for name, layer in net.named_children():
        if isinstance(layer, torch.nn.Linear):
            kernel = layer.weight.reshape(len(layer.weight), -1, side, side)
            x = torch.nn.functional.conv2d(x, kernel, layer.bias)
        elif name != "flatten":
            x = layer(x)
        if name == layer_name:
            activations = x
            activations.retain_grad()
    means = x.mean((2, 3))[0]
    index = int(means.argmax()) if class_index is None else class_index
    means[index].backward()
    weights = activations.grad.mean((2, 3), keepdim=True)
    cam = torch.relu((weights * activations).sum(1))[0]
    return means, index, x[0, index], cam


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layer", "class_index", "batch_norm"),
    [(None, None, True), ("relu4_2", 3, True), ("pool2", None, False), ("relu5_2", 3, False)],
)
def test_equals_pytorch(layer, class_index, batch_norm):
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    from tests.helpers.torch_vgg import randomize, to_jax, torch_vgg

    net = randomize(torch_vgg("A", (24, 16), 5, batch_norm, image_size=32), 0).eval()
    params, batch_stats = to_jax(net, 1)
    config = dataclasses.replace(CONFIGS["A"], fc=(24, 16))
    model = VGG(config, num_classes=5, image_size=32, batch_norm=batch_norm)
    images = random_images(2, 64, 96)
    classes = None if class_index is None else [class_index] * 2
    results = explain(
        model,
        {"params": params, "batch_stats": batch_stats},
        images,
        mean_rgb=MEAN,
        classes=classes,
        layer=layer,
    )
    for image, result in zip(images, results, strict=True):
        means, index, scores, cam = (
            value if isinstance(value, int) else value.detach().numpy()
            for value in explain_by_torch(net, image, layer or "relu3_2", class_index)
        )
        assert result.class_index == index
        assert result.score_map.shape == (2, 3)
        for ours, theirs in ((result.score_map, scores), (result.grad_cam, cam)):
            np.testing.assert_allclose(ours, theirs, atol=2e-5 * np.abs(theirs).max())
        posterior = np.exp(means - means.max())
        np.testing.assert_allclose(result.posterior, posterior / posterior.sum(), atol=1e-5)


def mean_score(params, activations, class_index):
    """The mean score of a class, from the output of pool2 (4, w, C), in NumPy and float64."""
    windows = [activations[:, x : x + 4].reshape(-1) for x in range(activations.shape[1] - 3)]
    values = np.stack(windows)
    for name in ("fc6", "fc7", "fc8"):
        kernel, bias = (np.asarray(params[name][key], np.float64) for key in ("kernel", "bias"))
        values = values @ kernel.reshape(-1, len(bias)) + bias
        values = values if name == "fc8" else np.maximum(values, 0)
    return values[:, class_index].mean()


def test_grad_cam_is_a_derivative():
    """The weights of Grad-CAM, by central differences in NumPy."""
    model = VGG(SHALLOW, num_classes=3, image_size=16)
    variables = init(model)
    images = random_images(1, 16, 20)
    (result,) = explain(model, variables, images, mean_rgb=MEAN, classes=[1], layer="pool2")
    inputs = images.astype(np.float32) - np.float32(MEAN)[None, None, None]
    features = model.apply(variables, inputs, ("pool2",), method="features")
    activations = np.asarray(features["pool2"][0], np.float64)

    def slope(channel):
        step = np.zeros_like(activations)
        step[..., channel] = 1e-4  # at all positions, so the slope is the sum of the gradients
        scores = [mean_score(variables["params"], activations + s, 1) for s in (step, -step)]
        return (scores[0] - scores[1]) / 2e-4

    weights = np.array([slope(channel) for channel in range(activations.shape[-1])])
    weights /= activations[..., 0].size
    expected = np.maximum((activations * weights[None, None]).sum(-1), 0)
    assert expected.max() > 0
    np.testing.assert_allclose(result.grad_cam, expected, atol=1e-4 * expected.max())
    score = mean_score(variables["params"], activations, 1)
    np.testing.assert_allclose(result.score_map.mean(), score, rtol=1e-4)


def test_frozen_layers_do_not_change_the_maps():
    model, images = VGG(SHALLOW, num_classes=3, image_size=16), random_images(1, 16, 16)
    variables = init(model)
    frozen = model.clone(frozen=("conv1_1", "conv2_1", "fc6"))
    results = [
        explain(net, variables, images, mean_rgb=MEAN, layer="relu1_1")[0]
        for net in (model, frozen)
    ]
    np.testing.assert_array_equal(results[0].grad_cam, results[1].grad_cam)


@pytest.mark.parametrize(
    ("config", "image_size", "layer"),
    [
        (CONFIGS["D"], 224, "relu5_3"),
        (CONFIGS["A"], 32, "relu3_2"),
        (CONFIGS["A-LRN"], 224, "relu5_2"),
        (TINY, 64, "relu4_2"),
        (SHALLOW, 8, "relu1_1"),
    ],
)
def test_default_layer_has_seven_positions_a_side(config, image_size, layer):
    assert grad_cam_layer(VGG(config, image_size=image_size)) == layer


def test_errors_name_the_choices():
    model = VGG(SHALLOW, num_classes=3, image_size=16)
    variables, images = init(model), random_images(1, 16, 16)
    with pytest.raises(InputError, match="'fc6': expected one of conv1_1, relu1_1, pool1"):
        explain(model, variables, images, mean_rgb=MEAN, layer="fc6")
    with pytest.raises(InputError, match="the images are 15x16: expected both sides"):
        explain(model, variables, random_images(1, 15, 16), mean_rgb=MEAN)
    with pytest.raises(InputError, match=r"classes is \[3\]: expected numbers from 0 to 2"):
        explain(model, variables, images, mean_rgb=MEAN, classes=[3])
    for classes in ([1, 1], 1, ["1"]):
        with pytest.raises(InputError, match="expected 1 numbers, one for each image"):
            explain(model, variables, images, mean_rgb=MEAN, classes=classes)
    for wrong in (np.float32(images), images[0], images[:0], "photo.jpg"):
        with pytest.raises(InputError, match=r"the images are .*: expected uint8 \(N, H, W, C\)"):
            explain(model, variables, wrong, mean_rgb=MEAN)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU has quick programs")
@pytest.mark.parametrize(("count", "convolutions"), [(2, 3), (3, 2)])
def test_two_images_compile_quickly(count, convolutions):
    """XLA convolves one or two images. Of more, it computes the first layer and fc6 on windows."""
    model = VGG(SHALLOW, num_classes=3, image_size=16)
    variables, images = init(model), random_images(count, 16, 20)
    program = _jitted(model, MEAN, "relu2_1").lower(variables, images, np.full(count, -1))
    assert program.as_text().count("stablehlo.convolution") == convolutions
