"""Reads photos as `vgg-jax predict` does, for the programs beside it, without vgg_jax.

It needs NumPy and Pillow.
"""

import json
import sys

import numpy as np
from PIL import Image, ImageOps


def read_views(path, metadata):
    """Reads the images whose mean posterior is the answer for a photo.

    Args:
        path: Path of the photo.
        metadata: The metadata of an exported file.

    Returns:
        Input of the file, (1, H, W, 3). For logits, the centre crop, as in
        `vgg-jax predict --protocol center`. For posteriors, the whole photo and its mirror image,
        as in `vgg-jax predict`.

    Raises:
        OSError, SyntaxError or ValueError: The photo cannot be read.
    """
    if metadata["channels"] != "RGB" or metadata["output"] == "score_map":
        sys.exit("expected a net for RGB images, exported with the output logits or posteriors")
    with Image.open(path) as file:
        photo = to_rgb(file, metadata.get("exif", True))
    as_torchvision = metadata.get("rounding") == "torchvision"
    to_int = int if as_torchvision else round
    sides = [to_int(side * metadata["scale"] / min(photo.size)) for side in photo.size]
    # In floats: with 8 bits, Pillow rounds twice. Halves are rounded up.
    channels = [channel.convert("F") for channel in photo.split()]
    resized = [channel.resize(sides, Image.Resampling.BILINEAR) for channel in channels]
    pixels = np.uint8(np.stack(resized, -1) + np.float32(0.5 + 2**-10))[None]
    if metadata["output"] == "logits":
        size = metadata["image_size"]
        margins = [side - size for side in pixels.shape[1:3]]
        top, left = (round(m / 2) if as_torchvision else (m + 1) // 2 for m in margins)
        views = [pixels[:, top : top + size, left : left + size]]
    else:
        views = [pixels, pixels[:, :, ::-1]] if metadata["flip"] else [pixels]
    if metadata["input"].startswith("uint8"):
        return views
    return [np.float32(view) - np.float32(metadata["mean_rgb"]) for view in views]


def to_rgb(photo, exif):
    """Turns a photo upright if `exif`, and converts it to 8-bit RGB as `vgg-jax predict` does."""
    # Pillow inverts each JPEG of CMYK, as Adobe's files need it.
    is_inverted = photo.format == "JPEG" and "adobe" not in photo.info
    photo = ImageOps.exif_transpose(photo) if exif else photo
    if photo.mode in ("I", "F"):
        raise ValueError(f"its pixels have 32 bits (mode {photo.mode}): expected 8 or 16")
    if photo.mode.startswith("I;16"):
        return Image.fromarray(np.uint8(np.asarray(photo) >> 8)).convert("RGB")
    if photo.mode == "CMYK":
        inks = np.asarray(photo)
        light = np.uint16(inks if is_inverted else 255 - inks)
        return Image.fromarray(np.uint8(light[..., :3] * light[..., 3:] // 255))
    return photo.convert("RGB")


def print_answers(paths, run, metadata):
    """Prints the line of each photo, or why it cannot be read, as `vgg-jax predict --json` does.

    Args:
        paths: Paths of the photos.
        run: Computes the output of the file for a view, (1, K).
        metadata: The metadata of the file.
    """
    for path in paths:
        try:
            views = read_views(path, metadata)
        except (OSError, SyntaxError, ValueError) as error:
            print(json.dumps({"file": path, "error": str(error)}))
        else:
            print_answer(path, [run(view) for view in views], metadata)


def print_answer(path, outputs, metadata):
    """Prints the line of `vgg-jax predict --json` for a photo.

    Args:
        path: Path of the photo.
        outputs: Output of the file for each view, (1, K).
        metadata: The metadata of the file.
    """
    scores = np.concatenate(outputs).astype(np.float64)
    if metadata["output"] == "logits":
        scores = np.exp(scores - scores.max(1, keepdims=True))
    posterior = (scores / scores.sum(1, keepdims=True)).mean(0)
    best = np.argsort(-posterior, kind="stable")[:5]
    top = [{"class": metadata["classes"][i], "probability": posterior[i]} for i in best]
    print(json.dumps({"file": path, "top": top}))
