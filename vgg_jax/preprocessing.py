"""From image files, PIL images and arrays to the input of a net, without TensorFlow.

The pixels are those of the evaluation (`vgg_jax.data`), to one level in 256. Resized images
differ in one value of 20,000 (docs/performance.md#resampling).
"""

import io
import numbers
import os
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from vgg_jax.configs.evaluation import MAX_IMAGE_PIXELS, check_rounding
from vgg_jax.errors import DataError, InputError, install_hint, single_line
from vgg_jax.exif import (
    EXIF_MARKER,
    file_orientation,
    find_exif,
    read_orientation,
    tiff_orientation,
)
from vgg_jax.paths import is_store_error, to_path

if TYPE_CHECKING:
    from jax import Array
    from PIL.Image import Image as PILImage

    ImageInput = str | os.PathLike[str] | PILImage | np.ndarray | Array

AnyArray = TypeVar("AnyArray", np.ndarray, "Array")

# Pillow has the same limit. A file of a few kilobytes can decode to gigabytes of pixels.
MAX_DECODED_PIXELS = 178_956_970


_FIELDS = ("mean_rgb", "image_size", "scale", "exif")  # of the metadata


def preprocess(
    images: "ImageInput | Sequence[ImageInput]", metadata: Mapping[str, Any]
) -> np.ndarray:
    """Turns images of any size into the input of a net.

    The shorter side is resized to `scale`. The centre is cropped to `image_size`, and the mean is
    subtracted. `metadata["preprocessing"]` has these values, and says in `rounding` whose centre
    crop it is: torchvision's and timm's, or that of this library (`nearest`).

    A grey image gets three equal channels, and an alpha channel is dropped. Of 16 bits, the high
    8 are kept.

    An image is turned upright by its EXIF orientation, if the metadata's `exif` is true. A PIL
    image is turned as its file would be, unless `ImageOps.exif_transpose` has turned it already.
    A PIL image of a TIFF is always upright, because Pillow turns it.

    Args:
        images: One image or a list. An image is the path of a file, a PIL image, or a uint8 RGB
            array (H, W, 3). A single array may be a batch (N, H, W, 3). Arrays of floats, of grey
            pixels or with alpha are refused.
        metadata: The metadata of the net, as `vgg_jax.load` returns them.

    Returns:
        float32 (N, image_size, image_size, 3): RGB on the 0-255 scale, less the mean.

    Raises:
        InputError: An array has another type or shape, or the metadata lack a field or are those
            of a net that does not read RGB images.
        DataError: A file cannot be read, or an image cannot be decoded.
    """
    settings = _check_settings(metadata)
    size, scale, exif = (settings[name] for name in ("image_size", "scale", "exif"))
    items = _as_list(images)
    crops = np.empty((len(items), size, size, 3), np.uint8)
    for number, image in enumerate(items):
        pixels = _to_pixels(image, f"image {number}", exif)
        crops[number] = _resize_and_crop_centre(pixels, scale, size, settings["rounding"])
    return subtract_mean(crops, settings["mean_rgb"])


def subtract_mean(
    images: AnyArray, mean_rgb: tuple[float, ...], colour_shift: AnyArray | None = None
) -> AnyArray:
    """Subtracts the mean RGB value (§2.1) and adds a colour shift to each image (§3.1).

    Args:
        images: uint8 (N, H, W, 3), of numpy or jax; or (N, H, W, C) for a net with other channels.
        mean_rgb: Mean of each channel of the training images, on the 0-255 scale.
        colour_shift: Shift (N, 3) of each image's colour, on the same scale; None for no shift.

    Returns:
        float32 of the shape of the images, the input of a net.

    Raises:
        InputError: There is not one mean for each channel.
    """
    if images.shape[-1] != len(mean_rgb):
        raise InputError(
            f"the images have {images.shape[-1]} channels and the net's mean {len(mean_rgb)}: "
            "expected images with the channels of the net"
        )
    images = images.astype(np.float32) - np.array(mean_rgb, np.float32)[None, None, None]
    return images if colour_shift is None else images + colour_shift[:, None, None, :]


def load_resized(
    path: str | os.PathLike[str], scales: Sequence[int], exif: bool, rounding: str = "nearest"
) -> list[np.ndarray]:
    """Loads an image file at some test scales.

    Args:
        path: Path of the file.
        scales: Lengths of the shorter side.
        exif: Turn and mirror an image as its EXIF orientation says.
        rounding: One of `ROUNDINGS`.

    Returns:
        RGB pixels at each scale, uint8 (H, W, 3).

    Raises:
        DataError: The file cannot be read or decoded, or has more than `MAX_IMAGE_PIXELS` pixels
            at a scale.
    """
    pixels = _load(path, exif)
    resized = []
    for scale in scales:
        height, width = resized_sides(pixels.shape[:2], scale, rounding)
        if height * width > MAX_IMAGE_PIXELS:
            raise DataError(
                f"cannot decode {os.fspath(path)!r}: "
                f"at the test scale it has more than {MAX_IMAGE_PIXELS:,} pixels"
            )
        resized.append(_resample(pixels, (height, width), (0, 0, *pixels.shape[:2])))
    return resized


