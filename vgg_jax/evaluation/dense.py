"""Class posteriors from dense score maps, from crops, or from both (§3.2).

Everything evaluated is a window: a whole rescaled image, a crop of it, or the mirror image of
either. Windows of any size share canvases up to the last pooling. From there on, each position of
their score maps is computed as a small map of its own. This module reads no files and never
imports TensorFlow.
"""

import contextlib
import dataclasses
import functools
import math
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
from vgg_jax.inference import MAX_QUICK_IMAGES, fastest_model, pack_kernels, quick_model
from vgg_jax.model import VGG, transpose_kernels
from vgg_jax.preprocessing import centre_offset, subtract_mean
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.runtime.progress import waiting_line

# Positions of score maps that are computed together, per device. They are padded to a multiple of
# the step, so that few shapes are compiled. The maximum bounds the memory, because neighbouring
# positions read overlapping activations (docs/performance.md#score-map-positions).
POSITIONS_STEP = 16
MAX_POSITIONS = 256

# Up to this number of images, it pays to compile with fewer optimisations.
FEW_IMAGES = 16
# Most pixels of canvases for which a program that compiles quickly is worth its slower run: two
# photos and their mirror images at Q = 256 (docs/performance.md#first-answer).
MAX_QUICK_PIXELS = 400_000

# Crops along each side of an image, by protocol.
_CROPS_PER_SIDE = {"center": 0, "ten-crop": 2, "multi-crop": 5, "both": 5}


def trunk_activations(
    variables: Any,
    images: Array,
    widths: Array,
    *,
    model: VGG,
    mean_rgb: tuple[float, float, float],
    ceil: bool,
) -> Array:
    """Computes the input of the last pooling for canvases that hold several windows.

    Args:
        variables: The variables of the model.
        images: Canvases, uint8 (N, H, W, 3).
        widths: Number of valid pixels in each row, int (N, H). The others are padding.
        model: The net.
        mean_rgb: Mean that is subtracted from the pixels.
        ceil: True if poolings round an odd side up.

    Returns:
        Activations (N, h, w, C).
    """
    valid_mask = jnp.arange(images.shape[2])[None, None] < widths[:, :, None]
    activations: Any = model.apply(
        variables, subtract_mean(images, mean_rgb), valid_mask, ceil, method="trunk"
    )
    return activations


