"""How windows of many sizes share arrays of few sizes: one below the other in films, like photos.

A window is a whole rescaled image or a crop. It lies upright, at least as tall as wide, if need be transposed. It begins at a row that
every pooling but the last keeps whole, and between two lie enough rows of zeros for every convolution to find around each what it
would find around the image alone. Knows of the windows nothing but their sizes.
"""

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vgg_jax.configs.models import VGGConfig

# Pixels for which one more kind of films is compiled: 23 photos and their mirror images at Q = 256. To compile it costs as much as half
# of them (net A, two cores), but what comes after the photos seen so far is not known.
MIN_PIXELS_PER_SHAPE = 4_000_000
HEIGHT_STEP = 256  # rows: where little is left, the height of its films is one of few, which the cache of compiled programs soon knows
MAX_CANDIDATES = 64  # windows from which a film is filled, at most half of them to one: the time to choose grows with their square


class Window(NamedTuple):
    """A part of an image that gives one posterior."""

    image: int  # whose it is
    number: int  # among those of the image
    weight: float  # of its posterior in the image's
    pixels: np.ndarray  # uint8 (h, w, 3), at least as tall as wide
    turned: bool = False  # whether its rows are the image's columns


class CanvasShape(NamedTuple):
    """Arrays (n, h, w) of pixels that are computed together. Each such size is compiled once."""

    n: int
    h: int
    w: int


class Placement(NamedTuple):
    """Where a window lies: in a film, from a row on, at the left."""

    window: Window
    film: int
    row: int


class Batch(NamedTuple):
    """Windows that are computed together, all of them turned or none."""

    films: CanvasShape
    turned: bool
    placed: tuple[Placement, ...]


class RowExtent(NamedTuple):
    """How much of a film a window takes: alone in it, and with the zeros between it and another one."""

    alone: int
    apart: int


