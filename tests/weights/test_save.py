"""`vgg_jax.save`, the counterpart of `vgg_jax.load`."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import vgg_jax
from tests.helpers.weights_files import IMAGE_SIZE, forward, random_tensors, torchvision_state
from vgg_jax import CONFIGS, VGG, InputError


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A net of torchvision, whose images are divided by a standard deviation."""
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(torchvision_state(random_tensors("A"), "A"), path)
    return vgg_jax.load(path)


def test_save_keeps_logits(loaded, tmp_path):
    """The deviation is not divided into conv1_1 a second time."""
    model, variables, metadata = loaded
    changed = jax.tree.map(lambda leaf: 1.01 * leaf, variables)
    vgg_jax.save(tmp_path / "changed.safetensors", model, changed, metadata)
    again, restored, restored_metadata = vgg_jax.load(tmp_path / "changed.safetensors")
    images = np.random.default_rng(0).normal(0, 50, (2, IMAGE_SIZE, IMAGE_SIZE, 3))
    expected = forward(model, changed, np.float32(images))
    np.testing.assert_array_equal(forward(again, restored, np.float32(images)), expected)
    assert restored_metadata["preprocessing"] == metadata["preprocessing"]
    assert restored_metadata["classes"] == metadata["classes"]


def test_save_with_other_head(loaded, tmp_path):
    model, variables, metadata = loaded
    fc8 = {"kernel": np.ones((16, 2), np.float32), "bias": np.zeros(2, np.float32)}
    new = {"params": {**variables["params"], "fc8": fc8}}
    path = tmp_path / "two.safetensors"
    with pytest.raises(InputError, match=r"10 classes and the model 2: .*classes"):
        vgg_jax.save(path, model.clone(num_classes=2), new, metadata)
    vgg_jax.save(path, model.clone(num_classes=2), new, metadata | {"classes": ("ants", "bees")})
    again, _, restored = vgg_jax.load(path)
    assert again.num_classes == 2
    assert restored["classes"] == ("ants", "bees")


def test_save_rejects_other_net(loaded, tmp_path):
    _, variables, metadata = loaded
    with pytest.raises(InputError, match=r"net is 'A', and the model has other convolutions"):
        vgg_jax.save(tmp_path / "x.safetensors", VGG(CONFIGS["D"], 10), variables, metadata)
    with pytest.raises(InputError, match="preprocessing is missing"):
        vgg_jax.save(
            tmp_path / "x.safetensors",
            VGG(CONFIGS["A"], 10),
            variables,
            {"net": "A", "classes": metadata["classes"]},
        )


def test_saved_file_is_as_readable_as_others(loaded, tmp_path):
    vgg_jax.save(tmp_path / "net.safetensors", *loaded)
    (tmp_path / "other").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("net.safetensors", "other")]
    assert modes[0] == modes[1]
