"""Finds a VGG among the names of a Keras file of any version, also inside another model."""

import re
from collections.abc import Container, Iterable

from vgg_jax.errors import InputError
from vgg_jax.weights.layouts import KERAS_IGNORED
from vgg_jax.weights.state_dict import Names

# The two parts of a KerasHub classifier.
BACKBONE, _HEAD = "layers/vgg_backbone/layers/", "layers/sequential/layers/"
# A convolution that each net of Table 1 has, in the names of Keras 3 and of versions before it.
_MARKS = ("layers/conv2d_4/vars/0", "block1_conv1/0")


def keras_names(names: Iterable[str]) -> Names:
    """Shortens the names of all Keras versions before 3, and removes the groups around a net.

    Before Keras 3, a kernel becomes `block1_conv1/0` and a bias `block1_conv1/1`. A classifier of
    KerasHub holds a `VGGBackbone` and a `Sequential`, which make one net.

    Args:
        names: Names of all tensors of a file.

    Returns:
        The plain names. Files of other libraries keep theirs.

    Raises:
        InputError: The file holds several nets, or several tensors for one layer.
    """
    names = tuple(names)
    shortened = {name: _shorten(name) for name in names if not re.fullmatch(KERAS_IGNORED, name)}
    if is_head(names) or any(name.startswith(BACKBONE) for name in names):
        shortened = {name: _join_parts(short, shortened) for name, short in shortened.items()}
    prefixes = {
        short.removesuffix(mark)
        for short in shortened.values()
        for mark in _MARKS
        if f"/{short}".endswith(f"/{mark}")
    }
    if len(prefixes) > 1:
        raise InputError(
            f"it holds several nets, under {', '.join(sorted(map(repr, prefixes)))}: "
            "expected one; save the weights of one of them"
        )
    prefix = prefixes.pop() if prefixes else ""
    plain = {
        name: short.removeprefix(prefix)
        for name, short in shortened.items()
        if short.startswith(prefix)
    }
    if len(set(plain.values())) < len(plain):
        raise InputError(
            "it holds several tensors for one layer: expected one net; save the weights of one"
        )
    return Names(plain, prefix, tuple(name for name in shortened if name not in plain))


def is_head(names: Iterable[str]) -> bool:
    """True for the names in a KerasHub preset's task.weights.h5, if it has the head only."""
    names = [name for name in names if not re.fullmatch(KERAS_IGNORED, name)]
    return f"{_HEAD}dense/vars/0" in names and all(name.startswith(_HEAD) for name in names)


def _join_parts(name: str, names: Container[str]) -> str:
    """Numbers fc6 to fc8 of a KerasHub classifier as dense layers.

    With pooling "avg" or "max", fc6 and fc7 are convolutions.
    """
    if name.startswith(_HEAD) and f"{_HEAD}conv2d/vars/0" in names:
        name = re.sub(rf"^{_HEAD}dense/", f"{_HEAD}dense_2/", name)
        name = re.sub(rf"^{_HEAD}conv2d(_1)?/", rf"{_HEAD}dense\1/", name)
    return re.sub(f"^(?:{BACKBONE}|{_HEAD})", "layers/", name)


def _shorten(name: str) -> str:
    """Shortens a name of a Keras before 3. Other names stay."""
    name = name.removeprefix("model_weights/")
    match = re.fullmatch(
        r"((?:[\w.-]+/)*?)(block\d_conv\d|fc[12]|predictions)/"
        r"(?:\w+/)*(?:\w+_)?(W|W_1|kernel|b|b_1|bias)(?::0)?",
        name,
    )
    if match is None:
        return name
    return f"{match[1]}{match[2]}/{0 if match[3] in ('W', 'W_1', 'kernel') else 1}"
