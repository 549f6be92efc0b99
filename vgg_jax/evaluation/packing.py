"""Packs windows of many sizes into arrays of a few shapes.

A window is a rescaled image or a crop of it, transposed if it is wider than tall. Several windows
share a canvas, one below the other. Each window starts at a row divisible by the stride of all
poolings but the last. Enough zero rows separate windows that each gets the activations that it
would get in an array of its own. Only the sizes of the windows matter, never their pixels.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vgg_jax.configs.models import VGGConfig

# Pixels for which one more canvas shape is worth its compilation. The right number is unknown,
# because it depends on the windows still to come (docs/performance.md#canvas-shapes).
MIN_PIXELS_PER_SHAPE = 4_000_000

# Canvases of a few windows get a height that is a multiple of this many rows. Few heights occur
# then, and the cache of compiled programs soon has them all.
HEIGHT_STEP = 256

# A canvas is filled from this many windows, and gets at most half of them. The time to choose grows
# with the square of this number.
MAX_CANDIDATES = 64


class Window(NamedTuple):
    """A part of an image that gives one posterior."""

    image: int  # index of the image
    number: int  # index among the windows of the image
    weight: float  # weight in the mean over the image's windows
    pixels: np.ndarray  # uint8 (h, w, 3), with h >= w
    transposed: bool = False  # True if the rows of `pixels` are columns of the image


class CanvasShape(NamedTuple):
    """Shape (n, h, w) of the canvases of a batch. Each shape is compiled once."""

    n: int
    h: int
    w: int


class Placement(NamedTuple):
    """Position of a window: its canvas and its first row. Its first column is 0."""

    window: Window
    canvas: int
    row: int


class Batch(NamedTuple):
    """Windows that are computed together. All of them are transposed, or none is."""

    shape: CanvasShape
    transposed: bool
    placements: tuple[Placement, ...]


class RowExtent(NamedTuple):
    """Rows that a window needs in a canvas."""

    height: int  # without another window below it
    stride: int  # up to the first row of the next window, zero rows included


def row_extent(h: int, config: VGGConfig, ceil: bool = False) -> RowExtent:
    """Computes the rows that a window of `h` rows needs.

    Both numbers are multiples of the stride of all poolings but the last. With the nets of Table 1,
    341 rows need (352, 352), and 384 rows need (384, 400).

    Args:
        h: Height of the window.
        config: The net, for its poolings and the kernel sizes of its convolutions.
        ceil: True if poolings round an odd side up.

    Returns:
        The height and the stride, in rows.
    """
    trunk_stride = _trunk_stride(config)
    # The last pooling reads up to this row.
    ends = [_round_up(h, 2 * trunk_stride) if ceil else h]
    for number, stage in enumerate(config.stages):
        stride = 2**number
        map_height = _round_up(h, stride) // stride if ceil else h // stride
        padding = max(conv.kernel_size // 2 for conv in stage)
        ends.append((map_height + padding) * stride)
    return RowExtent(_round_up(h, trunk_stride), _round_up(max(ends), trunk_stride))


def pack_windows(
    windows: Iterable[Window], config: VGGConfig, *, ceil: bool, pixels: int, devices: int
) -> Iterator[Batch]:
    """Packs windows into batches of a few canvas shapes.

    The batches depend on the sizes and the order of the windows only.

    Args:
        windows: The windows. They are read only as far as the next batch needs.
        config: The net, as for `row_extent`.
        ceil: True if poolings round an odd side up.
        pixels: Most pixels of a batch. A batch of one canvas per device may exceed it.
        devices: Number of devices. It divides the number of canvases of every batch.

    Yields:
        The batches. Every window is in exactly one of them.
    """
    packer = _Packer(config, ceil=ceil, pixels=pixels, devices=devices)
    for window in windows:
        yield from packer.add(window)
    yield from packer.finish()


@dataclasses.dataclass
class _Queue:
    """Windows in their order of arrival."""

    windows: list[Window] = dataclasses.field(default_factory=list)
    extents: list[RowExtent] = dataclasses.field(default_factory=list)
    rows: int = 0  # sum of the strides

    def append(self, window: Window, extent: RowExtent) -> None:
        self.windows.append(window)
        self.extents.append(extent)
        self.rows += extent.stride

    def extend(self, other: "_Queue") -> None:
        self.windows += other.windows
        self.extents += other.extents
        self.rows += other.rows

    def pop_subset(self, h: int) -> list[tuple[Window, RowExtent]]:
        """Removes and returns the windows that fill a canvas of `h` rows best."""
        indices = select_subset(self.extents[:MAX_CANDIDATES], h)
        subset = [(self.windows[i], self.extents[i]) for i in indices]
        for i in reversed(indices):
            del self.windows[i]
            self.rows -= self.extents.pop(i).stride
        return subset


class _Queues:
    """Two queues, because upright and transposed windows never share a batch."""

    def __init__(self) -> None:
        self.upright, self.transposed = _Queue(), _Queue()

    def queue(self, transposed: bool) -> _Queue:
        return self.transposed if transposed else self.upright

    def extend(self, other: "_Queues") -> None:
        self.upright.extend(other.upright)
        self.transposed.extend(other.transposed)

    @property
    def extents(self) -> list[RowExtent]:
        return self.upright.extents + self.transposed.extents

    @property
    def rows(self) -> int:
        return self.upright.rows + self.transposed.rows


class _Packer:
    """Queues windows until they fill batches; see `pack_windows`.

    A window that fits a canvas shape of its width joins the queue of that shape. Other windows are
    queued by width. A width gets a new canvas shape once its queued pixels reach both
    MIN_PIXELS_PER_SHAPE and the pixels of a batch.
    """

    def __init__(self, config: VGGConfig, *, ceil: bool, pixels: int, devices: int) -> None:
        self._trunk_stride = _trunk_stride(config)
        self._row_extent = functools.cache(functools.partial(row_extent, config=config, ceil=ceil))
        self._pixels = pixels
        self._devices = devices
        self._waiting: dict[int, _Queues] = {}  # by width
        self._canvases: dict[CanvasShape, _Queues] = {}

    def add(self, window: Window) -> Iterator[Batch]:
        """Queues a window and yields the batches that can now be filled."""
        extent = self._row_extent(window.pixels.shape[0])
        width = _round_up(window.pixels.shape[1], self._trunk_stride)
        shape = self._find_canvas(extent.height, width, max_width=width)
        if shape is not None:
            self._canvases[shape].queue(window.transposed).append(window, extent)
        else:
            waiting = self._waiting.setdefault(width, _Queues())
            waiting.queue(window.transposed).append(window, extent)
            if waiting.rows * width < max(MIN_PIXELS_PER_SHAPE, self._pixels):
                return
            shape = self._create_canvas(width)
        # A choice among twice the windows that a batch needs fills it well.
        queue = self._canvases[shape].queue(window.transposed)
        while queue.rows > 2 * shape.n * shape.h:
            yield self._take_batch(shape, window.transposed)

    def finish(self) -> Iterator[Batch]:
        """Assigns the windows that still wait, and yields the remaining batches."""
        for width in sorted(self._waiting):
            self._assign_waiting(width)
        for shape, queues in self._canvases.items():
            for transposed in (False, True):
                while queues.queue(transposed).windows:
                    yield self._take_batch(shape, transposed)

    def _find_canvas(
        self, height: int, width: int, max_width: float = math.inf
    ) -> CanvasShape | None:
        """Returns the narrowest, then shortest, existing shape that holds this height and width."""
        shapes = [
            shape for shape in self._canvases if shape.h >= height and width <= shape.w <= max_width
        ]
        return min(shapes, key=lambda shape: (shape.w, shape.h), default=None)

    def _create_canvas(self, width: int) -> CanvasShape:
        """Chooses a shape for the waiting windows of a width, and moves them to its queues."""
        extents = self._waiting[width].extents
        shape = choose_canvas(extents, width, self._trunk_stride, self._pixels, self._devices)
        self._canvases.setdefault(shape, _Queues()).extend(self._waiting.pop(width))
        return shape

    def _assign_waiting(self, width: int) -> None:
        """Moves the last windows of a width to wider canvases, or to a shape of their own.

        They may also join the next width that still waits. The least padding decides; a new shape
        costs MIN_PIXELS_PER_SHAPE.
        """
        waiting = self._waiting[width]
        tallest = max(extent.height for extent in waiting.extents)
        shape = self._find_canvas(tallest, width)
        shape_width = math.inf if shape is None else shape.w
        next_width = min((w for w in self._waiting if w > width), default=math.inf)
        padded_pixels = (min(shape_width, next_width) - width) * waiting.rows
        if padded_pixels > MIN_PIXELS_PER_SHAPE:
            self._create_canvas(width)
        elif shape is not None and shape_width <= next_width:
            self._canvases[shape].extend(self._waiting.pop(width))
        else:
            self._waiting[int(next_width)].extend(self._waiting.pop(width))

    def _take_batch(self, shape: CanvasShape, transposed: bool) -> Batch:
        """Fills one canvas after the other from the front of a queue."""
        queue = self._canvases[shape].queue(transposed)
        placements = []
        for canvas in range(shape.n):
            row = 0
            for window, extent in queue.pop_subset(shape.h):
                placements.append(Placement(window, canvas, row))
                row += extent.stride
        return Batch(shape, transposed, tuple(placements))


def choose_canvas(
    extents: Sequence[RowExtent], width: int, trunk_stride: int, pixels: int, devices: int
) -> CanvasShape:
    """Chooses the canvas shape for windows of one width.

    The height is the tallest whose total rows are within 1 % of the minimum.

    Args:
        extents: The rows that the windows need.
        width: Width of the canvases.
        trunk_stride: Stride of all poolings but the last; heights are multiples of it.
        pixels: Most pixels of a batch, as for `pack_windows`.
        devices: Number of devices.

    Returns:
        The shape. Its number of canvases per device is what the windows need, rounded up to a power
        of two, or as many as `pixels` allows.
    """
    tallest = max(extent.height for extent in extents)
    sample = extents[:MAX_CANDIDATES]
    rows_of_half = sum(extent.stride for extent in sample[: MAX_CANDIDATES // 2])
    max_height = min(
        pixels // devices // width // trunk_stride * trunk_stride,
        _round_up(rows_of_half, HEIGHT_STEP),
    )
    heights = range(tallest, max(tallest, max_height) + 1, trunk_stride)
    used_rows = {h: _simulate_packing(sample, h) for h in heights}
    # The rest of the last canvas is not counted, because other windows will fill it.
    total_rows = {h: (len(rows) - 1) * h + min(rows[-1], h) for h, rows in used_rows.items()}
    fewest = min(total_rows.values())
    height = max(h for h, total in total_rows.items() if total <= 1.01 * fewest)
    needed = _ceil_div(len(used_rows[height]) * len(extents), len(sample) * devices)
    needed = 2 ** (needed - 1).bit_length()
    allowed = pixels // devices // (height * width)
    return CanvasShape(max(1, min(allowed, needed)) * devices, height, width)


def _simulate_packing(extents: Sequence[RowExtent], h: int) -> list[int]:
    """Packs all windows into canvases of `h` rows, and returns the rows used in each."""
    used_rows = []
    while extents:
        indices = select_subset(extents, h)
        used_rows.append(sum(extents[i].stride for i in indices))
        extents = [extent for i, extent in enumerate(extents) if i not in indices]
    return used_rows


def select_subset(extents: Sequence[RowExtent], h: int) -> list[int]:
    """Selects the windows that leave the fewest rows of a canvas empty.

    This is the subset sum problem, solved exactly by dynamic programming.

    Args:
        extents: The rows that the windows need.
        h: Height of the canvas.

    Returns:
        Increasing indices of `extents`. The first window is always selected, so none waits forever.
    """
    if not extents:
        return []
    if extents[0].stride > h:
        return [0]
    # Bit s of sums[i] is set if the first window and a subset of the next i take s rows together.
    sums = [1 << extents[0].stride]
    for extent in extents[1:]:
        sums.append(sums[-1] | sums[-1] << extent.stride)
    up_to_h = (1 << h + 1) - 1
    total = (sums[-1] & up_to_h).bit_length() - 1
    indices = []
    for i in range(len(extents) - 1, 0, -1):
        reached_without_i = sums[i - 1] >> total & 1
        if not reached_without_i:
            indices.append(i)
            total -= extents[i].stride
    return [0, *reversed(indices)]


def _trunk_stride(config: VGGConfig) -> int:
    """Stride of all poolings but the last, each of which halves both sides."""
    return 2 ** (len(config.stages) - 1)


def _ceil_div(n: int, divisor: int) -> int:
    return -(-n // divisor)


def _round_up(n: int, step: int) -> int:
    return _ceil_div(n, step) * step
