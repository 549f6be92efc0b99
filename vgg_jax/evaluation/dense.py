"""The paper's evaluation (§3.2): class posteriors of images of any size, from dense score maps, from crops, or from both.

Knows neither files nor TensorFlow. All that is evaluated is a window: the whole rescaled image, or a crop of it, or the mirror image of
either. Windows are computed in films, several in one array, up to the last pooling; from there on each position of their score maps
is a small map of its own.
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vgg_jax.configs.colours import IMAGENET
from vgg_jax.configs.evaluation import DENSE, MAX_IMAGE_PIXELS, MAX_PIXELS_PER_BATCH, EvalProtocol
from vgg_jax.distributed.sharding import make_mesh, replicated, shard_batch
from vgg_jax.errors import InputError
from vgg_jax.evaluation.packing import Batch, Window, pack_windows
from vgg_jax.inference import pack_kernels
from vgg_jax.model import VGG, transpose_kernels
from vgg_jax.preprocessing import preprocess
from vgg_jax.runtime.compiler import compiler_options

# Of score maps so many positions, or a multiple of it, are computed together, and at most so many: few multiples are compiled, and what
# neighbours read overlaps, 100 kB each before fc6 and four times that before the last pooling.
POSITIONS, MAX_POSITIONS = 16, 256


def trunk_activations(
    variables: Any,
    images: Array,
    widths: Array,
    *,
    model: VGG,
    mean_rgb: tuple[float, float, float],
    ceil: bool,
) -> Array:
    """(N, h, w, C): what the last pooling reads, for films, uint8 (N, H, W, 3), whose rows hold `widths`, int (N, H), pixels of images."""
    there = jnp.arange(images.shape[2])[None, None] < widths[:, :, None]
    found: Any = model.apply(variables, preprocess(images, mean_rgb), there, ceil, method="trunk")
    return found


def logits_at_positions(
    variables: Any, maps: Array, positions: Array, turned: Array, *, model: VGG
) -> Array:
    """float32 (P, K): the logits at positions of the score map, int (P, 3): a film, and the first row and column of its map.

    What a position reads is transposed if it is `turned`, a bool ().
    """
    side = 2 * (model.image_size // 2 ** len(model.config.stages))
    film, row, column = (positions[:, i, None, None] for i in range(3))
    row, column = row + jnp.arange(side)[None, :, None], column + jnp.arange(side)[None, None]
    # Pooling that rounds up reads a row or column behind the last: no maximum is below 0 behind the ReLU.
    windows = maps.at[film, row, column].get(mode="fill", fill_value=0)
    windows = jnp.where(turned, windows.swapaxes(1, 2), windows)
    logits: Any = model.apply(variables, windows, method="head")
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


@functools.lru_cache(maxsize=8)
def jitted_stages(
    model: VGG, mean_rgb: tuple[float, float, float], ceil: bool, mesh: jax.sharding.Mesh
) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """`trunk_activations` and `logits_at_positions`, jitted. The same for equal arguments, so that what they have compiled is used again."""
    options: Any = {
        "compiler_options": compiler_options(optimize_runtime=True, dtype=model.dtype),
        "out_shardings": replicated(mesh),
    }
    return (
        jax.jit(
            functools.partial(trunk_activations, model=model, mean_rgb=mean_rgb, ceil=ceil),
            **options,
        ),
        jax.jit(functools.partial(logits_at_positions, model=model), **options),
    )


def iter_windows(
    index: int, scales: Sequence[np.ndarray], crop: int, protocol: EvalProtocol
) -> Iterator[Window]:
    """The windows of an image that is given rescaled to each test scale, uint8 (H, W, 3). Their weights add up to 1."""
    number = 0
    for pixels, weight in _parts(index, scales, crop, protocol):
        for mirrored in (False, True)[: 1 + protocol.use_flip]:
            pixels = pixels[:, ::-1] if mirrored else pixels
            turned = pixels.shape[1] > pixels.shape[0]
            yield Window(
                index,
                number,
                weight / (1 + protocol.use_flip),
                pixels.swapaxes(0, 1) if turned else pixels,
                turned,
            )
            number += 1


def _parts(
    index: int, scales: Sequence[np.ndarray], crop: int, protocol: EvalProtocol
) -> Iterator[tuple[np.ndarray, float]]:
    """The same before mirroring and turning: pixels (h, w, 3) and their weight."""
    if not scales:
        raise InputError(f"image {index} is given at no test scale: expected at least one array")
    for image in scales:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InputError(
                f"image {index} is {image.dtype} {image.shape}: expected uint8 RGB, (H, W, 3), the mean not subtracted"
            )
        h, w = image.shape[:2]
        if h * w > MAX_IMAGE_PIXELS and protocol.name in ("dense", "both"):
            raise InputError(
                f"image {index} is {h}x{w} at its test scale: expected at most {MAX_IMAGE_PIXELS:,} pixels; crop it, or leave it out"
            )
        if min(h, w) < crop:
            raise InputError(
                f"image {index} is {h}x{w}: expected both sides to be at least the net's, {crop}; pass larger test scales"
            )
        share = (0.5 if protocol.name == "both" else 1.0) / len(scales)
        if protocol.name in ("dense", "both"):
            yield image, share
        if protocol.name == "dense":
            continue
        count = {"center": 1, "ten-crop": 2, "multi-crop": 5, "both": 5}[protocol.name]
        offsets = [
            (y, x) for y in crop_offsets(h, crop, count) for x in crop_offsets(w, crop, count)
        ]
        if protocol.name == "ten-crop":
            offsets += [(crop_offsets(h, crop, 1)[0], crop_offsets(w, crop, 1)[0])]
        for (y, x), times in Counter(
            offsets
        ).items():  # where a side is the crop's, five crops are one
            yield image[y : y + crop, x : x + crop], share * times / len(offsets)


def crop_offsets(side: int, crop: int, count: int) -> tuple[int, ...]:
    """`count` evenly spaced offsets of a crop in a side, from first to last (§3.2): crop_offsets(256, 224, 5) is (0, 8, 16, 24, 32).

    One offset is the centre's, as validation in training has it. Raises InputError for a crop that does not fit.
    """
    if crop > side:
        raise InputError(
            f"the crop is {crop} pixels and the image side {side}: expected at most the side; pass a larger test scale"
        )
    if count == 1:
        return ((side - crop + 1) // 2,)
    return tuple(int(offset) for offset in np.round(np.linspace(0, side - crop, count)))


def iter_posteriors(
    model: VGG,
    variables: Any,
    images: Iterable[Sequence[np.ndarray]],
    *,
    mesh: jax.sharding.Mesh,
    protocol: EvalProtocol = DENSE,
    mean_rgb: tuple[float, float, float] = IMAGENET.mean_rgb,
    pixels: int = MAX_PIXELS_PER_BATCH,
) -> Iterator[tuple[int, np.ndarray]]:
    """(index, posterior (K,)) of each image, in the order in which they are done; each is given at all test scales.

    Memory depends on `pixels`, those of the windows that are computed at once, and on the number of widths (the shorter sides, in steps
    of 16): the windows of one wait until they are worth a program, 12 MB at most. It does not depend on the number of images. The first
    image that is wider than tall takes a second copy of the convolutions' kernels. Raises InputError for an image that is smaller than
    the net's, or larger than `MAX_IMAGE_PIXELS`.
    """
    if pixels < 1:
        raise InputError(f"pixels is {pixels}: expected at least 1")
    maps_of, logits_of = jitted_stages(model, tuple(mean_rgb), protocol.ceil, mesh)
    placed = jax.device_put(dict(variables), replicated(mesh))
    parts: dict[int, list[Any]] = {}  # of each image that is not done, its windows' shares

    @functools.cache
    def net(turned: bool) -> dict[str, Any]:
        # Of hundreds of positions at once a turned FC kernel is no faster.
        return jax.device_put(
            pack_kernels(
                transpose_kernels(placed) if turned else placed, model.dtype, kinds=("conv",)
            ),
            replicated(mesh),
        )

    def all_windows() -> Iterator[Window]:
        for index, scales in enumerate(images):
            of_image = list(iter_windows(index, scales, model.image_size, protocol))
            parts[index] = [None] * len(of_image)
            yield from of_image

    for batch in pack_windows(
        all_windows(), model.config, ceil=protocol.ceil, pixels=pixels, devices=mesh.size
    ):
        maps = maps_of(net(batch.turned), **shard_batch(_films(batch), mesh))
        positions, ends = _positions(batch, model, protocol.ceil)
        logits = np.zeros((len(positions), model.num_classes))
        for start in range(0, len(positions), MAX_POSITIONS * mesh.size):
            some = positions[start : start + MAX_POSITIONS * mesh.size]
            filled = shard_batch(
                {"positions": np.pad(some, ((0, -len(some) % (POSITIONS * mesh.size)), (0, 0)))},
                mesh,
            )
            logits[start : start + len(some)] = logits_of(
                placed, maps, **filled, turned=batch.turned
            )[: len(some)]
        for (window, *_), scores in zip(batch.placed, np.split(logits, ends[:-1]), strict=True):
            posterior = (
                _softmax(scores).mean(0) if protocol.softmax_first else _softmax(scores.mean(0))
            )
            of_image = parts[window.image]
            of_image[window.number] = window.weight * posterior
            if not any(part is None for part in of_image):
                yield window.image, np.sum(parts.pop(window.image), 0)


def _films(batch: Batch) -> dict[str, np.ndarray]:
    """The films, and how many pixels of each of their rows are an image's."""
    images, widths = np.zeros((*batch.films, 3), np.uint8), np.zeros(batch.films[:2], np.int32)
    for window, film, row in batch.placed:
        h, w = window.pixels.shape[:2]
        images[film, row : row + h, :w] = window.pixels
        widths[film, row : row + h] = w
    return {"images": images, "widths": widths}