def decode_by_pillow(encoded: bytes) -> np.ndarray:
    """Decodes an image file without regard to its EXIF orientation.

    Args:
        encoded: Content of the file.

    Returns:
        RGB pixels as the file stores them, uint8 (H, W, 3).

    Raises:
        ValueError: The image cannot be decoded, or has more than `MAX_DECODED_PIXELS` pixels.
    """
    from PIL import Image

    if encoded.startswith(b"\xff\xd8\xff"):
        # Without its marker, Pillow does not read the EXIF: it would warn if it is damaged.
        stop = find_exif(encoded).stop
        encoded = encoded[:stop].replace(EXIF_MARKER, bytes(6)) + encoded[stop:]
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            # Pillow turns each TIFF upright.
            orientation = tiff_orientation(image) if image.format == "TIFF" else 1
            return _turn_back(_rgb_pixels(image), orientation)
    except Image.UnidentifiedImageError as error:
        raise ValueError("not an image that Pillow can decode") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"it has more than {MAX_DECODED_PIXELS:,} pixels") from error
    except (OSError, SyntaxError, EOFError, struct.error, TypeError) as error:
        raise ValueError(single_line(error)) from error


def _check_settings(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns `metadata["preprocessing"]`, whose fields are all present, with a `rounding`."""
    if not isinstance(metadata, Mapping):
        raise InputError(
            f"the metadata are a {type(metadata).__name__}: expected the dict that vgg_jax.load "
            "returns; the order is preprocess(images, metadata)"
        )
    settings: Mapping[str, Any] = metadata.get("preprocessing", {})
    missing = [name for name in _FIELDS if name not in settings]
    if missing:
        raise InputError(
            f"the metadata's preprocessing has no {', '.join(missing)}: "
            "expected the metadata that vgg_jax.load returns"
        )
    if len(settings["mean_rgb"]) != 3:
        raise InputError(
            f"the metadata's mean_rgb has {len(settings['mean_rgb'])} values: expected 3, because "
            "the pixels are RGB; prepare images of other channels yourself"
        )
    if not isinstance(settings["scale"], numbers.Real):
        raise InputError(
            f"the metadata's scale is {settings['scale']!r}: expected the length of the shorter "
            "side in pixels, as vgg_jax.load returns it"
        )
    if settings["scale"] < settings["image_size"]:
        raise InputError(
            f"the metadata's scale is {settings['scale']}: "
            f"expected at least the size of the net's images, {settings['image_size']}"
        )
    settings = {"rounding": "nearest"} | dict(settings)  # metadata of older releases lack it
    check_rounding(settings["rounding"])
    return settings


def _as_list(images: Any) -> list[Any]:
    """Lists the images of a batch or a sequence. One image becomes a list of one."""
    from PIL import Image

    if isinstance(images, (str, os.PathLike, Image.Image)):
        return [images]
    if hasattr(images, "shape"):
        array = np.asarray(images)
        return list(array) if array.ndim == 4 else [array]
    try:
        return list(images)
    except TypeError as error:
        raise InputError(_unexpected("images", images)) from error


def _unexpected(name: str, image: Any) -> str:
    return (
        f"{name} is a {type(image).__name__}: "
        "expected the path of a file, a PIL image, or a uint8 RGB array (H, W, 3)"
    )


def _to_pixels(image: Any, name: str, exif: bool) -> np.ndarray:
    """Reads one image. Returns upright RGB pixels, uint8 (H, W, 3)."""
    from PIL import Image

    if isinstance(image, (str, os.PathLike)):
        return _load(image, exif)
    if isinstance(image, Image.Image):
        try:
            pixels = _rgb_pixels(image)
        except (OSError, SyntaxError, EOFError, struct.error, ValueError) as error:
            raise DataError(f"cannot decode {name}: {single_line(error)}") from error
        orientation = read_orientation(image.info.get("exif", b"")) if exif else 1
        return _turn_upright(pixels, orientation)
    if not hasattr(image, "shape"):
        raise InputError(_unexpected(name, image))
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(
            f"{name} is {array.dtype} {array.shape}: expected uint8 RGB (H, W, 3), "
            "on the 0-255 scale, the mean not subtracted"
        )
    return array


def _load(path: str | os.PathLike[str], exif: bool) -> np.ndarray:
    """Reads and decodes a file. Returns RGB pixels, uint8 (H, W, 3), upright if `exif`."""
    name = os.fspath(path)
    try:
        encoded = to_path(path).read_bytes()
    except ImportError as error:  # of a library that reaches the object store
        raise DataError(f"cannot read {name!r} ({error}): {install_hint('train')}") from error
    except Exception as error:
        if not (isinstance(error, (OSError, ValueError)) or is_store_error(error)):
            raise
        reason = getattr(error, "strerror", None) or single_line(error)
        raise DataError(f"cannot read {name!r}: {reason}") from error
    orientation = file_orientation(encoded) if exif else 1
    try:
        return _turn_upright(decode_by_pillow(encoded), orientation)
    except ValueError as error:
        raise DataError(f"cannot decode {name!r}: {error}") from error


def _rgb_pixels(image: "PILImage") -> np.ndarray:
    """Converts a PIL image as TensorFlow does. Returns stored pixels, uint8 (H, W, 3)."""
    if image.width * image.height > MAX_DECODED_PIXELS:
        raise ValueError(f"it has more than {MAX_DECODED_PIXELS:,} pixels")
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, -1)
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits (mode {image.mode}): expected 8 or 16")
    if image.mode == "CMYK":
        inks = np.asarray(image)
        # Pillow inverts each JPEG, as Adobe's files need it.
        inverted = image.format == "JPEG" and "adobe" not in image.info
        light = (inks if inverted else 255 - inks).astype(np.uint16)
        return (light[..., :3] * light[..., 3:] // 255).astype(np.uint8)
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns if it loses the alpha of a palette
    return np.asarray(image.convert("RGB"))


def _turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors stored pixels (H, W, 3) of an EXIF orientation."""
    pixels = pixels.swapaxes(0, 1) if orientation >= 5 else pixels
    pixels = pixels[::-1] if orientation in (3, 4, 7, 8) else pixels
    return pixels[:, ::-1] if orientation in (2, 3, 6, 7) else pixels


def _turn_back(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes `_turn_upright`: quarter turns undo each other, the others themselves."""
    return _turn_upright(pixels, {6: 8, 8: 6}.get(orientation, orientation))


def resized_sides(sides: Sequence[int], scale: int, rounding: str) -> tuple[int, int]:
    """Computes height and width of an image whose shorter side becomes `scale`.

    Args:
        sides: Height and width of the image.
        scale: Length of the shorter side.
        rounding: One of `ROUNDINGS`, for the longer side.

    Returns:
        Height and width.
    """
    # As torchvision's `_compute_resized_output_size` does.
    to_int = int if rounding == "torchvision" else round
    height, width = (to_int(side * scale / min(sides)) for side in sides)
    return height, width


def centre_offset(side: int, size: int, rounding: str) -> int:
    """Computes the first pixel of a centre crop.

    Args:
        side: Side of the image.
        size: Side of the crop.
        rounding: One of `ROUNDINGS`, for an odd margin.

    Returns:
        The offset from the start of the side.
    """
    if rounding == "torchvision":  # Python's `round` gives the even integer, as in `center_crop`
        return round((side - size) / 2)
    return (side - size + 1) // 2


def _resize_and_crop_centre(pixels: np.ndarray, scale: int, size: int, rounding: str) -> np.ndarray:
    """Resizes the shorter side to `scale` and crops the centre. Returns uint8 (size, size, 3).

    Only the pixels of the crop are resampled: a line of pixels would become gigabytes.
    """
    first, stop = [], []  # of the crop along y and x, in source pixels
    sides = pixels.shape[:2]
    for side, resized in zip(sides, resized_sides(sides, scale, rounding), strict=True):
        offset = centre_offset(resized, size, rounding)
        first.append(offset * side / resized)
        stop.append((offset + size) * side / resized)
    return _resample(pixels, (size, size), (*first, *stop))


def _resample(pixels: np.ndarray, sides: tuple[int, int], window: tuple[float, ...]) -> np.ndarray:
    """Resamples a window of an image, antialiased and bilinear.

    Args:
        pixels: The image, uint8 (H, W, 3). The filter reaches its pixels around the window too.
        sides: Height and width of the result.
        window: Top, left, bottom and right of the window, in pixels of the image.

    Returns:
        uint8 (height, width, 3).
    """
    from PIL import Image

    top, left, bottom, right = window
    result = np.empty((*sides, 3), np.uint8)
    for channel in range(3):
        # In floats. With 8 bits, Pillow rounds twice, and one value in six is another level.
        image = Image.fromarray(np.ascontiguousarray(pixels[..., channel])).convert("F")
        resized = image.resize(
            (sides[1], sides[0]), Image.Resampling.BILINEAR, (left, top, right, bottom)
        )
        # Halves are rounded up, also those that rounding errors put just below a half.
        result[..., channel] = np.asarray(resized) + np.float32(0.5 + 2**-10)
    return result
