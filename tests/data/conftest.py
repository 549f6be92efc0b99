"""Tiny data sets made on the spot."""

import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from tests.data.tiny_data import Numbers


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"a test asked the network: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """{"tfrecord": a data_dir with the data set "numbers", "array_record": one, too}"""
    folders = {}
    for file_format in ("tfrecord", "array_record"):
        folders[file_format] = str(tmp_path_factory.mktemp(file_format))
        config = tfds.download.DownloadConfig(num_shards=4, try_download_gcs=False)
        Numbers(data_dir=folders[file_format], file_format=file_format).download_and_prepare(download_config=config)
    return folders


@pytest.fixture
def folder(tmp_path):
    """An image folder: 7 ants, 6 bees to train on; 3 and 2 to validate on. The colour tells which."""
    for split, counts in {"train": (7, 6), "val": (3, 2)}.items():
        for label, (name, count) in enumerate(zip(("ants", "bees"), counts, strict=True)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(np.full((10 + i, 12, 3), label * 100 + i * 10, np.uint8))
                image.save(tmp_path / split / name / f"{i}.png")
    return tmp_path
