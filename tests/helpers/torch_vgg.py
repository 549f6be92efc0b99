"""The networks of Table 1 in PyTorch, written from the paper's table, to compare with. Imported by tests only where torch is there."""

import numpy as np
import torch
from torch import nn

STAGES = {
    "A": [[64], [128], [256, 256], [512, 512], [512, 512]],
    "A-LRN": [[64, "lrn"], [128], [256, 256], [512, 512], [512, 512]],
    "B": [[64, 64], [128, 128], [256, 256], [512, 512], [512, 512]],
    "C": [[64, 64], [128, 128], [256, 256, (256, 1)], [512, 512, (512, 1)], [512, 512, (512, 1)]],
    "D": [[64, 64], [128, 128], [256] * 3, [512] * 3, [512] * 3],
    "E": [[64, 64], [128, 128], [256] * 4, [512] * 4, [512] * 4],
    "B-5x5": [[(64, 5)], [(128, 5)], [(256, 5)], [(512, 5)], [(512, 5)]],
}


def torch_vgg(net, fc, classes, batch_norm=False, image_size=224, dropout=0.0):
    """A Sequential whose children have the names of the released models."""
    layers, channels = {}, 3
    for i, stage in enumerate(STAGES[net], 1):
        j = 0
        for entry in stage:
            if entry == "lrn":
                layers[f"lrn{i}_{j}"] = nn.LocalResponseNorm(
                    5, alpha=5e-4, beta=0.75, k=2
                )  # PyTorch divides alpha by 5
                continue
            j += 1
            width, kernel = entry if isinstance(entry, tuple) else (entry, 3)
            layers[f"conv{i}_{j}"] = nn.Conv2d(channels, width, kernel, padding=kernel // 2)
            if batch_norm:
                layers[f"bn{i}_{j}"] = nn.BatchNorm2d(width)
            layers[f"relu{i}_{j}"] = nn.ReLU()
            channels = width
        layers[f"pool{i}"] = nn.MaxPool2d(2, 2)
    layers["flatten"] = nn.Flatten()
    channels *= (image_size // 2 ** len(STAGES[net])) ** 2
    for i, width in enumerate(fc, 6):
        layers |= {
            f"fc{i}": nn.Linear(channels, width),
            f"relu{i}": nn.ReLU(),
            f"drop{i}": nn.Dropout(dropout),
        }
        channels = width
    layers["fc8"] = nn.Linear(channels, classes)
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def to_jax(model, window, gradients=False):
    """The parameters of such a model (or their gradients) as `vgg_jax` names and lays them out, and its running statistics."""
    params, batch_stats = {}, {}
    for name, layer in model.named_children():
        if not hasattr(layer, "weight"):
            continue
        weight, bias = (
            (p.grad if gradients else p).detach().numpy() for p in (layer.weight, layer.bias)
        )
        if isinstance(layer, nn.Conv2d):
            params[name] = {"kernel": weight.transpose(2, 3, 1, 0), "bias": bias}
        elif isinstance(layer, nn.BatchNorm2d):
            params[name] = {"scale": weight, "bias": bias}
            batch_stats[name] = {
                "mean": layer.running_mean.numpy(),
                "var": layer.running_var.numpy(),
            }
        elif name == "fc6":  # PyTorch's rows are in the order channel, y, x
            rows = weight.reshape(len(weight), -1, window, window).transpose(2, 3, 1, 0)
            params[name] = {"kernel": rows.reshape(-1, len(weight)), "bias": bias}
        else:
            params[name] = {"kernel": weight.T, "bias": bias}
    return copies(params), copies(batch_stats)


def copies(tree):
    """Of the arrays, which would else change with PyTorch's own when it trains."""
    return {
        name: {key: np.array(value, order="C") for key, value in layer.items()}
        for name, layer in tree.items()
    }


def randomize(model, seed):
    """He's initialisation and non-trivial biases and normalisations, so that every signal and gradient is of a size to be seen."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            layer.weight.data = (
                torch.randn(layer.weight.shape, generator=generator) * (2 / fan_in) ** 0.5
            )
            layer.bias.data = torch.randn(layer.bias.shape, generator=generator) * 0.1
        elif isinstance(layer, nn.BatchNorm2d):
            layer.weight.data = torch.rand(layer.weight.shape, generator=generator) + 0.5
            layer.bias.data = torch.randn(layer.bias.shape, generator=generator) * 0.1
            layer.running_mean = torch.randn(layer.bias.shape, generator=generator) * 0.1
            layer.running_var = torch.rand(layer.bias.shape, generator=generator) + 0.5
    return model


def score_map(model, images, window, ceil=False):
    """(N, K, h, w): the layers applied one by one to images (N, 3, H, W) of any size, fully connected ones as convolutions."""
    x, side = images, window
    for name, layer in model.named_children():
        if isinstance(layer, nn.MaxPool2d):
            x = nn.functional.max_pool2d(x, 2, 2, ceil_mode=ceil)
        elif isinstance(layer, nn.Linear):
            x = nn.functional.conv2d(
                x, layer.weight.reshape(len(layer.weight), -1, side, side), layer.bias
            )
            side = 1
        elif name != "flatten":
            x = layer(x)
    return x


def dense_posterior(model, image, mean_rgb, window, ceil=False, flip=True, softmax_first=False):
    """(K,): the dense evaluation of one uint8 image (H, W, 3) at its own size, written from the paper."""
    x = (torch.from_numpy(image.copy()).float() - torch.tensor(mean_rgb)).permute(2, 0, 1)[None]
    found = []
    for each in [x, x.flip(3)] if flip else [x]:
        scores = score_map(model, each, window, ceil)
        found.append(
            scores.softmax(1).mean((2, 3)) if softmax_first else scores.mean((2, 3)).softmax(1)
        )
    return torch.stack(found).mean(0)[0].detach().double().numpy()
