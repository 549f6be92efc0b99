"""Photos, and a finished run of the net "shallow" on them."""

import pytest

from tests.helpers.photos import make_photo_folder
from tests.helpers.runs import make_config
from vgg_jax.training.loop import fit


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with 22 training and 7 validation images."""
    return make_photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def finished_run(photos, small_nets, tmp_path_factory):
    """The workdir of a run of three epochs, and its history."""
    workdir = tmp_path_factory.mktemp("finished_run")
    return workdir, fit(make_config(photos), workdir).history
