"""How far dense posteriors of photos are from PyTorch's, one image at a time at its own size, from the same random weights.

    python -m experiments.check_dense PHOTOS --net A --scale 256 --images 100 [--batch-norm] [--ceil]

Needs torch. Prints one JSON line with the largest difference of any class's posterior; 1e-4 is the bound. Takes about a second an image
for net A at Q = 256 on two cores.
"""

import argparse
import json

import numpy as np
import torch

from experiments.script import run
from tests.helpers.torch_vgg import dense_posterior, randomize, score_map, to_jax, torch_vgg
from vgg_jax import CONFIGS, IMAGENET, VGG
from vgg_jax.configs.evaluation import EvalProtocol
from vgg_jax.data import open_split, rescaled_images
from vgg_jax.evaluation.dense import class_posteriors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--net", default="A", choices=CONFIGS)
    parser.add_argument("--batch-norm", action="store_true")
    parser.add_argument("--ceil", action="store_true")
    parser.add_argument("--scale", type=int, default=256)
    parser.add_argument("--images", type=int, default=100)
    args = parser.parse_args()
    source = open_split(args.folder, "train")
    images = []
    for example in rescaled_images(source, (args.scale,), True):
        images.append(example["scaled"][0][0])
        if len(images) == args.images:
            break
    theirs = randomize(torch_vgg(args.net, (4096, 4096), 1000, args.batch_norm), seed=0).eval()
    # Random scores may be all or nothing, or nearly equal: scaled so that the largest posterior is well between.
    pixels = torch.from_numpy(images[0] - np.array(IMAGENET.mean_rgb, np.float32)).permute(2, 0, 1)[
        None
    ]
    with torch.inference_mode():
        theirs.fc8.weight.data *= 2.5 / score_map(theirs, pixels, 7).std()
    params, batch_stats = to_jax(theirs, 7)
    model = VGG(CONFIGS[args.net], batch_norm=args.batch_norm)
    variables = {"params": params, "batch_stats": batch_stats}
    ours = class_posteriors(model, variables, images, protocol=EvalProtocol(ceil=args.ceil))
    with torch.inference_mode():
        expected = np.stack(
            [dense_posterior(theirs, image, IMAGENET.mean_rgb, 7, args.ceil) for image in images]
        )
    difference = np.abs(ours - expected).max()
    sizes = len({image.shape for image in images})
    print(
        json.dumps(
            vars(args)
            | {
                "sizes": sizes,
                "largest_difference": float(difference),
                "mean_largest_posterior": float(expected.max(1).mean()),
            }
        )
    )


if __name__ == "__main__":
    run(main)
