"""An .npz file of small random images, which a small net can learn."""

import numpy as np


def save_bright_images(folder, num_train, num_test, side):
    """Saves images of two classes, of which the second is brighter. Returns the path."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", num_train), ("test", num_test)):
        labels = np.arange(count) % 2
        noise = rng.integers(0, 180, (count, side, side, 3))
        arrays[f"x_{split}"] = np.uint8(noise + 75 * labels[:, None, None, None])
        arrays[f"y_{split}"] = labels
    path = folder / "bright.npz"
    np.savez(path, **arrays)
    return path
