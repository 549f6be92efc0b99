"""Tiny data sets made on the spot."""

import socket

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"a test asked the network: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


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
