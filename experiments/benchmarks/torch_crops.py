"""Multi-crop evaluation of a folder in PyTorch: 5x5 crops and their mirror images at each scale, an image at a time; end to end.

    python -m experiments.benchmarks.torch_crops PHOTOS --net A --scale 256 384 512 --images 8

The peer of `bench_evaluate.py --protocol multi-crop`, which runs it. Needs torch and torchvision; prints one JSON line. On two cores
about 6 s an image and scale with net A.
"""

import argparse
import itertools
import json
import pathlib
import time

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.transforms import v2

STAGES = {
    "A": [[64], [128], [256] * 2, [512] * 2, [512] * 2],
    "B": [[64] * 2, [128] * 2, [256] * 2, [512] * 2, [512] * 2],
    "D": [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3],
    "E": [[64] * 2, [128] * 2, [256] * 4, [512] * 4, [512] * 4],
}


def net(stages: list[list[int]]) -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for stage in stages:
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    layers += [
        nn.Flatten(),
        nn.Linear(512 * 49, 4096),
        nn.ReLU(inplace=True),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
    ]
    return (
        nn.Sequential(*layers, nn.Linear(4096, 1000)).eval().to(memory_format=torch.channels_last)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--net", default="A", choices=STAGES)
    parser.add_argument("--scale", type=int, nargs="+", default=[256])
    parser.add_argument("--images", type=int, default=8)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = net(STAGES[args.net])
    resizes = [v2.Resize(scale, antialias=True) for scale in args.scale]
    mean = torch.tensor([123.68, 116.779, 103.939]).view(3, 1, 1)
    files = sorted(pathlib.Path(args.folder).glob("*/*"))[: args.images]
    started = time.perf_counter()
    with torch.inference_mode():
        for file in files:
            photo = torchvision.io.decode_image(str(file), mode="RGB")
            for resize in resizes:
                image = resize(photo).float() - mean
                rows, columns = (
                    np.round(np.linspace(0, side - 224, 5)).astype(int) for side in image.shape[1:]
                )
                crops = torch.stack(
                    [
                        image[:, y : y + 224, x : x + 224]
                        for y, x in itertools.product(rows, columns)
                    ]
                )
                crops = torch.cat([crops, crops.flip(-1)]).contiguous(
                    memory_format=torch.channels_last
                )
                model(crops).softmax(-1).mean(0)
    seconds = time.perf_counter() - started
    print(
        json.dumps(
            vars(args)
            | {"peer": "torch crops", "images_per_second": len(files) / seconds, "seconds": seconds}
        )
    )


if __name__ == "__main__":
    main()
