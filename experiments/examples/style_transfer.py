"""Paints one photo in the style of another (Gatys et al., arXiv 1508.06576).

    python -m experiments.examples.style_transfer CONTENT.jpg STYLE.jpg OUT.png \\
        [--weights FILE] [--size 256] [--steps 200]

Gradient descent on the pixels; half a second a step at 256 pixels on two cores. FILE is any file
that `vgg-jax import` reads. Without it the weights are random, and the style is textures only.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from experiments.script import HelpFormatter, run
from vgg_jax import CONFIGS, IMAGENET, VGG, compiler_options, load
from vgg_jax.perceptual import content_loss, style_loss

CONTENT_LAYERS = ("relu4_2",)
STYLE_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")


def read_photo(path: str, size: int) -> np.ndarray:
    """Reads an image as float32 (1, H, W, 3), its shorter side `size`."""
    image = Image.open(path).convert("RGB")
    ratio = size / min(image.size)
    shape = [round(side * ratio) for side in image.size]
    return np.asarray(image.resize(shape, Image.Resampling.BILINEAR), np.float32)[None]


def load_convolutions(weights: str | None) -> tuple[VGG, dict[str, Any], np.ndarray]:
    """Returns the net with average pooling, its variables without the FC layers, and mean RGB."""
    if weights:
        model, variables, metadata = load(weights)
        mean_rgb = metadata["preprocessing"]["mean_rgb"]
    else:
        model, mean_rgb = VGG(CONFIGS["D"], initializer="he"), IMAGENET.mean_rgb
        init = jax.jit(
            lambda key, x: model.init(key, x, layers=STYLE_LAYERS, method="features"),
            compiler_options=compiler_options(),
        )
        variables = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = {
        collection: {name: layer for name, layer in layers.items() if not name.startswith("fc")}
        for collection, layers in variables.items()
    }
    return model.clone(pool="avg"), variables, np.array(mean_rgb, np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("content", help="the photo to paint")
    parser.add_argument("style", help="the photo that has the style")
    parser.add_argument("out", help="the image file to write")
    parser.add_argument(
        "--weights",
        help="a file of weights, or a run's folder, of D or E; default: random weights of D",
    )
    parser.add_argument("--size", type=int, default=256, help="pixels of the shorter side")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--style-weight", type=float, default=1e6)
    args = parser.parse_args()
    model, variables, mean = load_convolutions(args.weights)

    def features(
        variables: dict[str, Any], image: jax.Array, layers: tuple[str, ...]
    ) -> dict[str, jax.Array]:
        return model.apply(variables, image, layers=layers, method="features")

    content = read_photo(args.content, args.size) - mean
    style = read_photo(args.style, args.size) - mean
    jitted_features = jax.jit(features, static_argnums=2, compiler_options=compiler_options())
    content_targets = jitted_features(variables, content, CONTENT_LAYERS)
    style_targets = jitted_features(variables, style, STYLE_LAYERS)
    optimizer = optax.adam(2.0)

    # Arguments of the jitted step: XLA spends long on folding captured constants.
    constants = (variables, content_targets, style_targets)

    def loss(image: jax.Array, constants: tuple[dict[str, Any], ...]) -> jax.Array:
        variables, content_targets, style_targets = constants
        outputs = features(variables, image, CONTENT_LAYERS + STYLE_LAYERS)
        content_outputs = {name: outputs[name] for name in CONTENT_LAYERS}
        style_outputs = {name: outputs[name] for name in STYLE_LAYERS}
        content_term = content_loss(content_outputs, content_targets)
        style_term = style_loss(style_outputs, style_targets)
        return (content_term + args.style_weight * style_term).sum()

    def step(
        image: jax.Array, opt_state: optax.OptState, constants: tuple[dict[str, Any], ...]
    ) -> tuple[jax.Array, optax.OptState, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(image, constants)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return jnp.clip(image + updates, -mean, 255 - mean), opt_state, value

    jitted_step = jax.jit(step, compiler_options=compiler_options())
    image, opt_state = jnp.asarray(content), optimizer.init(jnp.asarray(content))
    for number in range(args.steps):
        image, opt_state, value = jitted_step(image, opt_state, constants)
        if number % 20 == 0 or number == args.steps - 1:
            print(f"step {number + 1}: loss {float(value):.4g}", flush=True)
    Image.fromarray(np.asarray(jnp.round(image[0] + mean), np.uint8)).save(Path(args.out))


if __name__ == "__main__":
    run(main)
