"""The assertions that other tests rely on: each fails where it should."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close_to_largest, assert_trees_close, log_compiles

EXPECTED = np.array([100.0, 1.0])


def test_close_to_largest_accepts_small_difference():
    assert_close_to_largest(EXPECTED + 0.009, EXPECTED, 1e-4)
    assert_close_to_largest(jnp.bfloat16(EXPECTED), EXPECTED, 1e-2)
    assert_close_to_largest(np.full(2, 1e-7), np.zeros(2), 1e-5, floor=0.1)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        pytest.param([100.0, 1.011], EXPECTED, id="difference"),
        pytest.param(EXPECTED[:1], EXPECTED, id="shape"),
        pytest.param([np.nan, 1.0], EXPECTED, id="nan"),
        pytest.param([np.nan, 1.0], [np.nan, 1.0], id="both_nan"),
        pytest.param(np.zeros(2), np.zeros(2), id="zeros"),
    ],
)
def test_close_to_largest_rejects(actual, expected):
    with pytest.raises(AssertionError):
        assert_close_to_largest(actual, expected, 1e-4)
    with pytest.raises(AssertionError):
        assert_trees_close({"fc6": {"kernel": actual}}, {"fc6": {"kernel": expected}}, 1e-4)


def test_trees_close_names_each_difference():
    expected = {"conv1_1": EXPECTED, "fc6": EXPECTED, "fc7": EXPECTED}
    actual = {"conv1_1": EXPECTED + 1, "fc6": EXPECTED, "fc7": EXPECTED + 2}
    assert_trees_close(actual, expected, 0.03)
    with pytest.raises(AssertionError, match=r"step 3 .*conv1_1.*0\.01.*fc7.*0\.02") as error:
        assert_trees_close(actual, expected, 1e-4, name="step 3")
    assert "fc6" not in str(error.value)


def test_trees_close_rejects_other_paths():
    for actual, expected in (
        ({"fc6": EXPECTED}, {}),
        ({}, {"fc6": EXPECTED}),
        ({"fc6": EXPECTED}, {"fc7": EXPECTED}),
        ({}, {}),
    ):
        with pytest.raises(AssertionError):
            assert_trees_close(actual, expected, 1e-4)


def test_log_compiles_counts_each_shape(caplog):
    @jax.jit
    def double_for_count(x):
        return 2 * x

    double_for_count(jnp.zeros(1))  # not counted
    with log_compiles(caplog) as count:
        for length in (1, 2, 3, 3):
            double_for_count(jnp.zeros(length))
    double_for_count(jnp.zeros(4))  # not counted
    assert count("double_for_count") == 2
    assert count("double") == 0
