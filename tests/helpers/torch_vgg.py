"""The nets of Table 1 in PyTorch, written from the paper. Needs torch."""

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
    """Build a Sequential whose children have the names of the released models."""
    layers, channels = {}, 3
    for i, stage in enumerate(STAGES[net], 1):
        j = 0
        for entry in stage:
            if entry == "lrn":
                # PyTorch divides alpha by the 5 channels.
                layers[f"lrn{i}_{j}"] = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)
                continue
            j += 1
            features, size = entry if isinstance(entry, tuple) else (entry, 3)
            layers[f"conv{i}_{j}"] = nn.Conv2d(channels, features, size, padding=size // 2)
            if batch_norm:
                layers[f"bn{i}_{j}"] = nn.BatchNorm2d(features)
            layers[f"relu{i}_{j}"] = nn.ReLU()
            channels = features
        layers[f"pool{i}"] = nn.MaxPool2d(2, 2)
    layers["flatten"] = nn.Flatten()
    channels *= (image_size // 2 ** len(STAGES[net])) ** 2
    for i, features in enumerate(fc, 6):
        layers[f"fc{i}"] = nn.Linear(channels, features)
        layers[f"relu{i}"] = nn.ReLU()
        layers[f"drop{i}"] = nn.Dropout(dropout)
        channels = features
    layers["fc8"] = nn.Linear(channels, classes)
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model


def to_jax(model, window, gradients=False):
    """Convert parameters (or their gradients) and running statistics to `vgg_jax`'s layout.

    Returns `params` and `batch_stats`; `window` is the side of the map that fc6 reads.
    """
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
            mean, var = layer.running_mean.numpy(), layer.running_var.numpy()
            params[name] = {"scale": weight, "bias": bias}
            batch_stats[name] = {"mean": mean, "var": var}
        elif name == "fc6":  # PyTorch's rows are in the order channel, y, x
            rows = weight.reshape(len(weight), -1, window, window).transpose(2, 3, 1, 0)
            params[name] = {"kernel": rows.reshape(-1, len(weight)), "bias": bias}
        else:
            params[name] = {"kernel": weight.T, "bias": bias}
    return copy_arrays(params), copy_arrays(batch_stats)


def copy_arrays(tree):
    """Copy arrays that share memory with PyTorch, which changes them in training."""
    return {
        name: {key: np.array(value, order="C") for key, value in layer.items()}
        for name, layer in tree.items()
    }


def randomize(model, seed):
    """Initialise as He, with biases and statistics that show in every signal and gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shape, std):
        return torch.randn(shape, generator=generator) * std

    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            layer.weight.data = normal(layer.weight.shape, (2 / fan_in) ** 0.5)
            layer.bias.data = normal(layer.bias.shape, 0.1)
        elif isinstance(layer, nn.BatchNorm2d):
            shape = layer.bias.shape
            layer.weight.data = torch.rand(shape, generator=generator) + 0.5
            layer.bias.data = normal(shape, 0.1)
            layer.running_mean = normal(shape, 0.1)
            layer.running_var = torch.rand(shape, generator=generator) + 0.5
    return model


def score_map(model, images, window, ceil=False):
    """Apply the layers to images (N, 3, H, W) of any size, and return the scores (N, K, h, w).

    Fully connected layers are applied as convolutions (§3.2).
    """
    x, size = images, window
    for name, layer in model.named_children():
        if isinstance(layer, nn.MaxPool2d):
            x = nn.functional.max_pool2d(x, 2, 2, ceil_mode=ceil)
        elif isinstance(layer, nn.Linear):
            kernel = layer.weight.reshape(len(layer.weight), -1, size, size)
            x = nn.functional.conv2d(x, kernel, layer.bias)
            size = 1
        elif name != "flatten":
            x = layer(x)
    return x


def dense_posterior(model, image, mean_rgb, window, ceil=False, flip=True, softmax_first=False):
    """Evaluate a uint8 image (H, W, 3) densely, as the paper writes, and return (K,)."""
    x = (torch.from_numpy(image.copy()).float() - torch.tensor(mean_rgb)).permute(2, 0, 1)[None]
    posteriors = []
    for images in [x, x.flip(3)] if flip else [x]:
        scores = score_map(model, images, window, ceil)
        if softmax_first:
            posteriors.append(scores.softmax(1).mean((2, 3)))
        else:
            posteriors.append(scores.mean((2, 3)).softmax(1))
    return torch.stack(posteriors).mean(0)[0].detach().double().numpy()
