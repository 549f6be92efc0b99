"""Windows share canvases: each lies in one, none overlap, few shapes occur, and little is empty."""

import itertools
import time

import numpy as np
import pytest

from vgg_jax import CONFIGS
from vgg_jax.evaluation.packing import (
    CanvasShape,
    RowExtent,
    Window,
    pack_windows,
    row_extent,
    select_subset,
)

A = CONFIGS["A"]


def pack(sizes, pixels=400_000, devices=1, ceil=False):
    """Packs windows cut from images of these sizes. Their pixels take no memory."""
    windows = [
        Window(i, 0, 1.0, np.broadcast_to(np.uint8(0), (max(h, w), min(h, w), 3)), w > h)
        for i, (h, w) in enumerate(sizes)
    ]
    return list(pack_windows(windows, A, ceil=ceil, pixels=pixels, devices=devices))


def shapes(batches):
    return {batch.shape for batch in batches}


def used_share(batches):
    """Share of the canvases' area that windows cover."""
    placements = [placement for batch in batches for placement in batch.placements]
    used = sum(placement.window.pixels[..., 0].size for placement in placements)
    return used / sum(np.prod(batch.shape) for batch in batches)


def photo_sizes(n, seed=0):
    """Sizes of photos at Q = 256: mostly 4:3 and 3:2, a few panoramas, some upright."""
    rng = np.random.default_rng(seed)
    long = np.where(rng.random(n) < 0.7, rng.choice([341, 384], n), rng.integers(256, 500, n))
    long = np.where(rng.random(n) < 0.02, rng.integers(500, 2000, n), long)
    is_landscape = rng.random(n) < 0.7
    return [
        (256, int(side)) if landscape else (int(side), 256)
        for side, landscape in zip(long, is_landscape, strict=True)
    ]


@pytest.mark.parametrize("ceil", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("devices", [1, 3])
def test_pack_windows_places_each_window_once(devices, ceil):
    sizes = photo_sizes(300)
    batches = pack(sizes, devices=devices, ceil=ceil)
    images = [placement.window.image for batch in batches for placement in batch.placements]
    assert sorted(images) == list(range(300))
    for batch in batches:
        assert batch.shape.n % devices == 0
        assert np.prod(batch.shape) <= 400_000 or batch.shape.n == devices
        next_row = [0] * batch.shape.n  # the first free row of each canvas
        for window, canvas, row in batch.placements:
            height, width = sizes[window.image]
            assert batch.transposed == window.transposed == (width > height)
            h, w = window.pixels.shape[:2]
            assert row == next_row[canvas]
            assert row + h <= batch.shape.h
            assert w <= batch.shape.w
            next_row[canvas] += row_extent(h, A, ceil).stride
    assert len(shapes(batches)) <= 4


def test_pack_windows_fills_few_shapes():
    batches = pack(photo_sizes(500), pixels=800_000)
    assert len(shapes(batches)) <= 3
    assert used_share(batches) > 0.93


def test_pack_windows_of_one_size():
    batches = pack([(341, 256)] * 60)
    assert shapes(batches) == {CanvasShape(1, 1408, 256)}  # four windows of 352 rows
    assert [len(batch.placements) for batch in batches] == [4] * 15
    assert used_share(batches) == pytest.approx(341 / 352)
    assert shapes(pack([(300, 256)] * 2)) == {CanvasShape(1, 768, 256)}


def test_pack_windows_adds_shapes_that_pay():
    usual = [(341, 256)] * 60
    shape = CanvasShape(1, 1408, 256)
    assert shapes(pack(usual + [(256, 341)] * 2)) == {shape}  # transposed windows share it
    assert shapes(pack(usual + [(300, 240)] * 3)) == {shape}
    assert shapes(pack([*usual, (2000, 256)])) == {shape, CanvasShape(1, 2000, 256)}
    batches = pack([(512, 512)] * 100 + [(256, 256)] * 100)
    assert {batch.shape.w for batch in batches} == {512, 256}


def test_pack_windows_gives_each_crop_a_canvas():
    batches = pack([(224, 224)] * 100)
    assert shapes(batches) == {CanvasShape(7, 224, 224)}
    assert [len(batch.placements) for batch in batches] == [7] * 14 + [2]


def test_pack_windows_is_fast_for_small_windows():
    """The time per window does not grow with the number of queued windows."""
    started = time.perf_counter()
    batches = pack([(32, 32)] * 20_000, pixels=800_000)
    assert time.perf_counter() - started < 10
    assert shapes(batches) == {CanvasShape(781, 32, 32)}
    assert len(batches) == 26
    mixed = pack([(48, 48), (48, 57), (61, 48)] * 3_000, pixels=800_000)
    assert time.perf_counter() - started < 20
    assert sum(len(batch.placements) for batch in mixed) == 9_000
    assert used_share(mixed) > 0.6


def test_row_extent():
    assert row_extent(341, A) == (352, 352)
    assert row_extent(341, A, ceil=True) == (352, 368)
    assert row_extent(384, A) == (384, 400)
    assert row_extent(224, A) == (224, 240)


def test_select_subset_is_optimal():
    """Compares with all subsets."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        heights = [int(h) for h in rng.integers(3, 40, 8)]
        indices = select_subset([RowExtent(h, h) for h in heights], 70)
        assert indices[0] == 0
        assert indices == sorted(set(indices))
        subsets = itertools.chain.from_iterable(
            itertools.combinations(heights[1:], n) for n in range(8)
        )
        totals = [heights[0] + sum(subset) for subset in subsets]
        assert sum(heights[i] for i in indices) == max(total for total in totals if total <= 70)


def test_select_subset_edge_cases():
    assert select_subset([], 70) == []
    assert select_subset([RowExtent(64, 80), RowExtent(3, 4)], 70) == [0]
