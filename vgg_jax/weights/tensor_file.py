"""Content of a weight file of any format: tensors with shapes, read when they are needed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MAX_BYTES = 2**31  # E with ImageNet's classes has 575 MB
MAX_CONFIG_BYTES = 2**24  # of a JSON description
MAX_ENTRIES = 2000  # names, groups or fields; no VGG has as many


class Tensor(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # the array may be a part of the file, mapped into memory


class TensorFile(NamedTuple):
    """The tensors of a file by name, and its metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    num_bytes: int = 0  # on the disk
    config: str | bytes = ""  # JSON that describes a model of Keras
    note: str = ""  # what the head was taken for, if its names leave that open
