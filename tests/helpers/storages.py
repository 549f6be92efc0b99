"""Training images in each kind of storage."""

import numpy as np

from tests.helpers.tiny_data import encode, noise
from vgg_jax.arrays import check_arrays, train_val_sources
from vgg_jax.data import open_train_val, tfds

FILE_STORAGES = ("digits", "folder", "list", "tfrecord", "buffered tfrecord", "array_record")


def write_list(root) -> str:
    """A list of 14 photos of two classes and several sizes."""
    lines = []
    for i in range(14):
        (root / f"{i}.png").write_bytes(encode(noise(20, 30 + i % 3, i)))
        lines.append(f"{i}.png,{'ab'[i % 2]},train\n")
    (root / "photos.csv").write_text("file,label,split\n" + "".join(lines))
    return str(root / "photos.csv")


def write_photos(root) -> str:
    """An image folder with 14 photos of one size, as PNG and JPEG."""
    for i in range(14):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        content = encode(noise(20, 30, i), "JPEG") if i % 3 else encode(noise(20, 30, i))
        (root / "ab"[i % 2] / f"{i}.{'jpg' if i % 3 else 'png'}").write_bytes(content)
    return str(root)


def arrays(count: int = 14):
    """Images and labels of two classes."""
    return np.stack([noise(20, 30, seed) for seed in range(count)]), np.arange(count) % 2


def open_storage(name, tmp_path, request, monkeypatch):
    """A source of at least 11 images to train on. Some others are held out."""
    if name == "arrays":
        return train_val_sources(check_arrays(*arrays(), "x"), None, "x")[0]
    if name == "digits":
        return open_train_val("digits", validation_fraction=0.98)[0]
    if name == "folder":
        return open_train_val(write_photos(tmp_path))[0]
    if name == "list":
        return open_train_val(write_list(tmp_path))[0]
    if name == "buffered tfrecord":
        monkeypatch.setattr(tfds, "MAX_BYTES_IN_MEMORY", 1000)
    folder = request.getfixturevalue("prepared")[name.split()[-1]]
    return open_train_val("numbers", data_dir=folder)[0]
