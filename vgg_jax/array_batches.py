"""Batches of images in memory, which the devices resize, crop and mirror. Without TensorFlow.

The host gathers the images of a batch, in an order that is a pure function of (seed, epoch). Every
draw is one of (seed, epoch, index), so a run resumes anywhere, on any number of devices.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from vgg_jax.arrays import ArraySource
from vgg_jax.colours import ColourMeasurements, from_sums, shift_components
from vgg_jax.configs.colours import ColourStatistics
from vgg_jax.configs.evaluation import MAX_IMAGE_PIXELS
from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError
from vgg_jax.preprocessing import resized_sides

Batch = dict[str, np.ndarray]

# Number that separates the keys of the augmentation from those of dropout, which are folded with
# the number of a step.
_AUGMENTATION = np.uint32(2**31 + 1)
IMAGES_PER_CALL = 64


def train_batches(
    source: ArraySource,
    config: TrainConfig,
    *,
    first_epoch: int = 0,
    first_batch: int = 0,
    rows: np.ndarray | None = None,
) -> Iterator[Batch]:
    """Makes the training batches of all epochs up to `config.epochs`.

    Args:
        source: The training images.
        config: Batch size, number of epochs and seed.
        first_epoch: Epoch to start in, counted from 0.
        first_batch: Batch of this epoch to start with, counted from 0.
        rows: Rows of each batch to make, int64 (n,), increasing; None for all.

    Yields:
        Batches with "pixels", uint8 (B, H, W, C), and "epoch" and "position", int32 (B,), for
        `crop_function`. "label", "mask" and "index" are as `vgg_jax.data.train_batches` makes them.
    """
    for epoch in range(first_epoch, config.epochs):
        order = epoch_order(source.size, config.seed, epoch)
        first = first_batch if epoch == first_epoch else 0
        for start in range(first * config.batch_size, source.size, config.batch_size):
            batch = _gather(source, order, start, config.batch_size, rows)
            epochs = np.full(len(batch["label"]), epoch, np.int32)
            yield batch | {"epoch": epochs, "position": batch["index"].astype(np.int32)}


def eval_batches(
    source: ArraySource, batch_size: int, rows: np.ndarray | None = None
) -> Iterator[Batch]:
    """Makes the batches of one pass over a source, in its own order.

    Args:
        source: The images.
        batch_size: Number of examples in a batch.
        rows: Rows of each batch to make, int64 (n,), increasing; None for all.

    Yields:
        Batches as those of `train_batches`, without "epoch" and "position".
    """
    order = np.arange(source.size)
    for start in range(0, source.size, batch_size):
        yield _gather(source, order, start, batch_size, rows)


def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch: a permutation of 0 … size - 1, int64, drawn from (seed, epoch)."""
    # RandomState's stream is frozen, and so is the hash of SeedSequence.
    bits = np.random.MT19937(np.random.SeedSequence([seed, epoch]))
    return np.random.RandomState(bits).permutation(size).astype(np.int64)


def _gather(
    source: ArraySource, order: np.ndarray, start: int, batch_size: int, rows: np.ndarray | None
) -> Batch:
    """The examples at some places of an order. Masked ones are black, with index -1."""
    positions = start + (np.arange(batch_size) if rows is None else rows)
    mask = positions < len(order)
    indices = source.indices[order[np.minimum(positions, len(order) - 1)]]
    pixels = source.images[indices]
    pixels[~mask] = 0
    return {
        "pixels": pixels,
        "label": np.where(mask, source.all_labels[indices], 0).astype(np.int32),
        "mask": mask,
        "index": np.where(mask, indices, -1),
    }


def crop_function(
    config: TrainConfig, statistics: ColourStatistics, sharding: Any = None
) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """Makes the function that crops and augments a batch on the devices (§3.1).

    Args:
        config: Scales, image size, crop, flip, colour shift and seed.
        statistics: Colours of the data set, for the colour shift.
        sharding: Sharding of the result.

    Returns:
        Maps a batch with "pixels", "label", "mask", "position" and perhaps "epoch" to one with
        "image" and "colour_shift". A batch without "epoch" gets the centre crop at the test scale.
        "key", if there is one, replaces `jax.random.key(config.seed)`, so that one program serves
        all seeds.
    """
    basis = shift_components(config.colour_convention, statistics)
    components = jnp.asarray(basis.T * config.colour_shift, jnp.float32)
    crop = partial(_crop, size=config.image_size)

    def augment(stream: Array, pixels: Array, epoch: Array, index: Array) -> tuple[Array, Array]:
        key = jax.random.fold_in(jax.random.fold_in(stream, epoch), index)
        scale_key, offset_key, flip_key, shift_key = jax.random.split(key, 4)
        scales = (config.scale[0], config.scale[-1])
        scale = jax.random.randint(scale_key, (), scales[0], scales[1] + 1)
        uniform = jax.random.uniform(offset_key, (2,))
        fractions = uniform if config.crop == "random" else jnp.full(2, 0.5)
        image = crop(pixels, scale, scales, fractions)
        if config.flip:
            image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
        alpha = jax.random.normal(shift_key, (3, 1))
        return image, (components * alpha).sum(0)

    def crop_batch(batch: dict[str, Array]) -> dict[str, Array]:
        pixels = batch["pixels"]
        if "epoch" in batch:
            key = batch["key"] if "key" in batch else jax.random.key(config.seed)
            draw = partial(augment, jax.random.fold_in(key, _AUGMENTATION))
            image, shift = jax.vmap(draw)(pixels, batch["epoch"], batch["position"])
        else:
            scale = config.test_scale
            centre = partial(
                crop, scale=jnp.int32(scale), scales=(scale, scale), fractions=jnp.full(2, 0.5)
            )
            image = jax.vmap(centre)(pixels)
            shift = jnp.zeros((len(pixels), 3))
        # Black images stay black.
        image = jnp.where(batch["mask"][:, None, None, None], image, jnp.uint8(0))
        labels = {name: batch[name] for name in ("label", "mask")}
        return labels | {"image": image, "colour_shift": shift}

    return jax.jit(crop_batch, out_shardings=sharding)


