"""All that a training run depends on (§3.1). Imports neither JAX nor TensorFlow."""

import dataclasses
import math

from vgg_jax.configs.models import CONFIGS, Layer, VGGConfig, layer_table
from vgg_jax.errors import InputError

CHOICES = {
    "net": tuple(CONFIGS),
    "initializer": ("glorot", "paper", "he"),
    "dtype": ("float32", "bfloat16"),
    "colour_convention": ("deviation", "variance"),
    "statistics": ("imagenet", "measure"),
    "schedule": ("plateau", "step", "constant"),
}


ON_NAN = ("stop", "halve")  # what a run does whose loss is not finite


MAX_LR_HALVINGS = 5  # of a run's rate by "halve"


DISTRIBUTED_MODES = ("auto", "on", "off")  # whether a run is one of several processes


ALLREDUCE_DTYPES = ("float32", "bfloat16")  # how gradients travel between devices


SAVE_SECONDS = 600  # between two saves within an epoch


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
            if layer.type in ("conv", "fc") and {layer.name, layer.type} & set(self.freeze)
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
            layer.name for layer in self._table if layer.type in ("conv", "fc")
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
