"""PyTorch's side of `parity`: the net, SGD and the schedule, in PyTorch's own operations.

`torch_baseline` uses the net and the sums, too.

Needs torch.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from vgg_jax.configs.models import Layer
from vgg_jax.configs.train import TrainConfig
from vgg_jax.model import VGG
from vgg_jax.weights.layouts import LAYOUTS, tensor_table

# PyTorch's module of a layer, from the layer and its input channels.
_MODULES = {
    "conv": lambda layer, channels, _: nn.Conv2d(
        channels, layer.features, layer.kernel_size, padding=layer.kernel_size // 2
    ),
    "bn": lambda _, channels, __: nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1),
    "relu": lambda *_: nn.ReLU(),
    # PyTorch divides alpha by the 5 channels.
    "lrn": lambda *_: nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0),
    "pool": lambda *_: nn.MaxPool2d(2, 2),
    "fc": lambda layer, channels, _: nn.Linear(channels * layer.kernel_size**2, layer.features),
    "drop": lambda _, __, rate: nn.Dropout(rate),
}


def build_net(model: VGG, variables: dict[str, Any]) -> nn.Sequential:
    """Builds a net in PyTorch, with the weights of ours.

    Args:
        model: Our net.
        variables: Its "params" and "batch_stats".

    Returns:
        A net on the CPU with the dtype of the weights. Its modules have the names of the layers.
    """
    net, channels = nn.Sequential(), model.in_channels
    for layer in model.layers():
        if layer.name == "fc6":
            net.add_module("flatten", nn.Flatten())
        net.add_module(layer.name, _build(layer, channels, model.dropout_rate))
        channels = layer.features or channels
    # This layout has our names of the layers, but reads BGR.
    table = tensor_table(
        LAYOUTS["caffe-pytorch"]._replace(bgr=False),
        model.config,
        model.num_classes,
        model.batch_norm,
        model.image_size,
    )
    tensors = {}
    for tensor in table:
        collection, layer_name, param = tensor.path
        array = tensor.to_foreign(np.asarray(variables[collection][layer_name][param]))
        tensors[tensor.foreign_name] = torch.tensor(array)
    net.to(tensors["conv1_1.weight"].dtype).load_state_dict(tensors)
    return net


def _build(layer: Layer, channels: int, dropout_rate: float) -> nn.Module:
    module: nn.Module = _MODULES[layer.type](layer, channels, dropout_rate)
    return module


class TorchTraining:
    """Training in PyTorch on given batches, as `jax_training.JaxTraining` in vgg_jax.

    Batches have a first axis of steps: "image" uint8 (S, N, H, W, 3), "colour_shift" (S, N, 3),
    "label" int32 (S, N) and "mask" bool (S, N).
    """

    def __init__(
        self,
        config: TrainConfig,
        model: VGG,
        variables: dict[str, Any],
        mean_rgb: tuple[float, float, float],
        steps_per_epoch: int,
    ) -> None:
        assert config.schedule == "cosine" and not config.warmup_epochs
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(config.seed)  # of dropout
        self.net = build_net(model, variables).to(self._device)
        self._mean = np.array(mean_rgb, np.float32)
        kernels = [p for p in self.net.parameters() if p.ndim > 1]
        others = [p for p in self.net.parameters() if p.ndim == 1]
        # Our rate is a float32.
        rate = float(np.float32(config.learning_rate))
        self.optimizer = torch.optim.SGD(
            [
                {"params": kernels, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=rate,
            momentum=config.momentum,
        )
        num_steps = config.epochs * steps_per_epoch
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_steps)

    def train(self, batches: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Trains on the batches. Returns the sums of each step: "loss", "correct", "count"."""
        self.net.train()
        sums = []
        for i in range(len(batches["mask"])):
            logits, labels, loss = self._forward({name: x[i] for name, x in batches.items()})
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self._schedule.step()
            sums.append(step_sums(logits, labels, loss))
        return collect(sums)

    @torch.no_grad()
    def evaluate(self, batches: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Evaluates the batches. Returns the sums of each."""
        self.net.eval()
        rows = range(len(batches["mask"]))
        steps = ({name: x[i] for name, x in batches.items()} for i in rows)
        return collect([step_sums(*self._forward(step)) for step in steps])

    def _forward(
        self, batch: dict[str, np.ndarray]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, labels and mean loss of the examples whose mask is true."""
        mask = batch["mask"]
        shift = batch["colour_shift"][mask][:, None, None]
        images = batch["image"][mask].astype(np.float32) - self._mean + shift
        inputs = torch.from_numpy(images.transpose(0, 3, 1, 2))
        labels = torch.from_numpy(batch["label"][mask].astype(np.int64)).to(self._device)
        dtype = next(self.net.parameters()).dtype
        logits = self.net(inputs.to(self._device, dtype))
        return logits, labels, functional.cross_entropy(logits, labels)


def step_sums(logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """Sums over the examples of a step, which stay on the device.

    Args:
        logits: Logits (N, K).
        labels: Labels (N,).
        loss: The mean loss.

    Returns:
        The summed loss, the number of correct first guesses and the number of examples, float64.
    """
    correct = (logits.detach().argmax(1) == labels).sum()
    count = torch.tensor(len(labels), device=labels.device)
    return torch.stack([loss.detach().double() * count, correct, count])


def collect(sums: list[torch.Tensor]) -> dict[str, np.ndarray]:
    """The `step_sums` of several steps by name: "loss", "correct" and "count", each (steps,)."""
    columns = torch.stack(sums).cpu().numpy().T
    return dict(zip(("loss", "correct", "count"), columns, strict=True))
