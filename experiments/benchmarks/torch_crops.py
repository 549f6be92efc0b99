"""Measures the multi-crop evaluation of a folder in PyTorch, from files to posteriors.

    python -m experiments.benchmarks.torch_crops PHOTOS --net A --scale 256 384 512 --images 8

One image at a time, with 5x5 crops and their mirror images at each scale. `bench_evaluate.py
--protocol multi-crop` runs this script as its peer. Needs torch and torchvision. Prints one JSON
line. With net A, an image takes about 6 s per scale on two cores.
"""

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.transforms import v2

from experiments.script import HelpFormatter

STAGES = {
    "A": [[64], [128], [256] * 2, [512] * 2, [512] * 2],
    "B": [[64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2],
    "D": [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3],
    "E": [[64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4],
}
CROP_SIZE = 224
MEAN_RGB = torch.tensor([123.68, 116.779, 103.939]).view(3, 1, 1)


def build_net(stages: list[list[int]]) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for stage in stages:
        for features in stage:
            layers += [nn.Conv2d(channels, features, 3, padding=1), nn.ReLU(inplace=True)]
            channels = features
        layers.append(nn.MaxPool2d(2, 2))
    layers += [
        nn.Flatten(),
        nn.Linear(512 * 49, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, 1000),
    ]
    return nn.Sequential(*layers).eval().to(memory_format=torch.channels_last)


def cut_crops(image: torch.Tensor) -> torch.Tensor:
    """Cuts 5x5 crops and mirrors each: (50, 3, 224, 224) from (3, H, W)."""
    rows, columns = (
        np.round(np.linspace(0, side - CROP_SIZE, 5)).astype(int) for side in image.shape[1:]
    )
    crops = torch.stack(
        [
            image[:, y : y + CROP_SIZE, x : x + CROP_SIZE]
            for y, x in itertools.product(rows, columns)
        ]
    )
    return torch.cat([crops, crops.flip(-1)]).contiguous(memory_format=torch.channels_last)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--net", default="A", choices=STAGES)
    parser.add_argument("--scale", type=int, nargs="+", default=[256])
    parser.add_argument("--images", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build_net(STAGES[args.net])
    resizes = [v2.Resize(scale, antialias=True) for scale in args.scale]
    files = sorted(Path(args.folder).glob("*/*"))[: args.images]
    started = time.perf_counter()
    with torch.inference_mode():
        for file in files:
            photo = torchvision.io.decode_image(str(file), mode="RGB")
            for resize in resizes:
                crops = cut_crops(resize(photo).float() - MEAN_RGB)
                model(crops).softmax(-1).mean(0)
    seconds = time.perf_counter() - started
    result = {
        "peer": "torch crops",
        "images_per_second": len(files) / seconds,
        "seconds": seconds,
    }
    print(json.dumps(vars(args) | result))


if __name__ == "__main__":
    main()
