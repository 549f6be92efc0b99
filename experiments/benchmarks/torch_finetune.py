"""Fine-tunes net D in PyTorch, as `finetune.py` does with `vgg-jax train`.

    python -m experiments.benchmarks.torch_finetune PHOTOS --init-from FILE.h5 --freeze

FILE.h5 has Keras' layout without the fully connected layers. The initialisation of the head, SGD
and the schedule are those of `finetune.py`. Frozen convolutions run once, on centre crops. Free
ones are trained on random crops at a random scale, some of them mirrored, or with --centre on the
same centre crops. Needs torch and h5py.
Prints one JSON line. An epoch of free convolutions takes two minutes on two cores.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn

from experiments.script import HelpFormatter, run

STAGES = [[64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3]
CROP_SIZE = 224
CENTRE_SCALE = 384  # shorter side of the photo
RANDOM_SCALES = (320, 448)
MEAN_BGR = (103.939, 116.779, 123.68)


def read_crop(path: Path, rng: random.Random | None = None) -> np.ndarray:
    """Reads the centre crop, or a random one, uint8 (3, 224, 224), blue first."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    scale = rng.randint(*RANDOM_SCALES) if rng else CENTRE_SCALE
    factor = scale / min(image.size)
    width, height = (round(side * factor) for side in image.size)
    left, top = (width - CROP_SIZE) // 2, (height - CROP_SIZE) // 2
    if rng:
        left, top = rng.randint(0, width - CROP_SIZE), rng.randint(0, height - CROP_SIZE)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    crop = image.crop((left, top, left + CROP_SIZE, top + CROP_SIZE))
    if rng and rng.random() < 0.5:
        crop = ImageOps.mirror(crop)
    return np.ascontiguousarray(np.asarray(crop)[:, :, ::-1].transpose(2, 0, 1))


def read_split(folder: Path, rng: random.Random | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Reads crops, uint8 (n, 3, 224, 224), and labels (n,), without files that are no images."""
    crops, labels = [], []
    for label, class_folder in enumerate(sorted(folder.iterdir())):
        for path in sorted(class_folder.iterdir()):
            try:
                crops.append(read_crop(path, rng))
            except UnidentifiedImageError:
                continue
            labels.append(label)
    return torch.from_numpy(np.stack(crops)), torch.tensor(labels)


def build_convolutions(weights: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    with h5py.File(weights) as file:
        for stage, widths in enumerate(STAGES, 1):
            for index, width in enumerate(widths, 1):
                name = f"block{stage}_conv{index}"
                convolution = nn.Conv2d(channels, width, 3, padding=1)
                kernel = np.asarray(file[name][f"{name}_W_1:0"]).transpose(3, 2, 0, 1)
                bias = np.asarray(file[name][f"{name}_b_1:0"])
                convolution.weight = nn.Parameter(torch.from_numpy(kernel.copy()))
                convolution.bias = nn.Parameter(torch.from_numpy(bias))
                layers += [convolution, nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def build_head(features: int, classes: int, activation_rms: float) -> nn.Sequential:
    """The fully connected layers, by Glorot's rule. The first one's is divided by the RMS."""
    linears = [nn.Linear(512 * 49, features), nn.Linear(features, features)]
    linears.append(nn.Linear(features, classes))
    for linear in linears:
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
    linears[0].weight.data /= activation_rms
    first, second, last = linears
    hidden = [first, nn.ReLU(), nn.Dropout(), second, nn.ReLU(), nn.Dropout()]
    return nn.Sequential(nn.Flatten(), *hidden, last)


def subtract_mean(crops: torch.Tensor) -> torch.Tensor:
    images = crops.float() - torch.tensor(MEAN_BGR).view(3, 1, 1)
    return images.contiguous(memory_format=torch.channels_last)


def run_epoch(
    net: nn.Module,
    split: tuple[torch.Tensor, torch.Tensor],
    order: torch.Tensor,
    batch_size: int,
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[float, float]:
    """Trains on a split, or only evaluates it, and returns its loss and accuracy."""
    inputs, labels = split
    loss_sum, num_correct = 0.0, 0
    net.train(optimizer is not None)
    with torch.set_grad_enabled(optimizer is not None):
        for indices in order.split(batch_size):
            batch = inputs[indices]
            logits = net(subtract_mean(batch) if batch.dtype == torch.uint8 else batch)
            loss = nn.functional.cross_entropy(logits, labels[indices])
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss_sum += loss.item() * len(indices)
            num_correct += int((logits.argmax(1) == labels[indices]).sum())
    return loss_sum / len(labels), num_correct / len(labels)


def fine_tune(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns learning rate, losses, accuracies and seconds of each epoch."""
    train, validation = (read_split(Path(args.photos, name)) for name in ("train", "val"))
    convolutions = build_convolutions(args.init_from)

    @torch.no_grad()
    def compute_features(crops: torch.Tensor) -> torch.Tensor:
        parts = crops.split(args.batch_size)
        return torch.cat([convolutions(subtract_mean(part)) for part in parts])

    if args.freeze:
        train, validation = (
            (compute_features(crops), labels) for crops, labels in (train, validation)
        )
        first_features = train[0][: args.batch_size]
    else:
        first_features = compute_features(train[0][: args.batch_size])
    rms = first_features.square().mean().sqrt().item()
    head = build_head(args.fc, int(train[1].max()) + 1, rms)
    net = head if args.freeze else nn.Sequential(convolutions, head)
    kernels = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in net.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.SGD(
        [{"params": kernels, "weight_decay": 5e-4}, {"params": biases}],
        float(f"{1e-3 / rms**2:.0e}"),
        momentum=0.9,
    )
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=4, threshold=0)
    rng = random.Random(args.seed)
    epochs = []
    for _ in range(args.epochs):
        started = time.perf_counter()
        learning_rate = optimizer.param_groups[0]["lr"]
        if not args.freeze and not args.centre:
            train = read_split(Path(args.photos, "train"), rng)
        order = torch.randperm(len(train[1]))
        train_numbers = run_epoch(net, train, order, args.batch_size, optimizer)
        order = torch.arange(len(validation[1]))
        validation_numbers = run_epoch(net, validation, order, args.batch_size)
        schedule.step(validation_numbers[1])
        epochs.append(
            {
                "learning_rate": learning_rate,
                "train": [round(number, 4) for number in train_numbers],
                "validation": [round(number, 4) for number in validation_numbers],
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    return epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("photos", help="folder with train/CLASS and val/CLASS")
    parser.add_argument("--init-from", required=True, help="convolutions, a .h5 file")
    parser.add_argument("--freeze", action="store_true", help="freeze the convolutions")
    parser.add_argument("--centre", action="store_true", help="free ones see centre crops, too")
    parser.add_argument("--fc", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    print(json.dumps({"torch": torch.__version__, "epochs": fine_tune(args)}))


if __name__ == "__main__":
    run(main)
