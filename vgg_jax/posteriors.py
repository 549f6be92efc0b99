"""The paper's evaluation (§3.2): class posteriors of images of any size, from dense score maps, from crops, or from both.

Knows neither files nor TensorFlow. All that is evaluated is a window: the whole rescaled image, or a crop of it. Windows of different
sizes share batches: each lies in the corner of a place, whose sides are few, and the net clears what is around it. A window that is
taller than wide is turned, transposed, and computed by the same program with transposed kernels.
"""

import dataclasses
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vgg_jax.configs import DENSE, IMAGENET, LARGEST, PIXELS, Protocol
from vgg_jax.errors import InputError
from vgg_jax.layers import compiler_options, inside, with_filters
from vgg_jax.model import VGG, preprocess, transposed
from vgg_jax.sharding import data_mesh, put_batch, replicated

# Places have sides that are multiples of 32 pixels, or a pixel less: of 500 ImageNet photos at Q = 256, 3 % of their area would be empty.
# With the few programs that are worth their compilation it is 9 %.
PLACE = 32
LARGE_PLACE = 128  # the same for a side above twice the shorter one's, which few photos have
# Pixels for which a place gets a program of its own: 23 photos. To compile one costs as much as 12 to 15 (net A, two cores), and what
# comes after the photos seen so far is not known.
COMPILED = 2_000_000
BACKLOG = 16  # batches that wait for their program before the reading of images waits too


class Window(NamedTuple):
    """A part of an image that gives one posterior."""

    image: int  # whose it is
    number: int  # among those of the image
    weight: float  # of its posterior in the image's
    pixels: np.ndarray  # uint8 (h, w, 3), at least as wide as tall
    turned: bool = False  # whether its rows are the image's columns


class Place(NamedTuple):
    """The sides of the array in whose corner a window lies while it is computed, and whether its windows are turned."""

    h: int
    w: int
    turned: bool = False


Program = tuple[int, int, int]  # what is compiled once: the sides of the place, and the slots


class Batch(NamedTuple):
    """Windows that are computed together, each in the corner of a place, and how many there can be."""

    place: Place
    slots: int
    windows: tuple[Window, ...]

    @property
    def program(self) -> Program:
        return self.place.h, self.place.w, self.slots


def window_posteriors(
    variables: Any, images: Array, sizes: Array, turned: Array, *, model: VGG, mean_rgb: tuple[float, float, float], protocol: Protocol
) -> Array:
    """float32 (N, K): the posteriors of windows of `sizes`, int (N, 2), in the corners of uint8 images (N, H, W, 3).

    If they are `turned`, a bool (), the variables are expected to be `transposed`.
    """
    if protocol.mirrored:
        images = jnp.concatenate([images, jnp.where(turned, _mirrored(images, sizes, 1), _mirrored(images, sizes, 2))])
        sizes = jnp.concatenate([sizes, sizes])
    scores: Any = model.apply(variables, preprocess(images, mean_rgb), sizes=sizes, ceil=protocol.ceil, method="score_map")
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    valid = model.map_sizes(sizes, protocol.ceil)
    share = inside(scores, valid) / valid.prod(1)[:, None, None, None]
    first, then = (jax.nn.softmax, lambda x: x) if protocol.softmax_first else (lambda x: x, jax.nn.softmax)
    posteriors = then((first(scores) * share).sum((1, 2)))
    return posteriors.reshape(1 + protocol.mirrored, -1, model.num_classes).mean(0)


def _mirrored(images: Array, sizes: Array, axis: int) -> Array:
    """The mirror images along an axis, in the same corners."""
    at, side = jnp.arange(images.shape[axis])[None], sizes[:, axis - 1, None]
    source = jnp.where(at < side, side - 1 - at, at)
    return jnp.take_along_axis(images, jnp.expand_dims(source, (3 - axis, 3)), axis)


