"""Specs of exports, and folded batch normalisation."""

import dataclasses

import pytest

from tests.helpers.compare import assert_close_to_largest
from tests.helpers.export_files import (
    own_output,
    random_images,
    random_weights,
)
from vgg_jax import InputError
from vgg_jax.export import ExportSpec, fold_batch_norm
from vgg_jax.export.spec import format_of


@pytest.mark.slow
def test_fold_batch_norm_keeps_output():
    weights = random_weights("A", batch_norm=True)
    folded = fold_batch_norm(weights)
    assert not any(name.startswith("bn") for name in folded.params)
    images = random_images(2, 32, 32)
    assert_close_to_largest(
        own_output(ExportSpec(folded), images), own_output(ExportSpec(weights), images)
    )


def test_fold_batch_norm_without_any():
    weights = random_weights("A")
    assert fold_batch_norm(weights).params.keys() == weights.params.keys()


def test_format_of_rejects_suffix():
    with pytest.raises(InputError, match=r"ends in '.pb': expected \.safetensors, \.onnx"):
        format_of("net.pb")


def test_spec_rejects_output_and_headless_net():
    weights = random_weights("A")
    with pytest.raises(InputError, match="output is 'scores': expected one of logits"):
        ExportSpec(weights, "scores")
    with pytest.raises(InputError, match="the net has no fully connected layers"):
        ExportSpec(dataclasses.replace(weights, top=False))
