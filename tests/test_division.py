"""The held-out part of each class."""

import numpy as np
import pytest

from vgg_jax import InputError
from vgg_jax.division import divide_at_random, divide_by_class


def divide(name, labels, fraction, seed):
    return divide_by_class(name, [str(i) for i in range(500)], labels, fraction, seed)


FEW_OF_MANY = np.repeat(np.arange(30), np.arange(1, 31))  # class k has k + 1 images


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.9])
def test_each_class_is_divided_alike(fraction, caplog):
    labels = np.random.default_rng(0).permutation(FEW_OF_MANY)
    train, held_out = divide("x", labels, fraction, seed=3)
    assert sorted([*train, *held_out]) == list(range(len(labels)))
    assert list(train) == sorted(train) and list(held_out) == sorted(held_out)
    sizes, counts = (np.bincount(labels[part], minlength=30) for part in (..., held_out))
    capped = np.minimum(sizes * fraction, sizes - 1)
    assert np.all(np.abs(counts - capped) < 1) and np.all(counts < sizes)
    if fraction < 0.9:  # else a single image that stays would have to be held out
        assert len(held_out) == round(fraction * len(labels))
    missing = np.sum(counts == 0)
    assert f"{missing} of the 30 classes" in caplog.text if missing else not caplog.text


def test_division_depends_on_the_seed_and_on_chance():
    """Each of 100 classes of five images has the same chance to get one of the 50 that fit."""
    labels = np.repeat(np.arange(100), 5)
    held_out = [divide("x", labels, 0.1, seed).held_out for seed in range(40)]
    assert all(len(part) == 50 and len(set(labels[part])) == 50 for part in held_out)
    np.testing.assert_array_equal(divide("x", labels, 0.1, 7).held_out, held_out[7])
    times = np.bincount(np.concatenate([labels[part] for part in held_out]), minlength=100)
    assert times.min() > 5 and times.max() < 35  # 20 expected, with a deviation of 3.2
    positions = np.bincount(np.concatenate(held_out) % 5)
    assert positions.min() > 330  # 400 expected


def test_divisions_are_frozen():
    """A resumed run must not train on its validation images. The lists were printed once."""
    labels = np.repeat(np.arange(3), (10, 20, 30))
    assert divide("x", labels, 0.1, 0).held_out.tolist() == [8, 10, 18, 41, 53, 54]
    assert divide_at_random(60, 0.1, 0).held_out.tolist() == [39, 41, 45, 52, 53, 54]


def test_a_class_of_one_image_is_trained_on():
    labels = np.array([0, 1, 1, 1, 2, 2])
    for seed in range(20):
        division = divide("x", labels, 0.4, seed)
        assert set(labels[division.train]) == {0, 1, 2} and len(division.held_out) == 2
        assert 0 not in labels[division.held_out]


def test_classes_of_one_image_each_cannot_be_divided():
    message = r"no image of photos can be held out .* one image in each of its 500 class\(es\)"
    with pytest.raises(InputError, match=message):
        divide("photos", np.arange(500), 0.1, seed=0)
    division = divide("photos", np.arange(500), 0.0, seed=0)
    assert (len(division.train), len(division.held_out)) == (500, 0)
