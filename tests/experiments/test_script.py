"""What all scripts of experiments share."""

import argparse

import pytest

from experiments.script import HelpFormatter, check_at_least_one
from vgg_jax.errors import InputError


def test_counts_below_one_are_refused():
    args = argparse.Namespace(images=1, batch_size=0)
    check_at_least_one(args, "images")
    with pytest.raises(InputError, match=r"^--batch-size is 0: expected at least 1$"):
        check_at_least_one(args, "images", "batch_size")


def test_help_shows_defaults():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("data", help="a file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one net each")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", default={})
    parser.add_argument("--rate", type=float, help="default: that of the paper")
    parser.add_argument("--cache", action="store_true", help="keep them")
    lines = [" ".join(line.split()) for line in parser.format_help().splitlines()]
    assert "data a file" in lines
    assert "--seeds SEEDS [SEEDS ...] one net each; default: 0 1" in " ".join(lines)
    assert "--epochs EPOCHS default: 3" in lines
    assert "--seed SEED default: 0" in lines
    assert "--mesh MESH" in lines
    assert "--rate RATE default: that of the paper" in lines
    assert "--cache keep them" in lines
    assert parser.format_help().count("default: 3") == 1  # also when it is formatted again