def logits_at_positions(
    variables: Any, activations: Array, positions: Array, transposed: Array, *, model: VGG
) -> Array:
    """Computes the logits at positions of score maps.

    Args:
        variables: The variables of the model.
        activations: The result of `trunk_activations`, (N, h, w, C).
        positions: The canvas, first row and first column that each position reads, int (P, 3).
        transposed: True if the windows are transposed, bool ().
        model: The net.

    Returns:
        Logits (P, K), at least float32.
    """
    side = 2 * (model.image_size // 2 ** len(model.config.stages))
    canvas, row, column = (positions[:, i, None, None] for i in range(3))
    row, column = row + jnp.arange(side)[None, :, None], column + jnp.arange(side)[None, None]
    # A pooling that rounds up reads a row or column past the end. A zero there changes no maximum,
    # because no activation is negative after the ReLU.
    crops = activations.at[canvas, row, column].get(mode="fill", fill_value=0)
    crops = jnp.where(transposed, crops.swapaxes(1, 2), crops)
    logits: Any = model.apply(variables, crops, method="head")
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


@functools.lru_cache(maxsize=8)
def jitted_stages(
    model: VGG,
    mean_rgb: tuple[float, float, float],
    ceil: bool,
    mesh: jax.sharding.Mesh,
    optimize_runtime: bool,
) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """Jits `trunk_activations` and `logits_at_positions`.

    Equal arguments get the same two functions, so that compiled programs are reused.

    Args:
        model: The net.
        mean_rgb: Mean that is subtracted from the pixels.
        ceil: True if poolings round an odd side up.
        mesh: The devices. Results are replicated over them.
        optimize_runtime: As for `compiler_options`.

    Returns:
        The two jitted functions, without the arguments given here.
    """
    options: Any = {
        "compiler_options": compiler_options(optimize_runtime, model.dtype),
        "out_shardings": replicated(mesh),
    }
    trunk = functools.partial(trunk_activations, model=model, mean_rgb=mean_rgb, ceil=ceil)
    head = functools.partial(logits_at_positions, model=model)
    return jax.jit(trunk, **options), jax.jit(head, **options)


def iter_windows(
    index: int, images: Sequence[np.ndarray], crop_size: int, protocol: EvalProtocol
) -> Iterator[Window]:
    """Cuts the windows of one image.

    Args:
        index: Index of the image.
        images: The image, rescaled to each test scale, uint8 (H, W, 3).
        crop_size: Side of a crop, which is the side of the net's training images.
        protocol: The evaluation protocol.

    Yields:
        The windows, none of them wider than tall. Their weights add up to 1.

    Raises:
        InputError: There is no image, or one has the wrong type, shape or size.
    """
    number = 0
    for part, weight in _iter_parts(index, images, crop_size, protocol):
        versions = [part, part[:, ::-1]] if protocol.use_flip else [part]
        for pixels in versions:
            h, w = pixels.shape[:2]
            transposed = w > h
            upright = pixels.swapaxes(0, 1) if transposed else pixels
            yield Window(index, number, weight / len(versions), upright, transposed)
            number += 1


def _iter_parts(
    index: int, images: Sequence[np.ndarray], crop_size: int, protocol: EvalProtocol
) -> Iterator[tuple[np.ndarray, float]]:
    """Yields the whole images and crops that the protocol asks for, and the weight of each."""
    if not images:
        raise InputError(f"image {index} has no rescaled version: expected at least one array")
    weight = (0.5 if protocol.name == "both" else 1.0) / len(images)
    for image in images:
        _check_image(index, image, crop_size, protocol)
        if protocol.name in ("dense", "both"):
            yield image, weight
        if protocol.name != "dense":
            corners = _crop_corners(image, crop_size, protocol)
            # Crops coincide if a side equals the crop's.
            for (y, x), times in Counter(corners).items():
                crop = image[y : y + crop_size, x : x + crop_size]
                yield crop, weight * times / len(corners)


def _check_image(index: int, image: np.ndarray, crop_size: int, protocol: EvalProtocol) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise InputError(
            f"image {index} is {image.dtype} {image.shape}: "
            "expected uint8 RGB, (H, W, 3), the mean not subtracted"
        )
    h, w = image.shape[:2]
    if h * w > MAX_IMAGE_PIXELS and protocol.name in ("dense", "both"):
        raise InputError(
            f"image {index} is {h}x{w} at its test scale: "
            f"expected at most {MAX_IMAGE_PIXELS:,} pixels; crop it, or leave it out"
        )
    if min(h, w) < crop_size:
        raise InputError(
            f"image {index} is {h}x{w}: expected both sides to be at least the net's, "
            f"{crop_size}; pass larger test scales"
        )


def _crop_corners(
    image: np.ndarray, crop_size: int, protocol: EvalProtocol
) -> list[tuple[int, int]]:
    """Returns the upper left corners (y, x) of all crops of an image."""
    h, w = image.shape[:2]
    count = _CROPS_PER_SIDE[protocol.name]
    rows, columns = crop_offsets(h, crop_size, count), crop_offsets(w, crop_size, count)
    corners = [(y, x) for y in rows for x in columns]
    if protocol.name in ("center", "ten-crop"):
        y, x = (centre_offset(side, crop_size, protocol.rounding) for side in (h, w))
        corners.append((y, x))
    return corners


def crop_offsets(side: int, crop_size: int, count: int) -> tuple[int, ...]:
    """Computes evenly spaced offsets of crops along a side, from first to last (§3.2).

    `crop_offsets(256, 224, 5)` is (0, 8, 16, 24, 32).

    Args:
        side: Side of the image.
        crop_size: Side of the crop.
        count: Number of offsets.

    Returns:
        The offsets, in increasing order.

    Raises:
        InputError: The crop does not fit.
    """
    if crop_size > side:
        raise InputError(
            f"the crop is {crop_size} pixels and the image side {side}: "
            "expected at most the side; pass a larger test scale"
        )
    return tuple(int(offset) for offset in np.round(np.linspace(0, side - crop_size, count)))


def iter_posteriors(
    model: VGG,
    variables: Any,
    images: Iterable[Sequence[np.ndarray]],
    *,
    mesh: jax.sharding.Mesh,
    protocol: EvalProtocol = DENSE,
    mean_rgb: tuple[float, float, float] = IMAGENET.mean_rgb,
    pixels: int = MAX_PIXELS_PER_BATCH,
    num_images: int | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Computes the class posteriors of a stream of images.

    The memory does not depend on the number of images. It depends on `pixels` and on the number of
    different widths: the windows of each width wait until they fill a batch
    (docs/performance.md#canvas-shapes). The first image that is wider than tall adds a second copy
    of the convolutions' kernels.

    Args:
        model: The net.
        variables: Its variables.
        images: Each image as a sequence of arrays, one per test scale, uint8 RGB (H, W, 3).
        mesh: The devices to compute on.
        protocol: The evaluation protocol.
        mean_rgb: Mean that is subtracted from the pixels.
        pixels: Most pixels of the windows that are computed at once.
        num_images: Number of the images, if it is known. A few of them are computed by programs
            that compile sooner (docs/performance.md#first-answer).

    Yields:
        `(index, posterior)` of each image as soon as it is done; the posterior is float64 (K,).

    Raises:
        InputError: An image is smaller than the net's, or larger than `MAX_IMAGE_PIXELS`, or
            `pixels` is not positive.
    """
    if pixels < 1:
        raise InputError(f"pixels is {pixels}: expected at least 1")
    model = fastest_model(model)
    stages = functools.partial(
        jitted_stages, mean_rgb=tuple(mean_rgb), ceil=protocol.ceil, mesh=mesh
    )
    _, head = stages(model, optimize_runtime=not _is_at_most(num_images, FEW_IMAGES))
    head_variables = jax.device_put(dict(variables), replicated(mesh))
    run_trunk = _trunk_runner(model, head_variables, stages, mesh, num_images)
    # Weighted posteriors of the windows of each image that is not done yet.
    pending: dict[int, list[Any]] = {}

    def all_windows() -> Iterator[Window]:
        for index, scaled_images in enumerate(images):
            windows = list(iter_windows(index, scaled_images, model.image_size, protocol))
            pending[index] = [None] * len(windows)
            yield from windows

    # Only before the first batch: a progress bar may follow.
    compiling: Any = waiting_line("compiling the network", quiet=jax.process_index() > 0)
    for batch in pack_windows(
        all_windows(), model.config, ceil=protocol.ceil, pixels=pixels, devices=mesh.size
    ):
        with compiling:
            activations = run_trunk(batch)
        compiling = contextlib.nullcontext()
        positions, ends = _score_map_positions(batch, model, protocol.ceil)
        logits = np.zeros((len(positions), model.num_classes))
        for start in range(0, len(positions), MAX_POSITIONS * mesh.size):
            chunk = positions[start : start + MAX_POSITIONS * mesh.size]
            padding = -len(chunk) % (POSITIONS_STEP * mesh.size)
            padded = shard_batch({"positions": np.pad(chunk, ((0, padding), (0, 0)))}, mesh)
            outputs = head(head_variables, activations, **padded, transposed=batch.transposed)
            logits[start : start + len(chunk)] = outputs[: len(chunk)]
        window_logits = np.split(logits, ends[:-1])
        for (window, *_), scores in zip(batch.placements, window_logits, strict=True):
            posteriors = pending[window.image]
            posteriors[window.number] = window.weight * _mean_posterior(scores, protocol)
            if all(posterior is not None for posterior in posteriors):
                yield window.image, np.sum(pending.pop(window.image), 0)


def _is_at_most(num_images: int | None, limit: int) -> bool:
    return num_images is not None and num_images <= limit


def _trunk_runner(
    model: VGG,
    variables: dict[str, Any],
    stages: Callable[..., tuple[Callable[..., Array], Callable[..., Array]]],
    mesh: jax.sharding.Mesh,
    num_images: int | None,
) -> Callable[[Batch], Array]:
    """Makes a function that computes the trunk of a batch.

    The kernels are transposed and packed once, when the first batch needs them. Small batches of
    at most `MAX_QUICK_IMAGES` images are computed by a program that compiles quickly, from kernels
    that are not packed.
    """
    trunk, _ = stages(model, optimize_runtime=not _is_at_most(num_images, FEW_IMAGES))
    quick_trunk = None
    if _is_at_most(num_images, MAX_QUICK_IMAGES):
        quick_trunk, _ = stages(quick_model(model), optimize_runtime=False)

    @functools.cache
    def oriented(transposed: bool) -> dict[str, Any]:
        if not transposed:
            return variables
        return jax.device_put(transpose_kernels(variables), replicated(mesh))

    @functools.cache
    def packed(transposed: bool) -> dict[str, Any]:
        # Packed FC kernels are no faster for hundreds of positions at once.
        kernels = pack_kernels(oriented(transposed), model.dtype, kinds=("conv",))
        return jax.device_put(kernels, replicated(mesh))

    def run(batch: Batch) -> Array:
        canvases = shard_batch(_paint_canvases(batch), mesh)
        if quick_trunk is not None and math.prod(batch.shape) <= MAX_QUICK_PIXELS:
            return quick_trunk(oriented(batch.transposed), **canvases)
        return trunk(packed(batch.transposed), **canvases)

    return run


def _paint_canvases(batch: Batch) -> dict[str, np.ndarray]:
    """Copies the windows into canvases, and counts the valid pixels of each row."""
    images = np.zeros((*batch.shape, 3), np.uint8)
    widths = np.zeros(batch.shape[:2], np.int32)
    for window, canvas, row in batch.placements:
        h, w = window.pixels.shape[:2]
        images[canvas, row : row + h, :w] = window.pixels
        widths[canvas, row : row + h] = w
    return {"images": images, "widths": widths}


def _score_map_positions(batch: Batch, model: VGG, ceil: bool) -> tuple[np.ndarray, list[int]]:
    """Lists the positions of all windows' score maps, for `logits_at_positions`.

    Returns:
        The positions, int32 (P, 3), and the end index of each window's positions.
    """
    trunk_stride = 2 ** (len(model.config.stages) - 1)
    positions: list[tuple[int, int, int]] = []
    ends = []
    for window, canvas, row in batch.placements:
        h, w = model.score_map_size(window.pixels.shape[0], window.pixels.shape[1], ceil)
        first_row = row // trunk_stride
        positions += [(canvas, first_row + 2 * y, 2 * x) for y in range(h) for x in range(w)]
        ends.append(len(positions))
    return np.array(positions, np.int32), ends


def _mean_posterior(scores: np.ndarray, protocol: EvalProtocol) -> np.ndarray:
    """Averages the score map (P, K) of a window into a posterior (K,)."""
    return _softmax(scores).mean(0) if protocol.softmax_first else _softmax(scores.mean(0))


def _softmax(scores: np.ndarray) -> np.ndarray:
    exps = np.exp(scores - scores.max(-1, keepdims=True))
    return exps / exps.sum(-1, keepdims=True)


def resolve_protocol(
    protocol: EvalProtocol,
    scales: Sequence[int],
    model: VGG,
    metadata: Mapping[str, Any],
    path: Any,
) -> tuple[EvalProtocol, tuple[int, ...]]:
    """Fills in the test scales, and the net's own mirror images and rounding in the protocol.

    Args:
        protocol: The evaluation protocol.
        scales: Test scales; empty for the one in the metadata.
        model: The net.
        metadata: Its metadata, as `vgg_jax.load` returns them.
        path: Origin of the net, for messages.

    Returns:
        The protocol and the test scales.

    Raises:
        InputError: A scale is below the size of the net's images, or the net has no fully connected
            layers.
    """
    if not metadata["top"]:
        raise InputError(
            f"{path} has no fully connected layers: expected a whole net; it gives features only"
        )
    # Some data has no meaningful mirror images: digits, for example.
    if protocol.flip is None and not metadata["flip"]:
        protocol = dataclasses.replace(protocol, flip=False)
    rounding = metadata["preprocessing"].get("rounding", protocol.rounding)
    protocol = dataclasses.replace(protocol, rounding=rounding)
    scales = tuple(scales) or (metadata["preprocessing"]["scale"],)
    if min(scales) < model.image_size:
        raise InputError(
            f"scales is {scales}: "
            f"expected at least the size of the net's images, {model.image_size}"
        )
    return protocol, scales


def class_posteriors(
    model: VGG,
    variables: Any,
    images: Sequence[np.ndarray] | Sequence[Sequence[np.ndarray]],
    **settings: Any,
) -> np.ndarray:
    """Computes the class posteriors of images in memory.

    Args:
        model: The net.
        variables: Its variables.
        images: uint8 RGB arrays (H, W, 3), each at its test scale; or sequences of them, one array
            per test scale.
        **settings: Keyword arguments of `iter_posteriors`. The mesh is the first device by default.

    Returns:
        Posteriors, float64 (N, K).

    Raises:
        InputError: As `iter_posteriors` does.
    """
    scaled_images = [
        [np.asarray(image)] if hasattr(image, "shape") else [*map(np.asarray, image)]
        for image in images
    ]
    mesh = settings.pop("mesh", None) or make_mesh(1, jax.devices()[:1])
    posteriors = dict(iter_posteriors(model, variables, scaled_images, mesh=mesh, **settings))
    ordered = [posteriors[index] for index in range(len(scaled_images))]
    return np.array(ordered).reshape(-1, model.num_classes)
