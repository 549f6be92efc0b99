"""Posteriors of mixed sizes in shared batches, compared with one image at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import log_compiles
from tests.helpers.tiny import init
from vgg_jax import IMAGENET, VGG, Conv, InputError, VGGConfig
from vgg_jax.configs.evaluation import DENSE, PROTOCOLS, EvalProtocol
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.evaluation import dense
from vgg_jax.evaluation.dense import (
    class_posteriors,
    crop_offsets,
    iter_posteriors,
    iter_windows,
    trunk_activations,
)
from vgg_jax.evaluation.packing import row_extent
from vgg_jax.inference import pack_kernels

SMALL = VGGConfig(((Conv(8),), (Conv(16), Conv(16)), (Conv(24),)), fc=(24, 16))
STAGES = [[8], [16, 16], [24]]  # of SMALL, for PyTorch
SIZE, CLASSES, MEAN = 16, 7, IMAGENET.mean_rgb  # fc6 reads 2x2 positions
SIZES = [(16, 16), (16, 32), (23, 16), (16, 37), (47, 16), (33, 34), (16, 43), (24, 27)]


def photos(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (h, w, 3)).astype(np.uint8) for h, w in sizes]


@pytest.fixture(scope="module")
def small_net():
    """A model and its variables, scaled so that no posterior is near 0 or 1."""
    model = VGG(SMALL, num_classes=CLASSES, image_size=SIZE)
    return model, jax.tree.map(lambda x: x * 0.5 if x.ndim > 1 else x, init(model))


def crop_posteriors(small_net, crops):
    """Posteriors of crops of the net's size, by the plain forward pass."""
    model, variables = small_net
    images = jnp.float32(np.stack(crops)) - jnp.array(MEAN)[None, None, None]
    return np.asarray(jax.nn.softmax(jax.jit(model.apply)(variables, images)))


def with_mirror_images(crops):
    return [*crops, *(crop[:, ::-1] for crop in crops)]