@functools.lru_cache(maxsize=8)
def compiled(model: VGG, mean_rgb: tuple[float, float, float], protocol: Protocol, mesh: jax.sharding.Mesh) -> Callable[..., Array]:
    """`window_posteriors`, jitted. The same function for equal arguments, so that what it has compiled is used again."""
    function = functools.partial(window_posteriors, model=model, mean_rgb=mean_rgb, protocol=protocol)
    return jax.jit(function, compiler_options=compiler_options(thorough=True), out_shardings=replicated(mesh))


def windows(index: int, scales: Sequence[np.ndarray], crop: int, protocol: Protocol) -> Iterator[Window]:
    """The windows of an image that is given rescaled to each test scale, uint8 (H, W, 3). Their weights add up to 1."""
    number = 0
    for image in scales:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InputError(f"image {index} is {image.dtype} {image.shape}: expected uint8 RGB, (H, W, 3), the mean not subtracted")
        h, w = image.shape[:2]
        if h * w > LARGEST and protocol.name in ("dense", "both"):
            raise InputError(f"image {index} is {h}x{w} at its test scale: expected at most {LARGEST:,} pixels; crop it, or leave it out")
        if min(h, w) < crop:
            raise InputError(f"image {index} is {h}x{w}: expected both sides to be at least the net's, {crop}; pass larger test scales")
        share = (0.5 if protocol.name == "both" else 1.0) / len(scales)
        if protocol.name in ("dense", "both"):
            yield Window(index, number, share, image.swapaxes(0, 1) if h > w else image, h > w)
            number += 1
        if protocol.name == "dense":
            continue
        count = {"center": 1, "ten-crop": 2, "multi-crop": 5, "both": 5}[protocol.name]
        offsets = [(y, x) for y in crop_offsets(h, crop, count) for x in crop_offsets(w, crop, count)]
        if protocol.name == "ten-crop":
            offsets += [(crop_offsets(h, crop, 1)[0], crop_offsets(w, crop, 1)[0])]
        for (y, x), times in Counter(offsets).items():  # where a side is the crop's, five crops are one
            yield Window(index, number, share * times / len(offsets), image[y : y + crop, x : x + crop])
            number += 1


