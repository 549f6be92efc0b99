"""Compares dense posteriors of photos with PyTorch's, for the same random weights.

    python -m experiments.paper.check_dense PHOTOS --net A --scale 256 --images 100 \\
        [--batch-norm] [--ceil]

PyTorch evaluates one image at a time, each at its own size. Needs torch. Prints one JSON line with
the largest difference of any posterior; the bound is 1e-4. An image takes about a second with net A
at Q = 256 on two cores. Results: experiments/results/check_dense.json.
"""

import argparse
import json
from typing import Any

import numpy as np
import torch

from experiments.script import HelpFormatter, run
from tests.helpers.torch_vgg import dense_posterior, randomize, score_map, to_jax, torch_vgg
from vgg_jax import CONFIGS, IMAGENET, VGG
from vgg_jax.configs.evaluation import EvalProtocol
from vgg_jax.data import open_split, rescaled_images
from vgg_jax.evaluation.dense import class_posteriors

FC6_SIDE = 7


def random_net(name: str, batch_norm: bool, image: np.ndarray) -> torch.nn.Module:
    """Builds a net with random weights in PyTorch.

    Random scores may be nearly equal, or one of them may dominate. The last layer is scaled so that
    the largest posterior of the image is far from 0 and 1.
    """
    net = randomize(torch_vgg(name, (4096, 4096), 1000, batch_norm), seed=0).eval()
    pixels = torch.from_numpy(image - np.array(IMAGENET.mean_rgb, np.float32))
    with torch.inference_mode():
        scores = score_map(net, pixels.permute(2, 0, 1)[None], FC6_SIDE)
        net.fc8.weight.data *= 2.5 / scores.std()
    return net


def compare(args: argparse.Namespace) -> dict[str, Any]:
    images = []
    for example in rescaled_images(open_split(args.folder, "train"), (args.scale,), True):
        images.append(example["scaled"][0][0])
        if len(images) == args.images:
            break
    net = random_net(args.net, args.batch_norm, images[0])
    params, batch_stats = to_jax(net, FC6_SIDE)
    actual = class_posteriors(
        VGG(CONFIGS[args.net], batch_norm=args.batch_norm),
        {"params": params, "batch_stats": batch_stats},
        images,
        protocol=EvalProtocol(ceil=args.ceil),
    )
    with torch.inference_mode():
        posteriors = [
            dense_posterior(net, image, IMAGENET.mean_rgb, FC6_SIDE, args.ceil) for image in images
        ]
    expected = np.stack(posteriors)
    return {
        "sizes": len({image.shape for image in images}),
        "largest_difference": float(np.abs(actual - expected).max()),
        "mean_largest_posterior": float(expected.max(1).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--net", default="A", choices=CONFIGS)
    parser.add_argument("--batch-norm", action="store_true")
    parser.add_argument("--ceil", action="store_true")
    parser.add_argument("--scale", type=int, default=256)
    parser.add_argument("--images", type=int, default=100)
    args = parser.parse_args()
    print(json.dumps(vars(args) | compare(args)))


if __name__ == "__main__":
    run(main)
