"""The first answer of PyTorch, for `first_answer`: a photo's classes, or a training step.

    python -m experiments.benchmarks.torch_first predict vgg16.pth PHOTO.jpg
    python -m experiments.benchmarks.torch_first step --net A --image-size 32 --batch 128
    python -m experiments.benchmarks.torch_first save vgg16.pth

`save` writes a net D with random weights. The photo is resized to a shorter side of 256, as
`vgg-jax predict` does, and the net sees the centre of 224 pixels. The step has random images and
SGD with momentum. Needs torch.
"""

import argparse

import numpy as np
import torch
from PIL import Image
from torch import nn

from experiments.script import HelpFormatter, run

STAGES = {
    "A": [[64], [128], [256] * 2, [512] * 2, [512] * 2],
    "D": [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3],
}


def make_net(name: str, image_size: int, hidden: int, classes: int) -> nn.Sequential:
    """A net of Table 1."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in STAGES[name]:
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    features = channels * (image_size // 32) ** 2
    layers.append(nn.Flatten())
    for inputs in (features, hidden):
        layers += [nn.Linear(inputs, hidden), nn.ReLU(inplace=True), nn.Dropout()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


def predict(file: str, photo: str) -> None:
    """Prints the five most probable classes of a photo."""
    with torch.device("meta"):  # without random weights, which are replaced anyway
        net = make_net("D", 224, 4096, 1000)
    net.load_state_dict(torch.load(file, weights_only=True, mmap=True), assign=True)
    image = Image.open(photo).convert("RGB")
    factor = 256 / min(image.size)
    image = image.resize([round(side * factor) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - 224) // 2 for side in image.size)
    crop = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    pixels = (crop - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    batch = torch.from_numpy(pixels.astype(np.float32).transpose(2, 0, 1)[None].copy())
    with torch.inference_mode():
        print(net.eval()(batch).softmax(1).topk(5))


def step(net_name: str, image_size: int, batch: int) -> None:
    """Trains one step."""
    net = make_net(net_name, image_size, 512 if image_size == 32 else 4096, 10)
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(batch, 3, image_size, image_size)
    loss = nn.functional.cross_entropy(net(images), torch.arange(batch) % 10)
    loss.backward()
    optimizer.step()
    print(loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("predict", "save"):
        command = commands.add_parser(name)
        command.add_argument("file")
        if name == "predict":
            command.add_argument("photo")
    command = commands.add_parser("step")
    command.add_argument("--net", choices=STAGES, required=True)
    command.add_argument("--image-size", type=int, required=True)
    command.add_argument("--batch", type=int, required=True)
    args = parser.parse_args()
    if args.command == "save":
        torch.save(make_net("D", 224, 4096, 1000).state_dict(), args.file)
    elif args.command == "predict":
        predict(args.file, args.photo)
    else:
        step(args.net, args.image_size, args.batch)


if __name__ == "__main__":
    run(main)