def _positions(batch: Batch, model: VGG, ceil: bool) -> tuple[np.ndarray, list[int]]:
    """The positions of all windows' score maps, int (P, 3) as `logits_at_positions` takes them, and the end of each window's."""
    unit = 2 ** (len(model.config.stages) - 1)
    found, ends = [], []
    for window, film, row in batch.placed:
        h, w = model.score_map_size(window.pixels.shape[0], window.pixels.shape[1], ceil)
        found += [(film, row // unit + 2 * y, 2 * x) for y in range(h) for x in range(w)]
        ends.append(len(found))
    return np.array(found, np.int32), ends


def _softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def resolve_protocol(
    protocol: EvalProtocol,
    scales: Sequence[int],
    model: VGG,
    metadata: Mapping[str, Any],
    path: Any,
) -> tuple[EvalProtocol, tuple[int, ...]]:
    """The protocol and the test scales for a net, `metadata` as `vgg_jax.load` gives it, with what was not said filled in.

    Raises InputError for a scale below the net's size, and for a net without fully connected layers.
    """
    if not metadata["top"]:
        raise InputError(
            f"{path} has no fully connected layers: expected a whole net; it gives features only"
        )
    if (
        protocol.flip is None and not metadata["flip"]
    ):  # as for digits: their mirror images are none
        protocol = dataclasses.replace(protocol, flip=False)
    scales = tuple(scales) or (metadata["preprocessing"]["scale"],)
    if min(scales) < model.image_size:
        raise InputError(
            f"scales is {scales}: expected at least the size of the net's images, {model.image_size}"
        )
    return protocol, scales


def class_posteriors(
    model: VGG,
    variables: Any,
    images: Sequence[np.ndarray] | Sequence[Sequence[np.ndarray]],
    **settings: Any,
) -> np.ndarray:
    """float64 (N, K): the class posteriors of images, uint8 RGB (H, W, 3) at a test scale each, or sequences of them, one for each scale.

    Settings are those of `iter_posteriors`. Raises InputError for an image that is smaller than the net's, or larger than `MAX_IMAGE_PIXELS`.
    """
    scaled = [
        [np.asarray(image)] if hasattr(image, "shape") else [*map(np.asarray, image)]
        for image in images
    ]
    mesh = settings.pop("mesh", None) or make_mesh(1, jax.devices()[:1])
    found = dict(iter_posteriors(model, variables, scaled, mesh=mesh, **settings))
    return np.array([found[index] for index in range(len(scaled))]).reshape(-1, model.num_classes)
