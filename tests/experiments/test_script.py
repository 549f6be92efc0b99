"""What all scripts of experiments share."""

import argparse

import pytest

from experiments.script import check_at_least_one
from vgg_jax.errors import InputError


def test_counts_below_one_are_refused():
    args = argparse.Namespace(images=1, batch_size=0)
    check_at_least_one(args, "images")
    with pytest.raises(InputError, match=r"^--batch-size is 0: expected at least 1$"):
        check_at_least_one(args, "images", "batch_size")
