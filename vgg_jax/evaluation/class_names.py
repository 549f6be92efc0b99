"""The classes of a data set among those of a net."""

import re
from collections.abc import Sequence

import numpy as np

from vgg_jax.configs.evaluation import MATCHES
from vgg_jax.errors import InputError, shorten_names


def map_class_indices(
    names: Sequence[str], net_classes: Sequence[str], message: str, match: str = "exact"
) -> np.ndarray:
    """Finds the classes of a data set among those of a net.

    Args:
        names: The classes of the data set.
        net_classes: The classes of the net.
        message: Start of the error message.
        match: One of `MATCHES`. "exact" takes equal names, and a WordNet id alone, "n01440764", for
            "n01440764 tench, Tinca tinca". "order" takes the classes by their number. "synset"
            compares the WordNet ids at the start of both names. "name" compares the names without
            WordNet ids, case, spaces, "-" and "_"; each of several names between commas counts.

    Returns:
        The index of each name in `net_classes`, int (n,).

    Raises:
        InputError: The net lacks a class, or two of its classes fit. The message lists up to five
            of each, and the matches that would fit.
    """
    indices = _find_classes(names, net_classes, match)
    unknown = [name for name, index in zip(names, indices, strict=True) if index is None]
    if not unknown:
        return np.array(indices)
    fitting = [
        m for m in MATCHES if m != match and None not in _find_classes(names, net_classes, m)
    ]
    remedy = "pass the net's names with --classes FILE"
    if fitting:
        remedy = f"pass --match {' or '.join(fitting)}, or {remedy.removeprefix('pass ')}"
    raise InputError(
        f"{message}: {shorten_names(unknown)}; "
        f"expected some of its {len(net_classes)}: {shorten_names(net_classes)}; {remedy}"
    )


def _find_classes(names: Sequence[str], net_classes: Sequence[str], match: str) -> list[int | None]:
    """Finds the index of each name among the net's classes; None if there is not exactly one."""
    if match == "order":
        same_number = len(names) == len(net_classes)
        return [index if same_number else None for index in range(len(names))]
    keys = {"exact": _exact_keys, "synset": _synset_keys, "name": _name_keys}[match]
    indices_by_key: dict[str, set[int]] = {}
    for index, name in enumerate(net_classes):
        for key in keys(name):
            indices_by_key.setdefault(key, set()).add(index)
    result = []
    for name in names:
        own_keys = {name} if match == "exact" else keys(name)
        indices = set().union(*(indices_by_key.get(key, ()) for key in own_keys))
        result.append(indices.pop() if len(indices) == 1 else None)
    return result


def _exact_keys(name: str) -> set[str]:
    return {name} | _synset_keys(name)


def _synset_keys(name: str) -> set[str]:
    synset = re.match(r"n\d{8}(?!\d)", name)
    return {synset[0]} if synset else set()


def _name_keys(name: str) -> set[str]:
    words = re.sub(r"^n\d{8}(?!\d)[ _-]*", "", name)
    return {re.sub(r"[\s_-]", "", part).casefold() for part in words.split(",")} - {""}