def row_extent(h: int, config: VGGConfig, ceil: bool = False) -> RowExtent:
    """Both are multiples of what all poolings but the last divide by: with Table 1's nets 341 rows take (352, 352), 384 (384, 400)."""
    unit = 2 ** (len(config.stages) - 1)
    ends = [
        -(-h // 2 ** len(config.stages)) * 2 ** len(config.stages) if ceil else h
    ]  # what the last pooling reads
    for number, stage in enumerate(config.stages):
        pooled = -(-h // 2**number) if ceil else h // 2**number
        ends.append((pooled + max(conv.kernel_size // 2 for conv in stage)) * 2**number)
    return RowExtent(_up(h, unit), _up(max(ends), unit))


def pack_windows(
    found: Iterable[Window], config: VGGConfig, *, ceil: bool, pixels: int, devices: int
) -> Iterator[Batch]:
    """Windows put together into batches of at most so many pixels, or one window a device, in few kinds of films.

    A width has films of its own when so much of it waits that they are worth their compilation. What is left of it at the end goes
    into wider ones, where that costs less. Depends on nothing but the windows.
    """
    unit = 2 ** (len(config.stages) - 1)
    rows = functools.cache(functools.partial(row_extent, config=config, ceil=ceil))
    kinds: set[CanvasShape] = set()
    waiting: dict[tuple[int, bool], list[Window]] = defaultdict(
        list
    )  # by width and `turned`: those that no films are there for
    queues: dict[tuple[CanvasShape, bool], list[Window]] = defaultdict(
        list
    )  # and those that wait for their batch to be full
    rows_in: Counter = Counter()  # what these windows take, by the keys of both

    def heights(windows: Iterable[Window]) -> list[RowExtent]:
        return [rows(window.pixels.shape[0]) for window in windows]

    def films_for(
        windows: Sequence[Window], width: int, widest: float = math.inf
    ) -> CanvasShape | None:
        """The narrowest and shortest, as wide as `widest` at most."""
        tallest = max(here.alone for here in heights(windows))
        fitting = [films for films in kinds if films.h >= tallest and width <= films.w <= widest]
        return min(fitting, key=lambda films: (films.w, films.h), default=None)

    def start(films: CanvasShape, width: int) -> None:
        kinds.add(films)
        for turned in (False, True):
            queues[films, turned] += waiting.pop((width, turned), [])
            rows_in[films, turned] += rows_in.pop((width, turned), 0)

    def take(films: CanvasShape, turned: bool) -> Batch:
        queue, placed = queues[films, turned], []
        for film in range(films.n):
            row = 0
            here = heights(queue[:MAX_CANDIDATES])
            chosen = select_subset(here, films.h)
            for i in chosen:
                placed.append(Placement(queue[i], film, row))
                row += here[i].apart
                rows_in[films, turned] -= here[i].apart
            for i in reversed(chosen):
                del queue[i]
        return Batch(films, turned, tuple(placed))

    for window in found:
        h, width = rows(window.pixels.shape[0]).apart, _up(window.pixels.shape[1], unit)
        if films := films_for([window], width, widest=width):
            queues[films, window.turned].append(window)
            rows_in[films, window.turned] += h
        else:
            waiting[width, window.turned].append(window)
            rows_in[width, window.turned] += h
            if (rows_in[width, False] + rows_in[width, True]) * width >= max(
                MIN_PIXELS_PER_SHAPE, pixels
            ):
                here = heights(waiting[width, False] + waiting[width, True])
                start(films := choose_canvas(here, width, unit, pixels, devices), width)
        # Of twice as many as a batch needs there are some that fill it.
        while films and rows_in[films, window.turned] > 2 * films.n * films.h:
            yield take(films, window.turned)

    for width in sorted({width for width, _ in waiting}):
        windows = waiting[width, False] + waiting[width, True]
        films = films_for(windows, width)
        wider = min(
            [w for w, _ in waiting if w > width] + ([films.w] if films else []), default=None
        )
        if (
            wider is None
            or (wider - width) * (rows_in[width, False] + rows_in[width, True])
            > MIN_PIXELS_PER_SHAPE
        ):
            start(choose_canvas(heights(windows), width, unit, pixels, devices), width)
        elif films and films.w == wider:
            start(films, width)
        else:
            for turned in (False, True):
                waiting[wider, turned] += waiting.pop((width, turned), [])
                rows_in[wider, turned] += rows_in.pop((width, turned), 0)
    for films, turned in queues:
        while queues[films, turned]:
            yield take(films, turned)


def choose_canvas(
    here: Sequence[RowExtent], width: int, unit: int, pixels: int, devices: int
) -> CanvasShape:
    """The films for windows of one width: the tallest of those into which they fit best, and as many as are needed at once."""
    tallest = max(each.alone for each in here)
    some = here[:MAX_CANDIDATES]
    most = min(
        pixels // devices // width // unit * unit,
        _up(sum(each.apart for each in some[: MAX_CANDIDATES // 2]), HEIGHT_STEP),
    )
    used = {h: _filled(some, h) for h in range(tallest, max(tallest, most) + 1, unit)}
    computed = {
        h: (len(films) - 1) * h + min(films[-1], h) for h, films in used.items()
    }  # rows; others come into the last film
    h = max(h for h, total in computed.items() if total <= 1.01 * min(computed.values()))
    needed = 2 ** (-(-len(used[h]) * len(here) // (len(some) * devices)) - 1).bit_length()
    return CanvasShape(max(1, min(pixels // devices // (h * width), needed)) * devices, h, width)


def _filled(here: Sequence[RowExtent], h: int) -> list[int]:
    """How many rows are taken of each of the films of h rows that these windows fill."""
    films = []
    while here:
        chosen = select_subset(here, h)
        films.append(sum(here[i].apart for i in chosen))
        here = [each for i, each in enumerate(here) if i not in chosen]
    return films


def select_subset(here: Sequence[RowExtent], h: int) -> list[int]:
    """Which windows to put into a film of h rows: the first, and with it those that leave least of it empty."""
    if not here or here[0].apart > h:
        return [0] if here else []
    sums = [1 << here[0].apart]  # bit s: whether the windows so far, or some of them, take s rows
    for each in here[1:]:
        sums.append(sums[-1] | sums[-1] << each.apart)
    total = (sums[-1] & (1 << h + 1) - 1).bit_length() - 1
    chosen = []
    for i in range(len(here) - 1, 0, -1):
        if not sums[i - 1] >> total & 1:
            chosen.append(i)
            total -= here[i].apart
    return [0, *reversed(chosen)]


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
