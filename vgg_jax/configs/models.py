"""Table 1 of the paper (arXiv 1409.1556) and the numbers of its section 3, as frozen, hashable data. Imports neither JAX nor TensorFlow."""

import dataclasses
import math
from typing import NamedTuple

from vgg_jax.errors import InputError


class Conv(NamedTuple):
    """A convolution with stride 1 that keeps the size of its input; a ReLU follows it."""

    width: int
    kernel: int = 3


@dataclasses.dataclass(frozen=True)
class VGGConfig:
    """One column of Table 1. A 2x2 max-pool ends each stage; the last fully connected layer comes with the number of classes."""

    stages: tuple[tuple[Conv, ...], ...]
    fc: tuple[int, int] = (4096, 4096)
    lrn: tuple[str, ...] = ()  # the convolutions whose ReLU a local response normalisation follows


def c1(width: int) -> Conv:
    return Conv(width, 1)


def c3(width: int) -> Conv:
    return Conv(width, 3)


def c5(width: int) -> Conv:
    return Conv(width, 5)


CONFIGS = {
    "A": VGGConfig(((c3(64),), (c3(128),), (c3(256),) * 2, (c3(512),) * 2, (c3(512),) * 2)),
    "A-LRN": VGGConfig(
        ((c3(64),), (c3(128),), (c3(256),) * 2, (c3(512),) * 2, (c3(512),) * 2), lrn=("conv1_1",)
    ),
    "B": VGGConfig(((c3(64),) * 2, (c3(128),) * 2, (c3(256),) * 2, (c3(512),) * 2, (c3(512),) * 2)),
    "C": VGGConfig(
        (
            (c3(64),) * 2,
            (c3(128),) * 2,
            (c3(256), c3(256), c1(256)),
            (c3(512), c3(512), c1(512)),
            (c3(512), c3(512), c1(512)),
        )
    ),
    "D": VGGConfig(((c3(64),) * 2, (c3(128),) * 2, (c3(256),) * 3, (c3(512),) * 3, (c3(512),) * 3)),
    "E": VGGConfig(((c3(64),) * 2, (c3(128),) * 2, (c3(256),) * 4, (c3(512),) * 4, (c3(512),) * 4)),
    # §2.3: B with each pair of 3x3 layers replaced by one 5x5 layer, 7 % worse in top-1 error.
    "B-5x5": VGGConfig(((c5(64),), (c5(128),), (c5(256),), (c5(512),), (c5(512),))),
}


class Layer(NamedTuple):
    """One step of the forward pass, by its name in the released models."""

    name: str  # conv3_1, bn3_1, relu3_1, lrn1_1, pool3, fc6, relu6, drop6
    kind: str  # the name without its numbers
    width: int = 0  # the channels that a conv or fc layer puts out
    kernel: int = 0  # the side of the window that a conv or fc layer reads


def layer_table(
    config: VGGConfig, num_classes: int = 1000, batch_norm: bool = False, image_size: int = 224
) -> tuple[Layer, ...]:
    """A configuration written out layer by layer, as in the released models: what the module runs and what the summary counts.

    Raises InputError for an image that the poolings leave nothing of.
    """
    if image_size < 2 ** len(config.stages):
        raise InputError(
            f"image_size is {image_size}: expected at least {2 ** len(config.stages)}, since each stage halves the image"
        )
    if num_classes < 1:
        raise InputError(f"num_classes is {num_classes}: expected at least 1")
    table = []
    for i, stage in enumerate(config.stages, 1):
        for j, conv in enumerate(stage, 1):
            table.append(Layer(f"conv{i}_{j}", "conv", conv.width, conv.kernel))
            if batch_norm:
                table.append(Layer(f"bn{i}_{j}", "bn"))
            table.append(Layer(f"relu{i}_{j}", "relu"))
            if f"conv{i}_{j}" in config.lrn:
                table.append(Layer(f"lrn{i}_{j}", "lrn"))
        table.append(Layer(f"pool{i}", "pool"))
    window = image_size // 2 ** len(
        config.stages
    )  # fc6 reads the whole map of an image of this size
    for i, (width, side) in enumerate(zip(config.fc, (window, 1), strict=True), 6):
        table += [
            Layer(f"fc{i}", "fc", width, side),
            Layer(f"relu{i}", "relu"),
            Layer(f"drop{i}", "drop"),
        ]
    table.append(Layer("fc8", "fc", num_classes, 1))
    return tuple(table)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """The colours of a training set, in the units of 0-255 pixels: what is subtracted, and the basis of the colour shift."""

    mean_rgb: tuple[float, float, float]
    eigenvalues: tuple[float, float, float]  # of the 3x3 covariance of RGB pixels, largest first
    eigenvectors: tuple[
        tuple[float, float, float], ...
    ]  # rows R, G, B; column j belongs to eigenvalue j


