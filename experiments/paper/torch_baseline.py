"""Trains the net of `baseline.py` in PyTorch, from the same weights on the same images.

    python -m experiments.paper.baseline digits --frameworks torch …

`baseline.py` calls it. The order of the images and the normalisation are the same, too. The loss
is PyTorch's, and so are the optimizers, the schedule and batch normalisation. Batch normalisation
has the same momentum and ε in both, and an unbiased running variance. Dropout has its own random
numbers. Needs torch.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from experiments.paper.baseline_images import Rgb, crop_images
from experiments.paper.framework_curves import means
from experiments.paper.scan_training import EVAL_BATCH, Data, make_programs, padded_order
from experiments.paper.torch_training import build_net, collect, step_sums
from vgg_jax.configs.train import TrainConfig
from vgg_jax.model import VGG


class Split(NamedTuple):
    """The crops of a split, uint8 (n, H, W, 3), and their labels (n,)."""

    crops: np.ndarray
    labels: np.ndarray


def train(
    config: TrainConfig,
    model: VGG,
    data: Data,
    std_rgb: Rgb,
    on_epoch: Callable[[dict[str, Any]], None] = lambda epoch: None,
) -> nn.Sequential:
    """Trains the net, as `scan_training.train` does in JAX.

    Args:
        config: Settings of the run. Its crops are not random. "adamw" has no weight decay, which
            makes it Adam.
        model: The net in JAX.
        data: The images.
        std_rgb: Deviation of each channel on the 0-255 scale.
        on_epoch: Receives the "loss" and "accuracy" of "train" and "validation" for each epoch.

    Returns:
        The trained net.
    """
    torch.manual_seed(config.seed)  # of dropout
    start = make_programs(config, model, data).start()
    variables = {"params": start.params, "batch_stats": start.batch_stats}
    net = build_net(model, variables).to(memory_format=torch.channels_last)
    del start, variables
    splits = [
        Split(crop_images(source, config, data), source.labels)
        for source in (data.train, data.validation)
    ]
    row_of = np.full(len(data.train.all_labels) + 1, -1)  # padding, -1, stays -1
    row_of[data.train.indices] = np.arange(data.train.size)
    mean, std = (torch.tensor(rgb)[:, None, None] for rgb in (data.colours.mean_rgb, std_rgb))

    def inputs(crops: np.ndarray) -> torch.Tensor:
        images = (torch.from_numpy(crops).permute(0, 3, 1, 2).float() - mean) / std
        return images.contiguous(memory_format=torch.channels_last)

    optimizer = make_optimizer(config, net)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, config.drop_epochs, gamma=0.1)
    for epoch in range(config.epochs):
        net.train()
        sums = []
        for rows in row_of[padded_order(data.train, config, epoch)]:
            rows = rows[rows >= 0]
            labels = torch.from_numpy(splits[0].labels[rows]).long()
            logits = net(inputs(splits[0].crops[rows]))
            loss = nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums.append(step_sums(logits, labels, loss))
        schedule.step()
        on_epoch({"train": means(collect(sums)), "validation": evaluate(net, splits[1], inputs)})
    return net


def make_optimizer(config: TrainConfig, net: nn.Module) -> torch.optim.Optimizer:
    rate = config.learning_rate
    if config.optimizer == "adamw":
        return torch.optim.Adam(net.parameters(), rate)
    return torch.optim.SGD(net.parameters(), rate, momentum=config.momentum)


@torch.no_grad()
def evaluate(
    net: nn.Sequential, split: Split, inputs: Callable[[np.ndarray], torch.Tensor]
) -> dict[str, float]:
    """The loss and the accuracy, with the running statistics and without dropout."""
    net.eval()
    sums = []
    for start in range(0, len(split.labels), EVAL_BATCH):
        rows = slice(start, start + EVAL_BATCH)
        labels = torch.from_numpy(split.labels[rows]).long()
        logits = net(inputs(split.crops[rows]))
        sums.append(step_sums(logits, labels, nn.functional.cross_entropy(logits, labels)))
    return means(collect(sums))
