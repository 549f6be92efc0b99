"""Photos, and a finished run of the net "shallow" on them. Tests read both, and change neither."""

import pytest

from tests.helpers.photos import make_photo_folder
from tests.helpers.runs import make_config
from tests.helpers.tiny import SHALLOW
from vgg_jax import CONFIGS
from vgg_jax.training.loop import fit


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with 22 training and 7 validation images."""
    return make_photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="session")
def finished_run(photos, tmp_path_factory):
    """The workdir of a run of three epochs, and its history."""
    workdir = tmp_path_factory.mktemp("finished_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, "shallow", SHALLOW)
        return workdir, fit(make_config(photos), workdir).history
