"""Tiny data sets made on the spot, and no network."""

import socket

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError(f"a test used the network: {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write_folder(root):
    """Writes an image folder with 7 ants and 6 bees for training, 3 and 2 for validation.

    Each image has one colour, which identifies its class and number.
    """
    for split, counts in {"train": (7, 6), "val": (3, 2)}.items():
        for label, (name, count) in enumerate(zip(("ants", "bees"), counts, strict=True)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(np.full((10 + i, 12, 3), label * 100 + i * 10, np.uint8))
                image.save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    """See `write_folder`."""
    return write_folder(tmp_path)


def _map_eagerly(function, *columns):
    return [
        tf.nest.map_structure(lambda tensor: tensor.numpy(), function(*map(tf.constant, row)))
        for row in zip(*columns, strict=True)
    ]


def _map_in_graph(function, *columns):
    rows = tf.data.Dataset.from_tensor_slices(tuple(map(tf.constant, columns)))
    return list(rows.map(function).as_numpy_iterator())


@pytest.fixture(params=[_map_eagerly, _map_in_graph], ids=["eager", "graph"])
def map_rows(request):
    """Calls a function of one example for each row of some columns."""
    return request.param
