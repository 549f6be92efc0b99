"""Finds a PyTorch VGG in a checkpoint: keys around its state_dict, and prefixes of its names."""

import collections
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from vgg_jax.errors import InputError

# Keys under which training scripts save the weights. The first that is there is read. The moving
# averages come last.
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "net", "model_ema", "state_dict_ema")
_PARAM = r"(?:weight|bias|running_mean|running_var|num_batches_tracked)"
# The first kernel of a net, in torchvision's and in the authors' names.
_FIRST_KERNELS = ("features.0.weight", "conv1_1.weight")
_FEWEST_CONVS = 5  # of the nets in Table 1 and §2.3
# With a dropout before each fully connected layer, as in torchvision's AlexNet.
_DROPOUT_FIRST = {"classifier.1": "classifier.0", "classifier.4": "classifier.3"}


class Names(NamedTuple):
    """Names of tensors as torchvision or timm have them.

    Attributes:
        plain: Maps each name of the net in the file to the plain name.
        prefix: What stands before the names in the file, or "".
        others: Names that are not under the prefix.
    """

    plain: dict[str, str]
    prefix: str
    others: tuple[str, ...]


def find_state_dict(checkpoint: Any) -> tuple[Any, str, tuple[str, ...]]:
    """Finds the weights among the other content of a checkpoint.

    Args:
        checkpoint: The content of a file, perhaps a dict with one of `CHECKPOINT_KEYS`.

    Returns:
        The weights, their key, and the other keys that hold a VGG. The key is the first of
        `CHECKPOINT_KEYS` that holds a VGG, or else the only other one. Without a VGG, it is the
        first of `CHECKPOINT_KEYS` that holds tensors. A checkpoint with none is returned as it is.

    Raises:
        InputError: Several keys hold a VGG, and none of them is in `CHECKPOINT_KEYS`.
    """
    if not isinstance(checkpoint, Mapping):
        return checkpoint, "", ()
    tensors = {
        key: [str(name) for name, item in value.items() if hasattr(item, "shape")]
        for key, value in checkpoint.items()
        if isinstance(value, Mapping)
    }
    known = [key for key in CHECKPOINT_KEYS if key in tensors]
    nets = [key for key, names in tensors.items() if _named_nets(names) or _numbered_nets(names)]
    if len(nets) > 1 and not set(nets) & set(known):
        raise InputError(
            f"it holds several nets, under the keys {', '.join(map(repr, nets))}: "
            "expected one; save the weights of one to a file of their own"
        )
    ranked = (
        [key for key in known if key in nets],
        nets,
        [key for key in known if tensors[key]],
        known,
    )
    key = next((keys[0] for keys in ranked if keys), None)
    if key is None:
        return checkpoint, "", ()
    return checkpoint[key], key, tuple(other for other in nets if other != key)


def plain_names(names: Iterable[str]) -> Names:
    """Removes what wrappers of a net add to its names.

    `DataParallel` adds "module.", `torch.compile` adds "_orig_mod.", and Lightning adds "model.". A
    `Sequential` adds the number of the net. A `features` gets its name back, if it was saved by
    itself or under another name. The authors' names lose those of the modules around them.

    Args:
        names: Names of all tensors of a file.

    Returns:
        The plain names. Files of other libraries keep theirs.

    Raises:
        InputError: The file holds several nets, or several tensors for one layer.
    """
    names = tuple(names)
    unwrapped = {name: _unwrap(name) for name in names}
    prefixes = _named_nets(unwrapped.values())
    unnamed = _numbered_nets(names)
    if not prefixes and len(unnamed) == 1:
        (prefix,) = prefixes = unnamed
        numbered = re.compile(rf"{re.escape(prefix)}(\d+\.{_PARAM})")
        unwrapped = {name: numbered.sub(rf"{prefix}features.\1", name) for name in names}
    found = remove_prefix(unwrapped, prefixes)
    if {"classifier.0.weight", "classifier.3.weight"} & set(found.plain.values()):
        return found
    return found._replace(plain={name: _renumber(short) for name, short in found.plain.items()})


def remove_prefix(shortened: Mapping[str, str], prefixes: Collection[str]) -> Names:
    """Removes what stands before the names of the one net in a file.

    Args:
        shortened: Maps each name in the file to the name that has the prefix.
        prefixes: What stands before the first layer of each net in the file.

    Returns:
        The plain names. Without a prefix, all of them.

    Raises:
        InputError: There are several nets, or several tensors for one layer.
    """
    if len(prefixes) > 1:
        raise InputError(
            f"it holds several nets, under {', '.join(sorted(map(repr, prefixes)))}: "
            "expected one; save the weights of one of them"
        )
    prefix = next(iter(prefixes), "")
    plain = {
        name: short.removeprefix(prefix)
        for name, short in shortened.items()
        if short.startswith(prefix)
    }
    counts = collections.Counter(plain.values())
    repeated = [name for name, short in plain.items() if counts[short] > 1]
    if repeated:
        raise InputError(
            f"it holds several tensors for one layer, {', '.join(repeated)}: "
            "expected one net; save the weights of one"
        )
    return Names(plain, prefix, tuple(name for name in shortened if name not in plain))


def _unwrap(name: str) -> str:
    """Removes modules within a net: those of `DataParallel`, and those around authors' names."""
    name = re.sub(r"\b(features|classifier)\.module\.", r"\1.", name)
    return re.sub(r"\b(?:features|classifier)\.(?=(?:conv\d_\d|bn\d_\d|fc[678])\.)", "", name)


def _named_nets(names: Iterable[str]) -> set[str]:
    """Prefixes of nets with the names of torchvision or of the authors."""
    return {
        name.removesuffix(kernel)
        for name in names
        for kernel in _FIRST_KERNELS
        if f".{name}".endswith(f".{kernel}")
    }


def _numbered_nets(names: Iterable[str]) -> set[str]:
    """Prefixes of numbered layers, such as those of `features` by itself or in a `Sequential`."""
    matches = [re.fullmatch(r"((?:.+\.)?)(\d+)\.weight", name) for name in names]
    numbers = [match.groups() for match in matches if match]
    counts = collections.Counter(prefix for prefix, _ in numbers)
    return {
        prefix for prefix, number in numbers if number == "0" and counts[prefix] >= _FEWEST_CONVS
    }


def _renumber(name: str) -> str:
    """Numbers fully connected layers as if the dropouts came after them."""
    module, _, param = name.rpartition(".")
    return f"{_DROPOUT_FIRST.get(module, module)}.{param}" if module else name