IMAGENET = Statistics(
    mean_rgb=(123.68, 116.779, 103.939),  # the mean pixel released with the authors' models
    # fb.resnet.torch has the eigenvalues of pixels scaled to [0, 1].
    eigenvalues=(0.2175 * 255**2, 0.0188 * 255**2, 0.0045 * 255**2),
    eigenvectors=(
        (-0.5675, 0.7192, 0.4009),
        (-0.5808, -0.0045, -0.8140),
        (-0.5836, -0.6948, 0.4203),
    ),
)


CHOICES = {
    "net": tuple(CONFIGS),
    "initializer": ("glorot", "paper", "he"),
    "dtype": ("float32", "bfloat16"),
    "colour_convention": ("deviation", "variance"),
    "statistics": ("imagenet", "measure"),
    "schedule": ("plateau", "step", "constant"),
}
# One crop; the corners and the centre; the whole image; a grid of 5x5 crops; the mean of the last two.
PROTOCOLS = ("center", "ten-crop", "dense", "multi-crop", "both")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How the posteriors of an image are taken (§3.2); the defaults are dense, as in the paper. Raises InputError for another name."""

    name: str = "dense"
    flip: bool | None = (
        None  # the mean with the mirror image's posterior; None: where it is usual, see `mirrored`
    )
    softmax_first: bool = False  # at every position of a map, before their mean; the paper does not say which comes first
    ceil: bool = False  # pooling as in Caffe, an odd side rounded up

    @property
    def mirrored(self) -> bool:
        """Whether the mirror image counts: by default for all but one centre crop."""
        return self.name != "center" if self.flip is None else self.flip

    def __post_init__(self) -> None:
        if self.name not in PROTOCOLS:
            raise InputError(f"protocol is {self.name!r}: expected one of {', '.join(PROTOCOLS)}")


DENSE = Protocol()
PIXELS = 800_000  # of the windows that are computed at once in an evaluation
LARGEST = 2_000_000  # pixels of one image at a test scale: they are computed at once, with net A in 1.7 GB, with D in 2.2, by XLA's plan

ON_NAN = ("stop", "halve")  # what a run does whose loss is not finite
MOST_HALVINGS = 5  # of a run's rate by "halve"
DISTRIBUTED = ("auto", "on", "off")  # whether a run is one of several processes
REDUCE = ("float32", "bfloat16")  # how gradients travel between devices
SAVE_SECONDS = 600  # between two saves within an epoch
OUTPUTS = ("logits", "posteriors", "score_map")  # of an exported program
WRITTEN = (
    "vgg_jax",
    "torchvision",
    "timm",
)  # whose names and order a .safetensors file can be written in


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All that a training run's result depends on. The defaults are the paper's (§3.1); `preset` adapts them to small images.

    Raises InputError for a value that no run can have.
    """

    data: str = "digits"
    net: str = "D"
    batch_norm: bool = False  # not in the paper
    fc: tuple[int, int] = (4096, 4096)
    dropout_rate: float = 0.5
    initializer: str = (
        "glorot"  # the paper's note after submission; see `vgg_jax.model.INITIALIZERS`
    )
    initializer_std: float = (
        0.01  # of "paper"; §3.1 prints a variance of 10⁻², with which every net explodes
    )
    init_from: str | None = None  # the workdir of a finished run, or a file of weights
    freeze: tuple[
        str, ...
    ] = ()  # layers that stay as they are, by name, or "conv" or "fc" for all of them
    dtype: str = "float32"
    image_size: int = 224
    scale: tuple[int, ...] = (256,)  # S, or (S_min, S_max) of the scale jitter
    flip: bool = True
    colour_shift: float = 0.1  # the deviation of Krizhevsky's alpha; 0 turns it off
    colour_convention: str = "deviation"  # times the deviation along a component, or times the variance (pixels in [0, 1])
    exif: bool = True  # turn photos upright as their EXIF orientation says
    statistics: str = "imagenet"
    validation_fraction: float = (
        0.1  # of the training split, where the data has no validation split
    )
    skip_bad: bool = (
        False  # an image that cannot be read counts for nothing, instead of ending the run
    )
    exclude: tuple[
        str, ...
    ] = ()  # images that are left out, by the names that `vgg-jax verify-data` gives them
    cache: bool = False  # the encoded images in memory; of TFRecord files the order of an epoch is then another
    batch_size: int = 256
    microbatch: int | None = (
        None  # examples whose activations are held at once; None: the whole batch
    )
    learning_rate: float | None = None  # None: `presets.with_learning_rate` chooses
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_biases: bool = False  # Caffe's recipes and MatConvNet's VGG do not; the paper is silent
    schedule: str = "plateau"
    patience: int = 5  # epochs without a better validation accuracy; the paper gives no number
    drops: int = 3  # times the plateau divides the rate by 10; the run ends at the next plateau
    drop_epochs: tuple[int, ...] = ()  # of the step schedule
    epochs: int = 74
    seed: int = 0

    @property
    def vgg(self) -> VGGConfig:
        """The net's column of Table 1, with this run's widths of fc6 and fc7."""
        return dataclasses.replace(CONFIGS[self.net], fc=self.fc)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The layers that training leaves as they are: those of `freeze`, with the batch normalisation behind a convolution."""
        names = [
            layer.name
            for layer in self._table
            if layer.kind in ("conv", "fc") and {layer.name, layer.kind} & set(self.freeze)
        ]
        return (
            *names,
            *(
                name.replace("conv", "bn")
                for name in names
                if self.batch_norm and name.startswith("conv")
            ),
        )

    @property
    def _table(self) -> tuple[Layer, ...]:
        return layer_table(self.vgg, image_size=self.image_size)

    @property
    def test_scale(self) -> int:
        """Q = S, or the middle of the jitter's range (§4.1)."""
        return (self.scale[0] + self.scale[-1]) // 2

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} is {getattr(self, name)!r}: expected one of {', '.join(allowed)}"
                )
        if len(self.scale) not in (1, 2) or self.scale[0] > self.scale[-1]:
            raise InputError(
                f"scale is {self.scale}: expected one side S, or S_min and S_max with S_min <= S_max"
            )
        if len(self.fc) != 2 or min(self.fc) < 1:
            raise InputError(f"fc is {self.fc}: expected the two widths of fc6 and fc7")
        learned = [
            layer.name for layer in self._table if layer.kind in ("conv", "fc")
        ]  # raises for an image that is too small
        if unknown := [name for name in self.freeze if name not in ("conv", "fc", *learned)]:
            raise InputError(
                f"freeze is {self.freeze}, and {unknown[0]!r} is no layer: expected conv, fc, or some of {', '.join(learned)}"
            )
        if set(learned) <= set(self.frozen):
            raise InputError(f"freeze is {self.freeze}: expected a layer that is left to train")
        if self.scale[0] < self.image_size:
            raise InputError(
                f"scale is {self.scale}: expected at least the image size, {self.image_size}"
            )
        for name in ("batch_size", "epochs", "patience", "learning_rate", "initializer_std"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} is {value}: expected more than 0")
        for name in ("weight_decay", "colour_shift", "drops"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}: expected 0 or more")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed is {self.seed}: expected at least 0 and less than 2**32")
        if not 0 < self.validation_fraction < 1:
            raise InputError(
                f"validation_fraction is {self.validation_fraction}: expected more than 0 and less than 1"
            )
        for name in ("dropout_rate", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"{name} is {getattr(self, name)}: expected at least 0 and less than 1"
                )
        if self.microbatch is not None and (
            self.microbatch < 1 or self.batch_size % self.microbatch
        ):
            raise InputError(
                f"microbatch is {self.microbatch}: expected a divisor of the batch size, {self.batch_size}"
            )
        if (self.schedule == "step") != bool(self.drop_epochs):
            raise InputError(
                f"schedule is {self.schedule!r} and drop_epochs is {self.drop_epochs}: "
                "expected both or neither, as in --schedule step --drop-epochs 30 60"
            )
        if (
            list(self.drop_epochs) != sorted(set(self.drop_epochs))
            or min(self.drop_epochs, default=1) < 1
        ):
            raise InputError(
                f"drop_epochs is {self.drop_epochs}: expected rising numbers from 1 on"
            )
