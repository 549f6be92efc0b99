"""Posteriors of mixed sizes in shared batches against one image at a time, in PyTorch and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import init
from vgg_jax import IMAGENET, VGG, Conv, InputError, VGGConfig
from vgg_jax.configs.evaluation import DENSE, PROTOCOLS, EvalProtocol
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.evaluation.dense import class_posteriors, crop_offsets, iter_posteriors, iter_windows
from vgg_jax.evaluation.packing import row_extent

SMALL = VGGConfig(((Conv(8),), (Conv(16), Conv(16)), (Conv(24),)), fc=(24, 16))
STAGES = [[8], [16, 16], [24]]  # the same, for PyTorch
SIZE, CLASSES, MEAN = 16, 7, IMAGENET.mean_rgb  # fc6 reads 2x2 positions
SIZES = [(16, 16), (16, 32), (23, 16), (16, 37), (47, 16), (33, 34), (16, 43), (24, 27)]


def photos(sizes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, (h, w, 3)).astype(np.uint8) for h, w in sizes]


@pytest.fixture(scope="module")
def net():
    model = VGG(SMALL, num_classes=CLASSES, image_size=SIZE)
    variables = init(model)
    return model, jax.tree.map(
        lambda x: x * 0.5 if x.ndim > 1 else x, variables
    )  # soft-max over scores that are not all or nothing


@pytest.mark.parametrize("ceil", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize(
    ("kind", "batch_norm"),
    [("plain", False), ("lrn", False), ("plain", True)],
    ids=["plain", "lrn", "batch_norm"],
)
def test_dense_posteriors_equal_pytorchs_one_by_one(kind, batch_norm, ceil, monkeypatch):
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    from tests.helpers import torch_vgg

    monkeypatch.setitem(
        torch_vgg.STAGES, "small", [[8, "lrn"], *STAGES[1:]] if kind == "lrn" else STAGES
    )
    theirs = torch_vgg.randomize(
        torch_vgg.torch_vgg("small", (24, 16), CLASSES, batch_norm, SIZE), seed=3
    ).eval()
    theirs.fc8.weight.data *= 0.02
    params, batch_stats = torch_vgg.to_jax(theirs, 2)
    config = dataclasses.replace(SMALL, lrn=("conv1_1",) if kind == "lrn" else ())
    model = VGG(config, CLASSES, batch_norm, image_size=SIZE)
    images = photos(SIZES)
    for softmax_first in (False, True) if kind == "plain" else (False,):
        protocol = EvalProtocol(ceil=ceil, softmax_first=softmax_first)
        ours = class_posteriors(
            model, {"params": params, "batch_stats": batch_stats}, images, protocol=protocol
        )
        expected = np.stack(
            [
                torch_vgg.dense_posterior(theirs, image, MEAN, 2, ceil, True, softmax_first)
                for image in images
            ]
        )
        assert 0.05 < expected.max(1).mean() < 0.95
        assert np.abs(ours - expected).max() < 1e-5
        assert np.abs(np.diff(ours, axis=0)).max() > 1e-3  # the images differ


@pytest.mark.parametrize("ceil", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("side", [1, 3, 5])
def test_windows_in_a_film_are_what_each_is_alone(side, ceil):
    """Every height, so that the rows between them are just enough, and what is not of an image makes no difference."""
    config = VGGConfig(((Conv(8),), (Conv(8), Conv(8, side)), (Conv(8, side),)), fc=(8, 8))
    model = VGG(config, num_classes=3, image_size=8)
    variables = init(model)
    heights = range(9, 17)
    rows = np.cumsum([0] + [row_extent(h, config, ceil).apart for h in heights])
    found = photos([(h, 13) for h in heights])
    film, there = np.full((1, rows[-1], 16, 3), 99.0, np.float32), np.zeros((1, rows[-1], 16), bool)
    for row, image in zip(rows, found, strict=False):
        film[0, row : row + len(image), :13], there[0, row : row + len(image), :13] = image, True
    last_maps = jax.jit(
        lambda film, there: model.apply(variables, film, there, ceil, method="trunk")
    )
    maps = last_maps(film, there)[0]
    for row, image in zip(rows, found, strict=False):
        alone = last_maps(image[None].astype(np.float32), np.ones((1, len(image), 13), bool))[0]
        h, w = alone.shape[:2]
        np.testing.assert_allclose(
            maps[row // 4 : row // 4 + h, :w], alone, rtol=1e-4, atol=1e-4 * np.abs(alone).max()
        )
        if ceil:
            assert not maps[
                row // 4 + h : row // 4 + h + h % 2
            ].any()  # what the last pooling reads behind an odd map


def softmax_of(net, crops):
    model, variables = net
    return jax.nn.softmax(
        jax.jit(model.apply)(
            variables, jnp.float32(np.stack(crops)) - jnp.array(MEAN)[None, None, None]
        )
    )


def test_dense_on_a_crop_of_the_nets_size_is_the_forward_pass(net):
    image = photos([(SIZE, SIZE)])
    ours = class_posteriors(*net, image, protocol=EvalProtocol(flip=False))
    np.testing.assert_allclose(ours, softmax_of(net, image), atol=1e-5)


def test_crops_are_those_cut_by_hand(net):
    """5x5 and their mirror images at two scales; the ten crops of corners and centre; the centre."""
    scaled = photos([(24, 49), (48, 83)])
    grid = []
    for image, ys, xs in zip(
        scaled,
        [(0, 2, 4, 6, 8), (0, 8, 16, 24, 32)],
        [(0, 8, 16, 25, 33), (0, 17, 34, 50, 67)],
        strict=True,
    ):
        grid += [image[y : y + 16, x : x + 16] for y in ys for x in xs]
    expected = np.asarray(softmax_of(net, grid + [crop[:, ::-1] for crop in grid]))
    assert len(expected) == 100
    ours = class_posteriors(*net, [scaled], protocol=EvalProtocol("multi-crop"))
    np.testing.assert_allclose(ours[0], expected.mean(0), atol=1e-5)

    image = scaled[0]
    ten = [image[y : y + 16, x : x + 16] for y, x in ((0, 0), (0, 33), (8, 0), (8, 33), (4, 17))]
    expected = np.asarray(softmax_of(net, ten + [crop[:, ::-1] for crop in ten])).mean(0)
    np.testing.assert_allclose(
        class_posteriors(*net, [image], protocol=EvalProtocol("ten-crop"))[0], expected, atol=1e-5
    )
    np.testing.assert_allclose(
        class_posteriors(*net, [image], protocol=EvalProtocol("center", flip=False))[0],
        softmax_of(net, ten[4:])[0],
        atol=1e-5,
    )


def test_both_and_scales_are_means(net):
    images = photos([(20, 40), (31, 17)])
    both, dense, crops = (
        class_posteriors(*net, images, protocol=EvalProtocol(name))
        for name in ("both", "dense", "multi-crop")
    )
    np.testing.assert_allclose(both, (dense + crops) / 2, atol=1e-6)
    other = photos([(30, 60), (62, 34)], seed=1)
    np.testing.assert_allclose(
        class_posteriors(*net, list(zip(images, other, strict=True))),
        (dense + class_posteriors(*net, other)) / 2,
        atol=1e-6,
    )


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_weights_of_an_image_add_up_to_one(name):
    found = list(iter_windows(3, photos([(20, 40), (16, 27)]), 16, EvalProtocol(name)))
    assert sum(window.weight for window in found) == pytest.approx(1)
    assert {window.image for window in found} == {3}


def test_equal_crops_are_computed_once(net):
    image = photos([(16, 24)])
    assert (
        len(list(iter_windows(0, image, 16, EvalProtocol("multi-crop")))) == 10
    )  # five and their mirror images
    grid = [image[0][:, x : x + 16] for x in (0, 2, 4, 6, 8)]
    expected = np.asarray(softmax_of(net, grid + [crop[:, ::-1] for crop in grid]))
    np.testing.assert_allclose(
        class_posteriors(*net, image, protocol=EvalProtocol("multi-crop"))[0],
        expected.mean(0),
        atol=1e-5,
    )


@pytest.fixture
def compilations(caplog):
    """How often a program was compiled."""
    jax.config.update("jax_log_compiles", True)
    yield lambda: sum(
        record.getMessage().startswith("Compiling jit(trunk_activations)")
        for record in caplog.records
    )
    jax.config.update("jax_log_compiles", False)


@pytest.mark.parametrize(
    ("worth", "most"),
    [
        pytest.param(4_000_000, 2, id="few_programs"),
        pytest.param(4_000, 4, id="many_programs", marks=pytest.mark.slow),
    ],
)
def test_each_image_comes_once_and_windows_share_programs(
    net, caplog, compilations, worth, most, monkeypatch
):
    """On two devices; 40 images of 40 sizes in few programs: what each is alone, and the same again."""
    monkeypatch.setattr("vgg_jax.evaluation.packing.MIN_PIXELS_PER_SHAPE", worth)
    sizes = [(16 + i % 7, 23 + i) if i % 2 else (23 + i, 16 + i % 7) for i in range(40)]
    settings = {"mesh": make_mesh(2), "protocol": DENSE, "pixels": 16_000}
    found = dict(iter_posteriors(*net, ([image] for image in photos(sizes)), **settings))
    assert found.keys() == set(range(40))
    assert 0 < compilations() <= most
    caplog.clear()
    again = dict(iter_posteriors(*net, ([image] for image in photos(sizes)), **settings))
    assert compilations() == 0
    for index, posterior in found.items():
        np.testing.assert_array_equal(again[index], posterior)
        np.testing.assert_allclose(
            posterior, class_posteriors(*net, [photos(sizes)[index]])[0], atol=1e-6
        )


def test_crop_offsets():
    """The example of §3.2 on a 256 x 341 image."""
    assert crop_offsets(256, 224, 5) == (0, 8, 16, 24, 32)
    assert crop_offsets(341, 224, 5) == (0, 29, 58, 88, 117)
    assert crop_offsets(224, 224, 5) == (0, 0, 0, 0, 0)
    assert crop_offsets(256, 224, 1) == (16,)
    with pytest.raises(InputError, match="crop is 224 pixels and the image side 223"):
        crop_offsets(223, 224, 5)


def test_nothing_and_too_much(net, monkeypatch):
    assert class_posteriors(*net, []).shape == (0, CLASSES)
    monkeypatch.setattr("vgg_jax.evaluation.dense.LARGEST", 500)
    with pytest.raises(
        InputError, match="image 0 is 16x40 at its test scale: expected at most 500 pixels"
    ):
        class_posteriors(*net, photos([(16, 40)]))
    with pytest.raises(InputError, match="image 0 is given at no test scale"):
        class_posteriors(*net, [[]])
    with pytest.raises(InputError, match="pixels is 0"):
        class_posteriors(*net, photos([(16, 16)]), pixels=0)


def test_parameters_of_another_type_are_promoted_as_ever(net):
    model, variables = net
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables)
    expected = class_posteriors(
        model, jax.tree.map(lambda x: x.astype(jnp.float32), half), photos([(16, 24)])
    )
    np.testing.assert_allclose(
        class_posteriors(model, half, photos([(16, 24)])), expected, atol=1e-5
    )


def test_too_small_an_image_and_an_unknown_protocol(net):
    with pytest.raises(
        InputError, match="image 1 is 15x80: expected both sides to be at least the net's, 16"
    ):
        class_posteriors(*net, photos([(16, 16), (15, 80)]))
    image = photos([(16, 16)])[0]
    for wrong in (
        image / 255,
        image.astype(np.float32) - 120,
        image[..., :1],
        np.stack([image, image])[..., 0],
    ):
        with pytest.raises(InputError, match=r"image 0 is .*: expected uint8 RGB, \(H, W, 3\)"):
            class_posteriors(*net, [wrong])
    with pytest.raises(InputError, match=r"'sparse'.*dense"):
        EvalProtocol("sparse")
