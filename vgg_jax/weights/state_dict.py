"""Finds a PyTorch VGG in a checkpoint: keys around its state_dict, and prefixes of its names."""

import collections
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from vgg_jax.errors import InputError

# Keys under which training scripts save the weights. The first that is there is read. The moving
# averages come last.
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "net", "model_ema", "state_dict_ema")
_PARAM = r"(?:weight|bias|running_mean|running_var|num_batches_tracked)"
# Modules around another one: of DataParallel, and of torch.compile.
_WRAPPER = r"(?:module|_orig_mod)\."
# The first kernel of a net, in torchvision's or in the authors' names, and what stands before it.
_FIRST_KERNEL = re.compile(
    rf"((?:.+?\.)??)(?:features\.(?:{_WRAPPER})*0|(?:(?:features|classifier)\.(?:{_WRAPPER})*)?"
    rf"conv1_1)\.(?:{_WRAPPER})*weight"
)
_FEWEST_CONVS = 5  # of the nets in Table 1 and §2.3
_CLASSIFIER = ("classifier.0", "classifier.3", "classifier.6")  # fc6 to fc8 of torchvision


class Names(NamedTuple):
    """Names of tensors as torchvision or timm have them.

    Attributes:
        plain: Maps each name of the net in the file to the plain name.
        prefix: What stands before the names in the file, or "".
        others: Names that are not under the prefix.
        note: What fully connected layers with other numbers were taken for, or "".
    """

    plain: dict[str, str]
    prefix: str
    others: tuple[str, ...]
    note: str = ""


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
    listed = [key for key in CHECKPOINT_KEYS if key in tensors]
    nets = [key for key, names in tensors.items() if _named_nets(names) or _numbered_nets(names)]
    if len(nets) > 1 and not set(nets) & set(listed):
        raise InputError(
            f"it holds several nets, under the keys {', '.join(map(repr, nets))}: "
            "expected one; save the weights of one to a file of their own"
        )
    ranked = (
        [key for key in listed if key in nets],
        nets,
        [key for key in listed if tensors[key]],
        listed,
    )
    key = next((keys[0] for keys in ranked if keys), None)
    if key is None:
        return checkpoint, "", ()
    return checkpoint[key], key, tuple(other for other in nets if other != key)


def plain_names(shapes: Mapping[str, Sequence[int]]) -> Names:
    """Removes what wrappers of a net add to its names.

    `DataParallel` adds "module.", `torch.compile` adds "_orig_mod.", and Lightning adds "model.". A
    `Sequential` adds the number of the net. The first two may also be around parts of a net. A
    `features` gets its name back, if it was saved by itself or under another name. The authors'
    names lose those of the modules around them. Three fully connected layers get the numbers that
    torchvision's have, also without a dropout or with the dropout first.

    Args:
        shapes: Shape of each tensor of a file by its name.

    Returns:
        The plain names. Files of other libraries keep theirs.

    Raises:
        InputError: The file holds several nets, or several tensors for one layer.
    """
    prefixes, rename = _named_nets(shapes), _unwrap
    numbered = set() if prefixes else _numbered_nets(shapes)
    if len(numbered) == 1:
        (prefix,) = prefixes = numbered
        modules = {
            name.removeprefix(prefix).partition(".")[0]: "classifier"
            for name, shape in shapes.items()
            if name.startswith(prefix) and len(shape) == 2
        }
        rename = partial(_name_place, modules=modules)
    names = remove_prefix({name: name for name in shapes}, prefixes, rename)
    numbers = _number_head({plain: shapes[name] for name, plain in names.plain.items()})
    if not numbers or set(numbers) == set(numbers.values()):
        return names
    plain = {}
    for name, short in names.plain.items():
        module, _, param = short.rpartition(".")
        plain[name] = f"{numbers[module]}.{param}" if module in numbers else short
    note = f"fc6 to fc8 are {', '.join(numbers)}, with a ReLU between them"
    return names._replace(plain=plain, note=note)


def _number_head(shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Maps the three fully connected layers of a classifier to those of torchvision.

    Without room for a ReLU between them, or with other layers, they are another head. The last one
    may be in a `Sequential`, with layers without weights.
    """
    params: dict[tuple[int, str], dict[str, int]] = {}
    for name, shape in shapes.items():
        if name.startswith("classifier."):
            match = re.fullmatch(r"classifier\.(\d+)((?:\.\d+)?)\.(\w+)", name)
            if match is None:
                return {}
            params.setdefault((int(match[1]), match[2]), {})[match[3]] = len(shape)
    layers = sorted(params)
    has_room = all(after[0] - layer[0] > 1 for layer, after in itertools.pairwise(layers))
    is_linear = all(value == {"weight": 2, "bias": 1} for value in params.values())
    is_nested = any(inner for _, inner in layers[:-1])
    if len(layers) != len(_CLASSIFIER) or not has_room or not is_linear or is_nested:
        return {}
    modules = [f"classifier.{number}{inner}" for number, inner in layers]
    return dict(zip(modules, _CLASSIFIER, strict=True))


def remove_prefix(
    shortened: Mapping[str, str],
    prefixes: Collection[str],
    rename: Callable[[str], str] = str,
) -> Names:
    """Removes what stands before the names of the one net in a file.

    Args:
        shortened: Maps each name in the file to the name that has the prefix.
        prefixes: What stands before the first layer of each net in the file.
        rename: Makes a plain name of one without the prefix.

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
        name: rename(short.removeprefix(prefix))
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
    """Removes modules within a net: wrappers of a part, and those around the authors' names."""
    name = re.sub(rf"(?<![^.]){_WRAPPER}", "", name)
    return re.sub(r"^(?:features|classifier)\.(?=(?:conv\d_\d|bn\d_\d|fc[678])\.)", "", name)


def _name_place(name: str, modules: Mapping[str, str]) -> str:
    """Names the `Sequential` that a numbered layer is in: `features` if `modules` has no other."""
    name = _unwrap(name)
    number = name.partition(".")[0]
    is_layer = re.fullmatch(rf"\d+\.{_PARAM}", name)
    return f"{modules.get(number, 'features')}.{name}" if is_layer else name


def _named_nets(names: Iterable[str]) -> set[str]:
    """Prefixes of nets with the names of torchvision or of the authors."""
    return {match[1] for name in names if (match := _FIRST_KERNEL.fullmatch(name))}


def _numbered_nets(names: Iterable[str]) -> set[str]:
    """Prefixes of numbered layers, such as those of `features` by itself or in a `Sequential`."""
    pattern = re.compile(rf"((?:.+\.)?)(\d+)\.(?:{_WRAPPER})*weight")
    numbers = [match.groups() for name in names if (match := pattern.fullmatch(name))]
    counts = collections.Counter(prefix for prefix, _ in numbers)
    return {
        prefix for prefix, number in numbers if number == "0" and counts[prefix] >= _FEWEST_CONVS
    }
