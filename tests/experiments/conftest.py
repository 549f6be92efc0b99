"""A small net for the experiments."""

import pytest

from vgg_jax import CONFIGS, Conv
from vgg_jax.configs.models import VGGConfig


@pytest.fixture
def narrow(monkeypatch):
    """The net "narrow", which has two stages."""
    monkeypatch.setitem(CONFIGS, "narrow", VGGConfig(((Conv(4),), (Conv(8),)), fc=(12, 8)))