@pytest.mark.slow
@pytest.mark.parametrize("ceil", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize(
    ("kind", "batch_norm"),
    [("plain", False), ("lrn", False), ("plain", True)],
    ids=["plain", "lrn", "batch_norm"],
)
def test_dense_posteriors_match_torch(kind, batch_norm, ceil, monkeypatch):
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    from tests.helpers import torch_vgg

    stages = [[8, "lrn"], *STAGES[1:]] if kind == "lrn" else STAGES
    monkeypatch.setitem(torch_vgg.STAGES, "small", stages)
    torch_net = torch_vgg.torch_vgg("small", (24, 16), CLASSES, batch_norm, SIZE)
    torch_net = torch_vgg.randomize(torch_net, seed=3).eval()
    torch_net.fc8.weight.data *= 0.02
    params, batch_stats = torch_vgg.to_jax(torch_net, 2)
    variables = {"params": params, "batch_stats": batch_stats}
    config = dataclasses.replace(SMALL, lrn=("conv1_1",) if kind == "lrn" else ())
    model = VGG(config, CLASSES, batch_norm, image_size=SIZE)
    images = photos(SIZES)
    for softmax_first in (False, True) if kind == "plain" else (False,):
        protocol = EvalProtocol(ceil=ceil, softmax_first=softmax_first)
        actual = class_posteriors(model, variables, images, protocol=protocol)
        expected = np.stack(
            [
                torch_vgg.dense_posterior(torch_net, image, MEAN, 2, ceil, True, softmax_first)
                for image in images
            ]
        )
        assert 0.05 < expected.max(1).mean() < 0.95
        assert np.abs(actual - expected).max() < 1e-5
        assert np.abs(np.diff(actual, axis=0)).max() > 1e-3  # the images differ


def numpy_trunk(config, params, image, ceil):
    """The convolutions, ReLUs and poolings of one image, without the last pooling."""
    x = np.float64(image)
    for number, stage in enumerate(config.stages, 1):
        if number > 1:
            h, w, channels = x.shape
            if ceil:
                x = np.pad(x, ((0, h % 2), (0, w % 2), (0, 0)))
            h, w = x.shape[0] // 2, x.shape[1] // 2
            x = x[: 2 * h, : 2 * w].reshape(h, 2, w, 2, channels).max((1, 3))
        for i, conv in enumerate(stage, 1):
            layer = params[f"conv{number}_{i}"]
            side = conv.kernel_size
            padded = np.pad(x, ((side // 2, side // 2), (side // 2, side // 2), (0, 0)))
            windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (0, 1))
            x = np.einsum("hwcij,ijcf->hwf", windows, np.float64(layer["kernel"]))
            x = np.maximum(x + np.float64(layer["bias"]), 0)
    return x


@pytest.mark.parametrize("ceil", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("side", [1, 3, 5])
def test_trunk_isolates_windows(side, ceil):
    """Windows of every height in one canvas, with the fewest rows between them.

    The padding pixels hold numbers, which must not matter.
    """
    config = VGGConfig(((Conv(8),), (Conv(8), Conv(8, side)), (Conv(8, side),)), fc=(8, 8))
    model = VGG(config, num_classes=3, image_size=8)
    # With a bias, padding that is not masked becomes positive.
    variables = jax.tree.map(lambda x: x if x.ndim > 1 else x + 5, init(model))
    trunk = jax.jit(lambda *args: model.apply(variables, *args, ceil, method="trunk"))
    heights = range(9, 17)
    rows = np.cumsum([0] + [row_extent(h, config, ceil).stride for h in heights])
    images = photos([(h, 13) for h in heights])
    canvas = np.full((1, rows[-1], 16, 3), 99.0, np.float32)
    valid_mask = np.zeros((1, rows[-1], 16), bool)
    for row, image in zip(rows, images, strict=False):
        canvas[0, row : row + len(image), :13] = image
        valid_mask[0, row : row + len(image), :13] = True
    activations = trunk(canvas, valid_mask)[0]
    for row, image in zip(rows, images, strict=False):
        expected = numpy_trunk(config, variables["params"], image, ceil)
        h, w = expected.shape[:2]
        first = row // 4
        tolerance = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(
            activations[first : first + h, :w], expected, rtol=1e-4, atol=tolerance
        )
        if ceil:
            # The last pooling reads one row past an odd map.
            assert not activations[first + h : first + h + h % 2].any()


def test_poolings_of_canvases_are_part_of_the_convolution(small_net, monkeypatch):
    """Pooling by itself would need a mask of four times as many values before it."""
    model, variables = small_net
    pools = []
    pool = VGG._pool

    def count_pool(self, *args):
        pools.append(args)
        return pool(self, *args)

    monkeypatch.setattr(VGG, "_pool", count_pool)
    images, valid_mask = np.ones((1, 32, 32, 3), np.float32), np.ones((1, 32, 32), bool)
    # The head has the last pooling. One that rounds up needs the mask before it.
    for ceil, expected in ((False, 0), (True, len(model.config.stages) - 1)):
        pools.clear()
        model.apply(variables, images, valid_mask, ceil, method="trunk")
        assert len(pools) == expected


def test_dense_on_one_crop_is_forward_pass(small_net):
    image = photos([(SIZE, SIZE)])
    posteriors = class_posteriors(*small_net, image, protocol=EvalProtocol(flip=False))
    np.testing.assert_allclose(posteriors, crop_posteriors(small_net, image), atol=1e-5)


def test_multi_crop_matches_crops_cut_by_hand(small_net):
    """5x5 crops and their mirror images at two scales."""
    scaled = photos([(24, 49), (48, 83)])
    rows = [(0, 2, 4, 6, 8), (0, 8, 16, 24, 32)]
    columns = [(0, 8, 16, 25, 33), (0, 17, 34, 50, 67)]
    crops = []
    for image, ys, xs in zip(scaled, rows, columns, strict=True):
        crops += [image[y : y + 16, x : x + 16] for y in ys for x in xs]
    expected = crop_posteriors(small_net, with_mirror_images(crops))
    assert len(expected) == 100
    posteriors = class_posteriors(*small_net, [scaled], protocol=EvalProtocol("multi-crop"))
    np.testing.assert_allclose(posteriors[0], expected.mean(0), atol=1e-5)


def test_ten_crop_and_center_match_crops_cut_by_hand(small_net):
    (image,) = photos([(24, 49)])
    corners = ((0, 0), (0, 33), (8, 0), (8, 33), (4, 17))  # and the centre
    crops = [image[y : y + 16, x : x + 16] for y, x in corners]
    expected = crop_posteriors(small_net, with_mirror_images(crops))
    ten_crop = class_posteriors(*small_net, [image], protocol=EvalProtocol("ten-crop"))
    np.testing.assert_allclose(ten_crop[0], expected.mean(0), atol=1e-5)
    center = class_posteriors(*small_net, [image], protocol=EvalProtocol("center", flip=False))
    np.testing.assert_allclose(center[0], expected[4], atol=1e-5)


@pytest.mark.slow
def test_both_and_several_scales_are_means(small_net):
    images = photos([(20, 40), (31, 17)])
    both, dense, crops = (
        class_posteriors(*small_net, images, protocol=EvalProtocol(name))
        for name in ("both", "dense", "multi-crop")
    )
    np.testing.assert_allclose(both, (dense + crops) / 2, atol=1e-6)
    larger = photos([(30, 60), (62, 34)], seed=1)
    np.testing.assert_allclose(
        class_posteriors(*small_net, list(zip(images, larger, strict=True))),
        (dense + class_posteriors(*small_net, larger)) / 2,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", PROTOCOLS)
def test_iter_windows_weights_sum_to_one(name):
    windows = list(iter_windows(3, photos([(20, 40), (16, 27)]), 16, EvalProtocol(name)))
    assert sum(window.weight for window in windows) == pytest.approx(1)
    assert {window.image for window in windows} == {3}


def test_iter_windows_merges_equal_crops(small_net):
    images = photos([(16, 24)])
    protocol = EvalProtocol("multi-crop")
    assert len(list(iter_windows(0, images, 16, protocol))) == 10  # five and their mirror images
    crops = [images[0][:, x : x + 16] for x in (0, 2, 4, 6, 8)]
    expected = crop_posteriors(small_net, with_mirror_images(crops)).mean(0)
    posteriors = class_posteriors(*small_net, images, protocol=protocol)
    np.testing.assert_allclose(posteriors[0], expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("min_pixels_per_shape", "max_compilations"),
    [
        pytest.param(4_000_000, 2, id="few_programs"),
        pytest.param(4_000, 4, id="many_programs", marks=pytest.mark.slow),
    ],
)
def test_iter_posteriors_shares_programs(
    small_net, caplog, min_pixels_per_shape, max_compilations, monkeypatch
):
    """On two devices, 40 images of 40 sizes give the same as each by itself, twice."""
    monkeypatch.setattr("vgg_jax.evaluation.packing.MIN_PIXELS_PER_SHAPE", min_pixels_per_shape)
    sizes = [(16 + i % 7, 30 + i % 6) for i in range(40)]
    sizes = [size[::-1] if i % 2 else size for i, size in enumerate(sizes)]
    assert len(set(sizes)) == 40
    images = photos(sizes)
    settings = {"mesh": make_mesh(2), "protocol": DENSE, "pixels": 16_000}
    with log_compiles(caplog) as count:
        first = dict(iter_posteriors(*small_net, ([image] for image in images), **settings))
        assert first.keys() == set(range(40))
        assert 0 < count("trunk_activations") <= max_compilations
    with log_compiles(caplog) as count:
        second = dict(iter_posteriors(*small_net, ([image] for image in images), **settings))
        assert count("trunk_activations") == 0
    for index, posterior in first.items():
        np.testing.assert_array_equal(second[index], posterior)
        expected = class_posteriors(*small_net, [images[index]])[0]
        np.testing.assert_allclose(posterior, expected, atol=1e-6)


def test_crop_offsets():
    """The example of §3.2 on a 256 x 341 image."""
    assert crop_offsets(256, 224, 5) == (0, 8, 16, 24, 32)
    assert crop_offsets(341, 224, 5) == (0, 29, 58, 88, 117)
    assert crop_offsets(224, 224, 5) == (0, 0, 0, 0, 0)
    with pytest.raises(InputError, match="crop is 224 pixels and the image side 223"):
        crop_offsets(223, 224, 5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU has quick programs")
@pytest.mark.parametrize(
    ("num_images", "max_pixels", "is_quick"),
    [
        (None, dense.MAX_QUICK_PIXELS, False),
        (2, dense.MAX_QUICK_PIXELS, True),
        (3, dense.MAX_QUICK_PIXELS, False),
        (2, 100, False),
    ],
)
def test_two_images_compile_quickly(small_net, num_images, max_pixels, is_quick, monkeypatch):
    """Small canvases of two images are convolved by XLA, with equal results and no packing."""
    is_quick_trunk, packed = [], []

    def trunk(*args, model, **others):
        is_quick_trunk.append(model.quick_compile)
        return trunk_activations(*args, model=model, **others)

    def pack(*args, **others):
        packed.append(args)
        return pack_kernels(*args, **others)

    monkeypatch.setattr(dense, "trunk_activations", trunk)
    monkeypatch.setattr(dense, "pack_kernels", pack)
    monkeypatch.setattr(dense, "MAX_QUICK_PIXELS", max_pixels)
    dense.jitted_stages.cache_clear()
    images = photos([(16, 40), (47, 16)])  # the first one is transposed
    actual = class_posteriors(*small_net, images, num_images=num_images)
    dense.jitted_stages.cache_clear()
    assert set(is_quick_trunk) == {is_quick} and len(packed) == (0 if is_quick else 2)
    expected = [class_posteriors(*small_net, [image])[0] for image in images]
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_class_posteriors_of_no_images(small_net):
    assert class_posteriors(*small_net, []).shape == (0, CLASSES)


@pytest.mark.slow
def test_class_posteriors_promotes_params(small_net):
    model, variables = small_net
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    single = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    images = photos([(16, 24)])
    np.testing.assert_allclose(
        class_posteriors(model, half, images), class_posteriors(model, single, images), atol=1e-5
    )


def test_class_posteriors_rejects_bad_sizes(small_net, monkeypatch):
    with pytest.raises(InputError, match="image 0 has no rescaled version"):
        class_posteriors(*small_net, [[]])
    with pytest.raises(InputError, match="pixels is 0"):
        class_posteriors(*small_net, photos([(16, 16)]), pixels=0)
    message = "image 1 is 15x80: expected both sides to be at least the net's, 16"
    with pytest.raises(InputError, match=message):
        class_posteriors(*small_net, photos([(16, 16), (15, 80)]))
    monkeypatch.setattr("vgg_jax.evaluation.dense.MAX_IMAGE_PIXELS", 500)
    message = "image 0 is 16x40 at its test scale: expected at most 500 pixels"
    with pytest.raises(InputError, match=message):
        class_posteriors(*small_net, photos([(16, 40)]))


def test_class_posteriors_rejects_bad_arrays(small_net):
    (image,) = photos([(16, 16)])
    floats = (image / 255, image.astype(np.float32) - 120)
    shapes = (image[..., :1], np.stack([image, image])[..., 0])
    for array in (*floats, *shapes):
        with pytest.raises(InputError, match=r"image 0 is .*: expected uint8 RGB, \(H, W, 3\)"):
            class_posteriors(*small_net, [array])


def test_protocol_rejects_unknown_name():
    with pytest.raises(InputError, match=r"'sparse'.*dense"):
        EvalProtocol("sparse")
