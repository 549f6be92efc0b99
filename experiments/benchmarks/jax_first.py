"""The first answer of vgg_jax, for `first_answer`: logits of one image, or a training step.

    python -m experiments.benchmarks.jax_first infer vgg16.safetensors
    python -m experiments.benchmarks.jax_first step --net A --image-size 32 --batch 128

`infer` is what a program does that imports vgg_jax: `load`, `compile_inference`, one image.
`step` trains on random images. Compiled programs are kept as by `vgg-jax`.
"""

import argparse

import numpy as np

import vgg_jax
from experiments.benchmarks.bench_step import random_batch
from experiments.script import HelpFormatter, run
from vgg_jax.configs.colours import IMAGENET
from vgg_jax.configs.models import CONFIGS
from vgg_jax.configs.train import TrainConfig
from vgg_jax.distributed.sharding import make_mesh, shard_batch
from vgg_jax.model import build_model
from vgg_jax.runtime.compilation_cache import enable_compilation_cache
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import init_state, jit_steps

CLASSES = 10


def infer(file: str) -> None:
    """Prints the largest logit of an image."""
    model, variables, _ = vgg_jax.load(file)
    images = np.zeros((1, model.image_size, model.image_size, 3), np.float32)
    print(vgg_jax.compile_inference(model, variables)(images).max())


def step(net: str, image_size: int, batch_size: int) -> None:
    """Prints the loss of a training step."""
    hidden = 512 if image_size == 32 else 4096
    config = TrainConfig(
        net=net,
        fc=(hidden, hidden),
        image_size=image_size,
        scale=(image_size,),
        batch_size=batch_size,
        learning_rate=1e-2,
    )
    mesh = make_mesh(batch_size)
    model = build_model(config, CLASSES)
    state = init_state(model, make_optimizer(config), 0, mesh)
    train_step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh)
    batch = random_batch(batch_size, image_size)
    batch["label"] %= CLASSES
    _, sums = train_step(state, shard_batch(batch, mesh))
    print(sums.loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("infer").add_argument("file")
    command = commands.add_parser("step")
    command.add_argument("--net", choices=CONFIGS, required=True)
    command.add_argument("--image-size", type=int, required=True)
    command.add_argument("--batch", type=int, required=True)
    args = parser.parse_args()
    enable_compilation_cache()
    if args.command == "infer":
        infer(args.file)
    else:
        step(args.net, args.image_size, args.batch)


if __name__ == "__main__":
    run(main)