def crop_offsets(side: int, crop: int, count: int) -> tuple[int, ...]:
    """`count` evenly spaced offsets of a crop in a side, from first to last (§3.2): crop_offsets(256, 224, 5) is (0, 8, 16, 24, 32).

    One offset is the centre's, as validation in training has it. Raises InputError for a crop that does not fit.
    """
    if crop > side:
        raise InputError(f"the crop is {crop} pixels and the image side {side}: expected at most the side; pass a larger test scale")
    if count == 1:
        return ((side - crop + 1) // 2,)
    return tuple(int(offset) for offset in np.round(np.linspace(0, side - crop, count)))


def stream_posteriors(
    model: VGG,
    variables: Any,
    images: Iterable[Sequence[np.ndarray]],
    *,
    mesh: jax.sharding.Mesh,
    protocol: Protocol = DENSE,
    mean_rgb: tuple[float, float, float] = IMAGENET.mean_rgb,
    pixels: int = PIXELS,
) -> Iterator[tuple[int, np.ndarray]]:
    """(index, posterior (K,)) of each image, in the order in which they are done; each is given at all test scales.

    Memory depends on `pixels`, those of the windows that are computed at once (their mirror images not counted), and a little on the
    number of sizes, whose windows wait for each other; not on the number of images. The first image that is taller than wide takes a
    second copy of fc6 and of the convolutions' kernels. A program is compiled while
    batches of others are computed, so a result may come earlier or later, but it is always the same. Settings of jax that hold in one
    thread only (`with jax.default_matmul_precision(…)`) do not reach all of it. Raises InputError for an image that is smaller than the
    net's, or larger than `LARGEST`.
    """
    if pixels < 1:
        raise InputError(f"pixels is {pixels}: expected at least 1")
    compute = compiled(model, tuple(mean_rgb), protocol, mesh)
    nets = {False: jax.device_put(with_filters(variables), replicated(mesh))}  # the variables, by whether windows are turned
    parts: dict[int, list[Any]] = {}  # of each image that is not done, its windows' shares

    def all_windows() -> Iterator[Window]:
        for index, scales in enumerate(images):
            of_image = list(windows(index, scales, model.image_size, protocol))
            parts[index] = [None] * len(of_image)
            yield from of_image

    def answer(batch: Batch) -> np.ndarray:
        full = np.zeros((batch.slots, batch.place.h, batch.place.w, 3), np.uint8)
        sizes = np.full((batch.slots, 2), model.image_size, np.int32)
        for i, window in enumerate(batch.windows):
            sizes[i] = h, w = window.pixels.shape[:2]
            full[i, :h, :w] = window.pixels
        placed = put_batch({"images": full, "sizes": sizes}, mesh)
        return np.asarray(compute(nets[batch.place.turned], placed["images"], placed["sizes"], batch.place.turned), np.float64)

    def done(batch: Batch, answers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        for window, posterior in zip(batch.windows, answers, strict=False):
            of_image = parts[window.image]
            of_image[window.number] = window.weight * posterior
            if not any(part is None for part in of_image):
                yield window.image, np.sum(parts.pop(window.image), 0)

    ready: set[Program] = set()
    first: dict[Program, tuple[Batch, Future]] = {}  # of each program that is being compiled, the batch that it is compiled for
    backlog: list[Batch] = []  # of such programs

    def finished(wait: bool) -> Iterator[tuple[int, np.ndarray]]:
        """What the compiling thread has done, and then the batches that waited for it."""
        for program, (batch, future) in list(first.items()):
            if wait or future.done():
                yield from done(batch, future.result())
                del first[program]
                ready.add(program)
                now = [other for other in backlog if other.program == program]
                backlog[:] = [other for other in backlog if other.program != program]
                for other in now:
                    yield from done(other, answer(other))
                wait = False  # there is work to do again

    compiler = ThreadPoolExecutor(1, "compiler")
    try:
        for batch in batches(all_windows(), pixels, mesh.size, protocol.ceil):
            if batch.place.turned and True not in nets:
                nets[True] = jax.device_put(with_filters(transposed(model, nets[False])), replicated(mesh))
            if batch.program in ready:
                yield from done(batch, answer(batch))
            elif batch.program in first:
                backlog.append(batch)
            else:
                first[batch.program] = batch, compiler.submit(answer, batch)
            yield from finished(wait=len(backlog) > BACKLOG)
        while first:
            yield from finished(wait=True)
    finally:
        compiler.shutdown(wait=False, cancel_futures=True)


def batches(found: Iterable[Window], pixels: int, devices: int, ceil: bool) -> Iterator[Batch]:
    """Windows put together into batches, few enough kinds of them: what a program costs is worth `COMPILED` pixels.

    A place has a program of its own when so much of it waits, and shares it with the place of its sides for turned windows. At the end
    what is left of a place goes into a larger one while that saves more than it costs (a program for each, as if none were shared), and
    fills up the last batches of larger ones. Depends on nothing but the windows.
    """
    waiting: dict[Place, list[Window]] = defaultdict(list)
    counts: dict[Place, int] = {}  # of the places that have a program
    for window in found:
        h, w = window.pixels.shape[:2]
        place = place_of(h, w, window.turned, ceil)
        waiting[place].append(window)
        full = windows_at_once(place, pixels, devices)
        if _area(place) * len(waiting[place]) >= max(COMPILED, _area(place) * full):
            counts |= {place: full, _other_way(place): full}
        while place in counts and len(waiting[place]) >= full:
            yield Batch(place, full, tuple(waiting[place][:full]))
            del waiting[place][:full]

    left = {place: here for place, here in waiting.items() if here}
    while merger := min(_mergers(left, counts), default=None):
        cost, place, larger = merger
        if cost > COMPILED:
            break
        left.setdefault(larger, []).extend(left.pop(place))
    for place in sorted(left, key=_area, reverse=True):
        here = left[place]
        most = max(len(here), len(left.get(_other_way(place), ())))
        enough = 2 ** math.ceil(math.log2(max(1, -(-most // devices)))) * devices
        count = counts.get(place) or min(windows_at_once(place, pixels, devices), enough)
        counts[_other_way(place)] = count
        for other in sorted((other for other in left if other != place and _fits(other, place)), key=_area, reverse=True):
            free = -len(here) % count
            here += left[other][:free]
            del left[other][:free]
        for start in range(0, len(here), count):
            yield Batch(place, count, tuple(here[start : start + count]))
        here.clear()


def _mergers(left: Mapping[Place, Sequence[Window]], programs: Iterable[Place]) -> Iterator[tuple]:
    """(more pixels to compute, place, larger place) for each place that has no program and could do without."""
    for place, here in left.items():
        larger = [other for other in {*left, *programs} if other != place and _fits(place, other)]
        if larger and place not in programs:
            nearest = min(larger, key=lambda other: (_area(other), other))
            yield (_area(nearest) - _area(place)) * len(here), place, nearest


def _area(place: Place) -> int:
    return place.h * place.w


def _fits(place: Place, other: Place) -> bool:
    return place.h <= other.h and place.w <= other.w and place.turned == other.turned


def _other_way(place: Place) -> Place:
    return place._replace(turned=not place.turned)


def with_defaults(
    protocol: Protocol, scales: Sequence[int], model: VGG, metadata: Mapping[str, Any], path: Any
) -> tuple[Protocol, tuple[int, ...]]:
    """The protocol and the test scales for a net, `metadata` as `vgg_jax.load` gives it, with what was not said filled in.

    Raises InputError for a scale below the net's size, and for a net without fully connected layers.
    """
    if not metadata["top"]:
        raise InputError(f"{path} has no fully connected layers: expected a whole net; it gives features only")
    if protocol.flip is None and not metadata["flip"]:  # as for digits: their mirror images are none
        protocol = dataclasses.replace(protocol, flip=False)
    scales = tuple(scales) or (metadata["preprocessing"]["scale"],)
    if min(scales) < model.image_size:
        raise InputError(f"scales is {scales}: expected at least the size of the net's images, {model.image_size}")
    return protocol, scales


def posteriors(model: VGG, variables: Any, images: Sequence[np.ndarray] | Sequence[Sequence[np.ndarray]], **settings: Any) -> np.ndarray:
    """float64 (N, K): the class posteriors of images, uint8 RGB (H, W, 3) at a test scale each, or sequences of them, one for each scale.

    Settings are those of `stream_posteriors`. Raises InputError for an image that is smaller than the net's, or larger than `LARGEST`.
    """
    scaled = [[np.asarray(image)] if hasattr(image, "shape") else [*map(np.asarray, image)] for image in images]
    mesh = settings.pop("mesh", None) or data_mesh(1, jax.devices()[:1])
    found = dict(stream_posteriors(model, variables, scaled, mesh=mesh, **settings))
    return np.array([found[index] for index in range(len(scaled))]).reshape(-1, model.num_classes)


def place_of(h: int, w: int, turned: bool = False, ceil: bool = False) -> Place:
    """The place for a window of these sides, at least as wide as tall.

    Pooling that rounds down leaves no more score positions of 351 pixels than of 321, but one more of 352: a fifth of fc6's work.
    """

    def up(side: int, step: int) -> int:
        multiple = -(-side // step) * step
        return multiple if ceil or multiple == side else multiple - 1

    return Place(up(h, PLACE), up(w, PLACE if w <= 2 * h else LARGE_PLACE), turned)


def windows_at_once(place: Place, pixels: int, devices: int) -> int:
    """How many windows of a place are computed together: at least one a device, and as many on each."""
    return max(1, pixels // _area(place) // devices) * devices
