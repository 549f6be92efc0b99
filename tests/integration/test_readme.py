"""The README's Python recipes run, pasted one after the other."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.tiny import init
from vgg_jax import CONFIGS, IMAGENET, VGG
from vgg_jax.weights import Weights, save
from vgg_jax.weights.layouts import Preprocessing

README = Path(__file__).parents[2] / "README.md"
NUM_RECIPES = 7
LPIPS_CHANNELS = (64, 128, 256, 512, 512)


@pytest.mark.slow
def test_readme_recipes(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    monkeypatch.chdir(tmp_path)
    save_vgg16("vgg16.safetensors")
    Path("lpips/weights/v0.1").mkdir(parents=True)
    lpips_weights = {
        f"lin{i}.model.1.weight": torch.rand(1, channels, 1, 1)
        for i, channels in enumerate(LPIPS_CHANNELS)
    }
    torch.save(lpips_weights, "lpips/weights/v0.1/vgg.pth")
    rng = np.random.default_rng(0)
    images, other_images = (jnp.float32(rng.integers(0, 256, (2, 32, 32, 3))) for _ in range(2))
    # The recipes use these names, and leave their own here.
    names = {
        "images": images,
        "other_images": other_images,
        "targets": {"relu3_3": jnp.zeros((2, 8, 8, 256))},
        "labels": jnp.array([1, 7]),
        "photos": [
            rng.integers(0, 256, size).astype(np.uint8) for size in ((32, 40, 3), (50, 32, 3))
        ],
    }
    recipes = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(recipes) == NUM_RECIPES
    with jax.numpy_rank_promotion("allow"):  # jax's default, which users have
        for recipe in recipes:
            if "ToNNX" in recipe:
                recipe = recipe.replace("224", "32")
            exec(compile(recipe, "README.md", "exec"), names)
        assert names["scores"].shape == (1, 2, 4, 1000)
        assert names["maps"].keys() == {"relu3_3"}
        assert names["distance"].shape == (2,)
        assert names["loss"](names["params"], images, names["labels"], jax.random.key(0)) > 0
        expected = names["model"].apply(names["variables"], images - names["mean"])
    np.testing.assert_allclose(names["logits"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(names["posteriors"].sum(1), [1, 1], atol=1e-5)


def save_vgg16(path):
    """Saves random weights of net D: ten classes, images of 32 pixels."""
    net = VGG(CONFIGS["D"], 10, image_size=32)
    params = init(net)["params"]
    preprocessing = Preprocessing(IMAGENET.mean_rgb)
    classes = tuple("abcdefghij")
    save(path, Weights("D", "vgg_jax", net, params, {}, True, preprocessing, classes))
