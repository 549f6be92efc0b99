"""Folders of small photos, made on the spot."""

import numpy as np
from PIL import Image


def make_photo_folder(root, train=11, val=3):
    """Writes noise of several sizes into root/{train,val}/{blue,red}; a class is a tint.

    Each class has `train` training images. "blue" has `val` validation images, "red" one more.
    Returns the path as a string.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for label, tint in enumerate(("blue", "red")):
            folder = root / split / tint
            folder.mkdir(parents=True)
            for i in range(count + label * (split == "val")):
                pixels = rng.integers(0, 200, (36 + i, 40, 3))
                pixels[..., 0 if tint == "red" else 2] += 55
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    return str(root)
