"""The README's Python recipes, pasted one after the other."""

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
CHANNELS = (64, 128, 256, 512, 512)  # of LPIPS' five layers


@pytest.mark.slow
def test_recipes(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    monkeypatch.chdir(tmp_path)
    net = VGG(CONFIGS["D"], 10, image_size=32)
    save(
        "vgg16.safetensors",
        Weights(
            "D",
            "vgg_jax",
            net,
            init(net)["params"],
            {},
            True,
            Preprocessing(IMAGENET.mean_rgb),
            tuple("abcdefghij"),
        ),
    )
    Path("lpips/weights/v0.1").mkdir(parents=True)
    torch.save(
        {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate(CHANNELS)},
        "lpips/weights/v0.1/vgg.pth",
    )
    rng = np.random.default_rng(0)
    images, others = (jnp.float32(rng.integers(0, 256, (2, 32, 32, 3))) for _ in range(2))
    names = {
        "images": images,
        "others": others,
        "wanted": {"relu3_3": jnp.zeros((2, 8, 8, 256))},
        "labels": jnp.array([1, 7]),
    }
    names["photos"] = [
        rng.integers(0, 256, size).astype(np.uint8) for size in ((32, 40, 3), (50, 32, 3))
    ]
    recipes = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(recipes) == 7
    with jax.numpy_rank_promotion("allow"):  # as it is outside of these tests
        for recipe in recipes:
            exec(
                compile(
                    recipe.replace("224", "32") if "ToNNX" in recipe else recipe,
                    "README.md",
                    "exec",
                ),
                names,
            )
        assert (names["scores"].shape, names["maps"].keys(), names["distance"].shape) == (
            (1, 2, 4, 1000),
            {"relu3_3"},
            (2,),
        )
        assert names["loss"](names["params"], images, names["labels"], jax.random.key(0)) > 0
        expected = names["model"].apply(names["variables"], images - names["mean"])
    np.testing.assert_allclose(names["logits"], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(names["found"].sum(1), [1, 1], atol=1e-5)
