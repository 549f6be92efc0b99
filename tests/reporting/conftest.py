"""Photos, and a run on them. Tests read both, and change neither."""

import pytest

from tests.helpers.photos import make_photo_folder
from tests.helpers.reports import write_run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with 22 training and 7 validation images."""
    return make_photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(photos, small_nets, tmp_path_factory):
    """The folder of a run of four epochs, "shallow"."""
    return write_run(tmp_path_factory.mktemp("runs") / "shallow", photos)
