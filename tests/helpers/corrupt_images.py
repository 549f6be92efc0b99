"""Image files that cannot be decoded, and folders with some of them."""

import dataclasses
from pathlib import Path

from PIL import Image

from tests.helpers.tiny_data import TINY_TRAIN, encode, noise

PHOTO = noise(40, 50)
PNG = encode(PHOTO)
CORRUPT = {
    "cut.jpg": encode(PHOTO, "JPEG")[:400],
    "cut.png": PNG[:200],
    "cut.webp": encode(PHOTO, "WEBP")[:60],
    "cut.gif": encode(PHOTO, "GIF")[:20],
    "flipped.png": PNG[:60] + bytes([PNG[60] ^ 64]) + PNG[61:],  # one bit
    "bomb.png": encode(Image.new("1", (20_000, 20_000))),  # a few kilobytes
}
SKIPPING = dataclasses.replace(TINY_TRAIN, skip_bad=True)


def make_folder(root: Path, *corrupt: str) -> str:
    """Writes two classes of five intact images, and some corrupt ones in the first class."""
    for label in ("ants", "bees"):
        (root / label).mkdir(parents=True)
        for i in range(5):
            (root / label / f"{i}.png").write_bytes(encode(noise(20, 24, i)))
    for name in corrupt:
        (root / "ants" / name).write_bytes(CORRUPT[name])
    return str(root)
