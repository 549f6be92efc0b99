"""The content of one photo in the style of another (Gatys et al., arXiv 1508.06576), by gradient descent on the pixels.

    python -m experiments.examples.style_transfer CONTENT.jpg STYLE.jpg OUT.png [--weights FILE] [--size 256] [--steps 200]

With a file of weights, ours or another library's, as `vgg-jax import` takes; without, on random weights, whose style is textures only.
On two cores a step at 256 pixels takes about half a second.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image

from experiments.script import run
from vgg_jax import CONFIGS, IMAGENET, VGG, compiler_options, load
from vgg_jax.perceptual import content_loss, style_loss

CONTENT, STYLE = ("relu4_2",), ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")


def opened(path: str, size: int) -> np.ndarray:
    """float32 (1, H, W, 3), the shorter side `size`."""
    image = Image.open(path).convert("RGB")
    ratio = size / min(image.size)
    return np.asarray(
        image.resize([round(side * ratio) for side in image.size], Image.Resampling.BILINEAR),
        np.float32,
    )[None]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("content")
    parser.add_argument("style")
    parser.add_argument("out")
    parser.add_argument(
        "--weights",
        help="a file of weights, or a run's folder, of D or E (default: random weights of D)",
    )
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--style-weight", type=float, default=1e6)
    args = parser.parse_args()
    if args.weights:
        model, variables, metadata = load(args.weights)
        mean = np.array(metadata["preprocessing"]["mean_rgb"], np.float32)
    else:
        model, mean = VGG(CONFIGS["D"], initializer="he"), np.array(IMAGENET.mean_rgb, np.float32)
        init = jax.jit(
            lambda key, x: model.init(key, x, layers=STYLE, method="features"),
            compiler_options=compiler_options(),
        )
        variables = init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    model = model.clone(pool="avg")
    variables = {
        group: {name: layer for name, layer in layers.items() if not name.startswith("fc")}
        for group, layers in variables.items()
    }

    def features(image: jax.Array, layers: tuple[str, ...]) -> dict[str, jax.Array]:
        return model.apply(variables, image, layers=layers, method="features")

    content, style = opened(args.content, args.size) - mean, opened(args.style, args.size) - mean
    wanted_content, wanted_style = (
        jax.jit(features, static_argnums=1)(content, CONTENT),
        jax.jit(features, static_argnums=1)(style, STYLE),
    )
    optimizer = optax.adam(2.0)

    def loss(image: jax.Array) -> jax.Array:
        found = features(image, CONTENT + STYLE)
        of_content = content_loss({name: found[name] for name in CONTENT}, wanted_content)
        of_style = style_loss({name: found[name] for name in STYLE}, wanted_style)
        return (of_content + args.style_weight * of_style).sum()

    def step(
        image: jax.Array, state: optax.OptState
    ) -> tuple[jax.Array, optax.OptState, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(image)
        updates, state = optimizer.update(gradient, state)
        return jnp.clip(image + updates, -mean, 255 - mean), state, value

    compiled = jax.jit(step, compiler_options=compiler_options())
    image, state = jnp.asarray(content), optimizer.init(jnp.asarray(content))
    for number in range(args.steps):
        image, state, value = compiled(image, state)
        if number % 20 == 0 or number == args.steps - 1:
            print(f"step {number + 1}: loss {float(value):.4g}", flush=True)
    Image.fromarray(np.asarray(jnp.round(image[0] + mean), np.uint8)).save(Path(args.out))


if __name__ == "__main__":
    run(main)
