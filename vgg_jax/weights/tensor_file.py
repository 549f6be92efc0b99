"""What a weight file holds, whatever its kind: names with shapes, and numbers that are read when they are asked for."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

MAX_BYTES = 2**31  # bytes; E with ImageNet's classes has 575 MB
MAX_ENTRIES = 2000  # names, groups or fields: more than any VGG has


class Tensor(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class TensorFile(NamedTuple):
    """What a file holds: its tensors by name, and what it says of them."""

    tensors: dict[str, Tensor]
    notes: dict[str, Any]