def _crop(
    pixels: Array,
    scale: Array,
    scales: tuple[int, int],
    fractions: Array,
    *,
    size: int,
) -> Array:
    """Resizes the shorter side of an image to `scale`, and crops a square.

    Args:
        pixels: The image, uint8 (H, W, C).
        scale: Length of the shorter side, int32, one of `scales`.
        scales: The smallest and the largest scale.
        fractions: Position of the crop along y and x, from 0 to 1, as in
            `vgg_jax.data.transforms.resize_and_crop`.
        size: Side of the crop.

    Returns:
        uint8 (size, size, 3).
    """
    sides = pixels.shape[:2]
    whole = [resized_sides(sides, s, "nearest") for s in range(scales[0], scales[1] + 1)]
    table = np.array(whole, np.int32)
    resized = jnp.asarray(table)[scale - scales[0]]
    last = resized - size
    offset = jnp.minimum(jnp.floor(fractions * (last + 1)).astype(jnp.int32), last)
    return resample(pixels, (size, size), resized / jnp.array(sides), -offset)


def resample(pixels: Array, sides: tuple[int, int], zoom: Array, translation: Array) -> Array:
    """Resamples an image, antialiased and bilinear.

    Args:
        pixels: The image, uint8 (H, W, C).
        sides: Height and width of the result.
        zoom: Factor along y and x, float (2,).
        translation: Shift of the zoomed image along y and x in pixels, float (2,).

    Returns:
        uint8 (height, width, 3).
    """
    image = jax.image.scale_and_translate(
        pixels.astype(jnp.float32),
        (*sides, pixels.shape[-1]),
        (0, 1),
        zoom.astype(jnp.float32),
        translation.astype(jnp.float32),
        "linear",
    )
    # Halves are rounded up, also those that rounding errors put just below a half. The conversion
    # alone would round again where it is fused with a product of YNN (docs/performance.md#ynn).
    levels = jnp.floor(image + (0.5 + 2**-10)).astype(jnp.uint8)
    return jnp.broadcast_to(levels, (*sides, 3))


def rescaled_images(
    source: ArraySource, scales: tuple[int, ...], rounding: str = "nearest"
) -> Iterator[dict[str, Any]]:
    """Resizes the shorter side of each image to each scale, in the order of the source.

    Args:
        source: The images.
        scales: Lengths of the shorter side.
        rounding: One of `ROUNDINGS`, for the longer side.

    Yields:
        Batches of one image, as those of `vgg_jax.data.rescaled_images`.

    Raises:
        InputError: An image would have too many pixels.
    """
    sides = source.images.shape[1], source.images.shape[2]
    resizers = []
    for scale in scales:
        target = resized_sides(sides, scale, rounding)
        if target[0] * target[1] > MAX_IMAGE_PIXELS:
            raise InputError(
                f"images of {sides[0]}x{sides[1]} pixels have more than {MAX_IMAGE_PIXELS:,} "
                f"pixels at the test scale {scale}: pass a smaller one"
            )
        zoom = jnp.array(target) / jnp.array(sides)
        resize = partial(resample, sides=target, zoom=zoom, translation=jnp.zeros(2))
        resizers.append(jax.jit(jax.vmap(resize)))
    for start in range(0, source.size, IMAGES_PER_CALL):
        indices = source.indices[start : start + IMAGES_PER_CALL]
        # Full calls have one shape, so each scale is compiled once or twice.
        scaled = [np.asarray(resize(source.images[indices])) for resize in resizers]
        for i, index in enumerate(indices):
            yield {
                "scaled": tuple(images[i : i + 1] for images in scaled),
                "label": source.all_labels[index : index + 1],
                "index": np.array([index]),
            }


def measure_colours(source: ArraySource) -> ColourMeasurements:
    """Measures the colours of all images of a source, as `vgg_jax.data.measure_colours` does.

    Args:
        source: The images.

    Returns:
        The measurements.
    """
    sums = np.zeros((5, 3, 3))
    height, width, channels = source.images.shape[1:]
    num_pixels = height * width
    for start in range(0, source.size, IMAGES_PER_CALL):
        images = source.images[source.indices[start : start + IMAGES_PER_CALL]]
        pixels = images.reshape(len(images), num_pixels, channels).astype(np.float64)
        pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
        total, products = pixels.sum(1), np.einsum("npi,npj->nij", pixels, pixels)
        mean = total / num_pixels
        variance = np.einsum("nii->ni", products) / num_pixels - mean**2
        sums[0] += len(images) * num_pixels
        sums[1] += total.sum(0)
        sums[2] += products.sum(0)
        sums[3] += mean.sum(0)
        sums[4] += np.sqrt(np.maximum(variance, 0)).sum(0)
    return from_sums(sums, source.size)
