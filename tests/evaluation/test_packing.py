"""How windows share films: every window once, nothing overlapping, few kinds of films, little of them empty."""

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


def plan(sizes, pixels=400_000, devices=1, ceil=False):
    """The batches of windows of these sizes, of no pixels."""
    found = [
        Window(i, 0, 1.0, np.broadcast_to(np.uint8(0), (*sorted(size)[::-1], 3)), size[1] > size[0])
        for i, size in enumerate(sizes)
    ]
    return list(pack_windows(found, A, ceil=ceil, pixels=pixels, devices=devices))


def share_used(found):
    """Of the films' area."""
    used = sum(placed.window.pixels[..., 0].size for batch in found for placed in batch.placed)
    return used / sum(np.prod(batch.films) for batch in found)


def photos(n, seed=0):
    """Sizes of photos at Q = 256: many of 4:3 and 3:2, others between, a few panoramas, some upright."""
    rng = np.random.default_rng(seed)
    long = np.where(rng.random(n) < 0.7, rng.choice([341, 384], n), rng.integers(256, 500, n))
    long = np.where(rng.random(n) < 0.02, rng.integers(500, 2000, n), long)
    return [
        (256, int(side)) if wide else (int(side), 256)
        for side, wide in zip(long, rng.random(n) < 0.7, strict=True)
    ]


@pytest.mark.parametrize("ceil", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("devices", [1, 3])
def test_every_window_lies_once_in_a_film_and_apart_from_the_others(devices, ceil):
    sizes = photos(300)
    found = plan(sizes, devices=devices, ceil=ceil)
    assert sorted(placed.window.image for batch in found for placed in batch.placed) == list(
        range(300)
    )
    for batch in found:
        assert batch.films.n % devices == 0
        assert np.prod(batch.films) <= 400_000 or batch.films.n == devices
        free = [0] * batch.films.n  # the first row of each film that the next window may take
        for window, film, row in batch.placed:
            assert (
                batch.turned == window.turned == (sizes[window.image][1] > sizes[window.image][0])
            )
            h, w = window.pixels.shape[:2]
            assert row == free[film]
            assert row + h <= batch.films.h
            assert w <= batch.films.w
            free[film] += row_extent(h, A, ceil).apart
    assert len({batch.films for batch in found}) <= 4


def test_few_kinds_of_films_are_nearly_full():
    found = plan(photos(500), pixels=800_000)
    assert len({batch.films for batch in found}) <= 3
    assert share_used(found) > 0.93


def test_a_width_has_films_only_where_that_is_worth_it():
    usual = plan([(341, 256)] * 60)
    assert {batch.films for batch in usual} == {
        CanvasShape(1, 1408, 256)
    }  # four windows of 352 rows
    assert [len(batch.placed) for batch in usual] == [4] * 15
    assert share_used(usual) == pytest.approx(341 / 352)
    both = plan([(341, 256)] * 60 + [(256, 341)] * 2)
    assert {batch.films for batch in both} == {CanvasShape(1, 1408, 256)}  # the same for both
    narrow = plan([(341, 256)] * 60 + [(300, 240)] * 3)
    assert {batch.films for batch in narrow} == {CanvasShape(1, 1408, 256)}
    tall = plan([(341, 256)] * 60 + [(2000, 256)])
    assert {batch.films for batch in tall} == {CanvasShape(1, 1408, 256), CanvasShape(1, 2000, 256)}
    apart = plan([(512, 512)] * 100 + [(256, 256)] * 100)
    assert {batch.films.w for batch in apart} == {512, 256}
    alone = plan([(300, 256)] * 2)
    assert [batch.films for batch in alone] == [CanvasShape(1, 768, 256)]


def test_crops_have_a_film_each():
    found = plan([(224, 224)] * 100)
    assert {batch.films for batch in found} == {CanvasShape(7, 224, 224)}
    assert [len(batch.placed) for batch in found] == [7] * 14 + [2]


def test_thousands_of_small_windows_are_planned_at_once():
    """As of CIFAR-10: each has a film of its own, and what waits is not gone through again for each."""
    started = time.perf_counter()
    found = plan([(32, 32)] * 20_000, pixels=800_000)
    assert time.perf_counter() - started < 10
    assert {batch.films for batch in found} == {CanvasShape(781, 32, 32)}
    assert len(found) == 26
    mixed = plan([(48, 48), (48, 57), (61, 48)] * 3_000, pixels=800_000)
    assert time.perf_counter() - started < 20
    assert sum(len(batch.placed) for batch in mixed) == 9_000
    assert share_used(mixed) > 0.6


def test_rows_of_a_window():
    assert row_extent(341, A) == (352, 352)
    assert row_extent(341, A, ceil=True) == (352, 368)
    assert row_extent(384, A) == (384, 400)
    assert row_extent(224, A) == (224, 240)


def test_a_film_is_filled_as_well_as_it_can_be():
    rng = np.random.default_rng(0)
    for _ in range(200):
        heights = [int(h) for h in rng.integers(3, 40, 8)]
        chosen = select_subset([RowExtent(h, h) for h in heights], 70)
        assert chosen[0] == 0
        assert chosen == sorted(set(chosen))
        rest = itertools.chain.from_iterable(
            itertools.combinations(heights[1:], n) for n in range(8)
        )
        assert sum(heights[i] for i in chosen) == max(
            total for each in rest if (total := heights[0] + sum(each)) <= 70
        )
    assert select_subset([], 70) == []
    assert select_subset([RowExtent(64, 80), RowExtent(3, 4)], 70) == [0]
