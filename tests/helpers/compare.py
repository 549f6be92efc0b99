"""Assertions on arrays and trees of arrays, and a count of compilations."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from numpy.typing import ArrayLike


def assert_close_to_largest(
    actual: ArrayLike, expected: ArrayLike, tolerance: float = 1e-4, floor: float = 0.0
) -> None:
    """Asserts that no value differs by `tolerance` or more, relative to the largest value.

    Args:
        actual: The array to check. Its dtype may differ from that of `expected`.
        expected: An array of the same shape.
        tolerance: Bound of `max|actual - expected| / max|expected|`.
        floor: Smallest divisor. Pass one where all of `expected` may be rounding errors.
    """
    difference = _relative_difference(actual, expected, floor)
    assert difference < tolerance, (
        f"differs by {difference:.3g} of the largest: {tolerance} is the bound"
    )


def assert_trees_close(
    actual: Any, expected: Any, tolerance: float = 1e-4, floor: float = 0.0, name: str = ""
) -> None:
    """Asserts `assert_close_to_largest` for each array of a tree, and the same paths in both.

    Args:
        actual: The tree to check.
        expected: A tree with an array of the same shape at each path.
        tolerance: Bound of each array's difference, relative to the largest of its own values.
        floor: Smallest divisor.
        name: Begins the message.
    """
    actual_leaves, expected_leaves = _leaves(actual), _leaves(expected)
    assert actual_leaves.keys() == expected_leaves.keys(), name
    assert expected_leaves, f"{name} no arrays"
    differences = {
        path: _relative_difference(actual_leaves[path], leaf, floor)
        for path, leaf in expected_leaves.items()
    }
    too_large = {path: value for path, value in differences.items() if not value < tolerance}
    assert not too_large, f"{name} {too_large}: {tolerance} is the bound"


@contextlib.contextmanager
def log_compiles(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], int]]:
    """Logs compilations in all threads.

    Yields:
        A function that returns how often a jitted function was compiled since the start, by name:
        `count("train_step")`.
    """
    start, previous = len(caplog.records), jax.config.jax_log_compiles

    def count(name: str) -> int:
        messages = [record.getMessage() for record in caplog.records[start:]]
        return sum(message.startswith(f"Compiling jit({name})") for message in messages)

    jax.config.update("jax_log_compiles", True)
    try:
        yield count
    finally:
        jax.config.update("jax_log_compiles", previous)


def _relative_difference(actual: ArrayLike, expected: ArrayLike, floor: float) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    largest = max(np.abs(expected).max(), floor)
    # Zeros equal zeros even where the code under test computes nothing.
    assert largest > 0, "every expected value is 0: pass a floor if that is right"
    return float(np.abs(actual - expected).max() / largest)


def _leaves(tree: Any) -> dict[str, Any]:
    return {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
