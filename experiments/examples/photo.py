"""Reads photos as `vgg-jax predict` does, for the programs beside it, without vgg_jax.

It needs NumPy and Pillow.
"""

import json
import sys

import numpy as np
from PIL import Image, ImageOps

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # 8 bits, grey or RGB


def read_views(path, metadata):
    """Reads the images whose mean posterior is the answer for a photo.

    Args:
        path: Path of the photo.
        metadata: The metadata of an exported file.

    Returns:
        Input of the file, (1, H, W, 3). For logits, the centre crop, as in
        `vgg-jax predict --protocol center`. For posteriors, the whole photo and its mirror image,
        as in `vgg-jax predict`.
    """
    if metadata["channels"] != "RGB" or metadata["output"] == "score_map":
        sys.exit("expected a net for RGB images, exported with the output logits or posteriors")
    photo = Image.open(path)
    if photo.mode not in MODES:
        sys.exit(f"{path} has the mode {photo.mode}: expected 8 bits, grey or RGB")
    photo = ImageOps.exif_transpose(photo) if metadata.get("exif", True) else photo
    as_torchvision = metadata.get("rounding") == "torchvision"
    to_int = int if as_torchvision else round
    sides = [to_int(side * metadata["scale"] / min(photo.size)) for side in photo.size]
    # In floats: with 8 bits, Pillow rounds twice. Halves are rounded up.
    channels = [channel.convert("F") for channel in photo.convert("RGB").split()]
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
