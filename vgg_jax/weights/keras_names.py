"""Finds a VGG among the names of a Keras file of any version, also inside another model."""

import re
from collections.abc import Container, Iterable, Mapping

from vgg_jax.weights.layouts import KERAS_IGNORED
from vgg_jax.weights.state_dict import Names, remove_prefix

# The backbone of a KerasHub classifier, and its head, which is a Sequential as others are.
BACKBONE, _HEAD = "layers/vgg_backbone/layers/", "layers/sequential/layers/"
# The layers of the two heads. With pooling "avg" or "max", fc6 and fc7 are convolutions.
_DENSE_HEAD, _POOLED_HEAD = {"dense", "dense_1", "dense_2"}, {"conv2d", "conv2d_1", "dense"}
_CONV_TO_DENSE = {"conv2d": "dense", "conv2d_1": "dense_1", "dense": "dense_2"}
# A convolution that each net of Table 1 has, in the names of Keras 3 and of versions before it.
_MARKS = ("layers/conv2d_4/vars/0", "block1_conv1/0")
# A parameter of fc6 to fc8, and the model around it.
_DENSE_PARAM = re.compile(r"((?:.+/)?)((?:layers/dense(?:_[12])?/vars|fc[12]|predictions)/[01])")


def keras_names(names: Iterable[str]) -> Names:
    """Shortens the names of all Keras versions before 3, and removes the groups around a net.

    Before Keras 3, a kernel becomes `block1_conv1/0` and a bias `block1_conv1/1`. Dense layers
    after a net without any become its own, such as those of KerasHub's classifiers.

    Args:
        names: Names of all tensors of a file.

    Returns:
        The plain names. Files of other libraries keep theirs.

    Raises:
        InputError: The file holds several nets, or several tensors for one layer.
    """
    shortened = {name: _shorten(name) for name in names if not re.fullmatch(KERAS_IGNORED, name)}
    if any(name.startswith(BACKBONE) for name in shortened):
        shortened = {name: _number_dense(short, shortened) for name, short in shortened.items()}
    prefixes = {
        short.removesuffix(mark)
        for short in shortened.values()
        for mark in _MARKS
        if f"/{short}".endswith(f"/{mark}")
    }
    return _with_outer_head(remove_prefix(shortened, prefixes), shortened)


def is_head(names: Iterable[str]) -> bool:
    """True for the names in a KerasHub preset's task.weights.h5, if it has the head only."""
    names = [name for name in names if not re.fullmatch(KERAS_IGNORED, name)]
    layers = {name.removeprefix(_HEAD).partition("/")[0] for name in names}
    is_whole = layers in (_DENSE_HEAD, _POOLED_HEAD)
    return is_whole and all(name.startswith(_HEAD) for name in names)


def _number_dense(name: str, names: Container[str]) -> str:
    """Gives fc6 to fc8 of a KerasHub classifier the names of dense layers."""
    layer, _, param = name.removeprefix(_HEAD).partition("/")
    if not name.startswith(_HEAD) or f"{_HEAD}conv2d/vars/0" not in names:
        return name
    return f"{_HEAD}{_CONV_TO_DENSE.get(layer, layer)}/{param}"


def _with_outer_head(names: Names, shortened: Mapping[str, str]) -> Names:
    """Adds dense layers of the model around a net that has none, if nothing else is around it."""
    matches = {name: _DENSE_PARAM.fullmatch(shortened[name]) for name in names.others}
    is_headless = not any(_DENSE_PARAM.fullmatch(name) for name in names.plain.values())
    models = {match[1] if match else None for match in matches.values()}
    if len(models) != 1 or None in models or not is_headless:
        return names
    head = {name: match[2] for name, match in matches.items() if match}
    return names._replace(plain=names.plain | head, others=())


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
