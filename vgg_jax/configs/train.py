"""Configuration of a training run (§3.1). Imports neither JAX nor TensorFlow."""

import dataclasses
import math
from collections.abc import Collection
from typing import Any, NamedTuple

from vgg_jax.configs.models import CONFIGS, Layer, VGGConfig, layer_table
from vgg_jax.errors import InputError

DTYPES = ("float32", "bfloat16")  # of the computation
OPTIMIZERS = ("sgd", "adamw")
ON_NAN = ("stop", "halve")  # what a run does after a non-finite loss
MAX_LR_HALVINGS = 5  # halvings of the learning rate in one run, with "halve"
DISTRIBUTED_MODES = ("auto", "on", "off")  # joining the other processes of a run
ALLREDUCE_DTYPES = ("float32", "bfloat16")  # of the gradients sent between devices
SAVE_SECONDS = 600  # between two saves within an epoch
KEEP = 2  # checkpoints in a folder: the previous one replaces the newest if that is damaged
# The fields that say how a run is carried out, not what it is. They may change when it resumes.
# `cache` keeps the pixels of images and crops of at most so many pixels.
MAX_CACHED_PIXELS = 64 * 64
RESUMABLE_CHANGES = ("data", "epochs", "cache", "microbatch")


class _Bounds(NamedTuple):
    """Bounds of a number; None where there is none."""

    above: float | None = None
    at_least: float | None = None
    below: float | None = None

    def contain(self, value: float) -> bool:
        """False for NaN, and for infinity even if there is no upper bound."""
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and value < (math.inf if self.below is None else self.below)
        )

    def __str__(self) -> str:
        lower = f"at least {self.at_least}" if self.above is None else f"more than {self.above}"
        return lower if self.below is None else f"{lower} and less than {self.below}"


def _field(
    default: Any,
    group: str,
    help: str,
    *,
    choices: Collection[str] | None = None,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    **flag: Any,
) -> Any:
    """Declares a field, its valid values, and its flag of `vgg-jax train`.

    Args:
        default: The default value, the paper's where it gives one.
        group: Heading of the flag in `vgg-jax train --help`.
        help: Help text of the flag.
        choices: The valid values. They are read at each check, so a net added to CONFIGS is valid.
        above: Exclusive lower bound.
        at_least: Inclusive lower bound.
        below: Exclusive upper bound.
        **flag: Further arguments of `argparse.ArgumentParser.add_argument`. The type is the
            default's unless `type` is given. With `nargs` "+", `type` and `pattern` are those of
            `vgg_jax.cli.parser.Several`.
    """
    bounds = _Bounds(above, at_least, below)
    metadata = {"group": group, "help": help, "choices": choices, "bounds": bounds, "flag": flag}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    They must not change when the run resumes, except for `RESUMABLE_CHANGES`
    (`vgg_jax.runs.metadata.check_same_run`).

    The defaults are the paper's (§3.1); `vgg_jax.configs.presets.preset` adapts them to small
    images. Each field but `data` is a flag of `vgg-jax train`. Its metadata hold the flag and the
    valid values (`_field`).

    Attributes:
        data: "digits", an image folder, or a name of TensorFlow Datasets.
        net: Column of Table 1, a key of `CONFIGS`.
        batch_norm: Add batch normalisation after every convolution. Not in the paper.
        fc: Output features of fc6 and fc7 (§2.1).
        dropout_rate: Probability to drop an output of fc6 or fc7 (§3.1).
        initializer: Initialisation of the kernels: "glorot", the paper's note after its
            submission; "paper", a normal of `initializer_std` (§3.1); or "he".
        initializer_std: Standard deviation of the initializer "paper".
        init_from: A finished run, a weight file or a name of published weights, whose layers are
            the start. None starts from random parameters. The paper starts from net A (§3.1).
        freeze: Layers that training leaves unchanged: their names, or "conv" or "fc" for all of a
            type. () trains all layers.
        dtype: Type of the computation, "float32" or "bfloat16". Parameters are float32.
        image_size: Side in pixels of the square crop that the net reads (§2.1).
        scale: Training scale S in pixels, to which the shorter side of an image is rescaled. ()
            means the paper's ratio to `image_size`: 256 for 224. The field then has this S. Two
            values, S_min and S_max, draw S for each image (§3.1).
        crop: "random", a random position for each image (§3.1); or "centre".
        flip: Mirror a random half of the images (§3.1).
        colour_shift: Standard deviation of the random shift along the principal colours (§3.1), in
            the unit of `colour_convention`. 0.1 is Krizhevsky's; 0 turns the shift off.
        colour_convention: Unit of `colour_shift`: "deviation", the standard deviation of a
            principal colour; or "variance", its variance for pixels in [0, 1].
        exif: Rotate photos upright by their EXIF orientation.
        statistics: Source of the mean RGB and the principal colours: "imagenet", or "measure" for
            those of the training images.
        validation_fraction: Share of the training images to validate on, between 0 and 1, if the
            data has no validation split.
        skip_bad: Skip files that are not images, and unreadable images: at most 1 %, or one.
            Otherwise they end the run.
        exclude: Names of images to leave out, as `vgg-jax verify-data` lists them. () leaves out
            none.
        cache: Keep the encoded images in memory, or the pixels of small images. This changes the
            order of images from TFRecord files of more than 1 GiB.
        cache_features: Compute the output of the frozen layers once, and keep it in memory. Needs
            images that stay the same: `crop` "centre", one `scale`, no `flip` and no
            `colour_shift`.
        batch_size: Images per step, on all devices together (§3.1).
        microbatch: Images whose activations are held at once, a divisor of `batch_size`. A step
            adds up the gradients. None holds the whole batch.
        class_weights: Weights of the classes in the loss that training minimises: "none", or
            "balanced", inverse to the number of training images of a class, 1 on average over the
            images. A step divides by the number of its images. The losses and accuracies that are
            reported have no weights.
        label_smoothing: Share of the target that is spread evenly over all classes, in the loss
            that training minimises. The losses and accuracies that are reported have none. Not in
            the paper.
        optimizer: "sgd", SGD with momentum (§3.1); or "adamw", which is not in the paper.
        learning_rate: Initial learning rate, or the highest one of "cosine". None means 0.01
            (§3.1), or 0.001 for fewer than 100 classes; or 0.0001 with "adamw". It means less for
            a new head on large pretrained activations
            (`vgg_jax.configs.presets.resolve_learning_rate`).
        momentum: Momentum of SGD (§3.1).
        weight_decay: Factor of the L2 penalty of SGD (§3.1): the gradient of w gains
            weight_decay * w. With "adamw", w loses learning_rate * weight_decay * w in each step.
        decay_biases: Decay biases and batch normalisation parameters too. Caffe's recipes and
            MatConvNet's VGG do not. The paper does not say.
        schedule: When the learning rate is divided by 10: "plateau", when the validation accuracy
            stops improving (§3.1); "step", after `drop_epochs`; or "constant", never. "cosine"
            lowers it in each step instead, by half a cosine from `learning_rate` to 0 at the end
            of `epochs`. It is not in the paper.
        patience: Epochs without a better validation accuracy that make a plateau. The paper gives
            no number.
        drops: Divisions of the learning rate by "plateau" (§3.1). The next plateau ends the run.
        drop_epochs: Epochs after which "step" divides the learning rate, counted from 1.
        warmup_epochs: Epochs in which "cosine" first raises the learning rate from 0, by the same
            amount in each step.
        epochs: Maximum number of epochs (§3.1).
        seed: Seed of every random number, from 0 to 2**32 - 1.

    Raises:
        InputError: If a value is invalid.
    """

    data: str = "digits"

    net: str = _field("D", "model", "column of Table 1", choices=CONFIGS)
    batch_norm: bool = _field(False, "model", "add batch normalisation after every convolution")
    fc: tuple[int, int] = _field(
        (4096, 4096), "model", "output features of fc6 and fc7", type=int, nargs=2
    )
    dropout_rate: float = _field(
        0.5, "model", "dropout rate after fc6 and fc7", at_least=0, below=1
    )
    # "glorot" is the paper's note after its submission; see `vgg_jax.model.INITIALIZERS`.
    initializer: str = _field(
        "glorot", "model", "initialisation of the kernels", choices=("glorot", "paper", "he")
    )
    # §3.1 prints a variance of 10⁻², which diverges (docs/performance.md#initialisation).
    initializer_std: float = _field(
        0.01, "model", "standard deviation for --initializer paper", above=0
    )
    init_from: str | None = _field(
        None,
        "model",
        "start from the layers of a finished run, a weight file, or a name of published weights",
        type=str,
        metavar="RUN_OR_WEIGHTS",
    )
    freeze: tuple[str, ...] = _field(
        (),
        "model",
        "layers that training leaves unchanged: layer names, or conv or fc for all of a type",
        type=str,
        nargs="+",
        pattern=r"(conv|fc)[\d_]*",
        metavar="LAYER",
    )
    dtype: str = _field(
        "float32", "model", "dtype of the computation; parameters are float32", choices=DTYPES
    )

    image_size: int = _field(224, "augmentation", "side of the square crop that the net reads")
    scale: tuple[int, ...] = _field(
        (),
        "augmentation",
        "rescale the shorter side of each image to S, or to a random side from S_min to S_max "
        "(default: 256 for images of 224 pixels, and in this ratio for others)",
        type=int,
        nargs="+",
        metavar="S",
    )
    crop: str = _field(
        "random",
        "augmentation",
        "position of the crop in each training image",
        choices=("random", "centre"),
    )
    flip: bool = _field(True, "augmentation", "mirror a random half of the images")
    colour_shift: float = _field(
        0.1,
        "augmentation",
        "standard deviation of the random shift along the principal colours; 0 turns it off",
        at_least=0,
    )
    colour_convention: str = _field(
        "deviation",
        "augmentation",
        "unit of the colour shift: a principal colour's standard deviation, or its variance",
        choices=("deviation", "variance"),
    )
    exif: bool = _field(True, "augmentation", "rotate photos upright by their EXIF orientation")

    statistics: str = _field(
        "imagenet",
        "data",
        "source of the mean RGB and the principal colours",
        choices=("imagenet", "measure"),
    )
    validation_fraction: float = _field(
        0.1,
        "data",
        "share of the training images to validate on if the data has no validation split",
        above=0,
        below=1,
    )
    skip_bad: bool = _field(
        False,
        "data",
        "skip files that are not images, and unreadable images: at most 1 %%, or one",
    )
    # The flag reads the names from a file, see `vgg_jax.data.read_exclude_list`.
    exclude: tuple[str, ...] = _field(
        (), "data", "leave out the images in a list from verify-data", type=str, metavar="LIST"
    )
    cache: bool = _field(
        False,
        "data",
        "keep the encoded images in memory, or the pixels of small images; "
        "changes the image order of TFRecord files of more than 1 GiB",
    )

    cache_features: bool = _field(
        False,
        "data",
        "compute the output of the frozen layers once and keep it in memory; needs --crop centre, "
        "--no-flip and --colour-shift 0",
    )

    batch_size: int = _field(256, "optimiser", "images per step", above=0)
    microbatch: int | None = _field(
        None,
        "optimiser",
        "images whose activations are held at once; a step adds up their gradients",
        type=int,
    )
    class_weights: str = _field(
        "none",
        "optimiser",
        "weights of the classes in the loss; balanced: inverse to their numbers of images",
        choices=("none", "balanced"),
    )
    label_smoothing: float = _field(
        0.0,
        "optimiser",
        "share of the target that the loss spreads over all classes",
        at_least=0,
        below=1,
    )
    optimizer: str = _field(
        "sgd",
        "optimiser",
        "SGD with momentum, or AdamW, whose weight decay is no L2 penalty",
        choices=OPTIMIZERS,
    )
    # None: `vgg_jax.configs.presets.resolve_learning_rate` chooses.
    learning_rate: float | None = _field(
        None,
        "optimiser",
        "initial learning rate (default: 0.01, or 0.001 for fewer than 100 classes, or 0.0001 for "
        "adamw, and less for a new head on large pretrained activations)",
        type=float,
        above=0,
    )
    momentum: float = _field(0.9, "optimiser", "momentum of SGD", at_least=0, below=1)
    weight_decay: float = _field(
        5e-4,
        "optimiser",
        "sgd: factor of the L2 penalty; adamw: the share of a weight that a step takes away is "
        "this times the learning rate",
        at_least=0,
    )
    decay_biases: bool = _field(
        False, "optimiser", "decay biases and batch normalisation parameters too"
    )

    schedule: str = _field(
        "plateau",
        "schedule",
        "when the learning rate is divided by 10; cosine lowers it to 0 step by step",
        choices=("plateau", "step", "constant", "cosine"),
    )
    patience: int = _field(
        5, "schedule", "plateau: epochs without a better validation accuracy", above=0
    )
    drops: int = _field(
        3,
        "schedule",
        "plateau: divisions of the learning rate; the next plateau ends the run",
        at_least=0,
    )
    drop_epochs: tuple[int, ...] = _field(
        (),
        "schedule",
        "step: epochs after which the learning rate is divided",
        type=int,
        nargs="+",
        metavar="EPOCH",
    )
    warmup_epochs: int = _field(
        0, "schedule", "cosine: first epochs, in which the learning rate rises from 0", at_least=0
    )
    epochs: int = _field(74, "schedule", "maximum number of epochs", above=0)

    seed: int = _field(0, "run", "seed of every random number", at_least=0, below=2**32)

    @property
    def vgg(self) -> VGGConfig:
        """The net's column of Table 1, with this run's `fc`."""
        return dataclasses.replace(CONFIGS[self.net], fc=self.fc)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the layers that training leaves unchanged.

        The batch normalisation after a frozen convolution is frozen as well.
        """
        layers = [layer for layer in self._learned if {layer.name, layer.type} & set(self.freeze)]
        convolutions = [layer.name for layer in layers if layer.type == "conv"]
        batch_norms = [name.replace("conv", "bn") for name in convolutions if self.batch_norm]
        return (*(layer.name for layer in layers), *batch_norms)

    @property
    def feature_layer(self) -> str | None:
        """The last layer before any that training changes. `cache_features` keeps its output.

        None if training changes the first convolution.
        """
        frozen, name = self.frozen, None
        for layer in layer_table(self.vgg, 1, self.batch_norm, self.image_size):
            is_trained = layer.type in ("conv", "bn", "fc") and layer.name not in frozen
            if is_trained or layer.type == "drop":
                break
            name = layer.name
        return name

    @property
    def test_scale(self) -> int:
        """The test scale Q: S, or the middle of the jitter's range (§4.1)."""
        return (self.scale[0] + self.scale[-1]) // 2

    @property
    def _learned(self) -> list[Layer]:
        """The convolutions and fully connected layers. Raises InputError for too small an image."""
        table = layer_table(self.vgg, image_size=self.image_size)
        return [layer for layer in table if layer.type in ("conv", "fc")]

    def __post_init__(self) -> None:
        if not self.scale:  # §3.1 takes crops of 224 pixels at S = 256
            object.__setattr__(self, "scale", (round(self.image_size * 256 / 224),))
        for field in dataclasses.fields(self):
            if field.metadata:
                _check_value(field, getattr(self, field.name))
        _check_sizes(self)
        _check_freeze(self)
        _check_cache_features(self)
        _check_microbatch(self)
        _check_optimizer(self)
        _check_schedule(self)


def _check_value(field: dataclasses.Field, value: Any) -> None:
    """Raises InputError for a value outside the field's choices or bounds."""
    choices, bounds = field.metadata["choices"], field.metadata["bounds"]
    if choices is not None and value not in choices:
        raise InputError(f"{field.name} is {value!r}: expected one of {', '.join(choices)}")
    is_unset = value is None and field.default is None
    if bounds != _Bounds() and not is_unset and not bounds.contain(value):
        raise InputError(f"{field.name} is {value}: expected {bounds}")


def _check_sizes(config: TrainConfig) -> None:
    scale = config.scale
    if len(scale) not in (1, 2) or scale[0] > scale[-1]:
        raise InputError(
            f"scale is {scale}: expected one side S, or S_min and S_max with S_min <= S_max"
        )
    if scale[0] < config.image_size:
        raise InputError(f"scale is {scale}: expected at least the image size, {config.image_size}")
    if len(config.fc) != 2 or min(config.fc) < 1:
        raise InputError(f"fc is {config.fc}: expected the two widths of fc6 and fc7")


def _check_freeze(config: TrainConfig) -> None:
    learned = [layer.name for layer in config._learned]
    unknown = [name for name in config.freeze if name not in ("conv", "fc", *learned)]
    if unknown:
        raise InputError(
            f"freeze is {config.freeze}, and {unknown[0]!r} is not a layer: "
            f"expected conv, fc, or some of {', '.join(learned)}"
        )
    if set(learned) <= set(config.frozen):
        raise InputError(f"freeze is {config.freeze}: expected a layer that is left to train")


def _check_cache_features(config: TrainConfig) -> None:
    if not config.cache_features:
        return
    if config.feature_layer is None:
        raise InputError(
            f"cache_features is set and freeze is {config.freeze}: expected the first layers to be "
            "frozen, as by --freeze conv"
        )
    if config.crop != "centre" or config.flip or config.colour_shift or len(config.scale) > 1:
        raise InputError(
            "cache_features is set, and crops, flips, the colour shift or the scale are random: "
            "expected images that stay the same, by --crop centre --no-flip --colour-shift 0 and "
            "one --scale"
        )


def _check_microbatch(config: TrainConfig) -> None:
    microbatch = config.microbatch
    if microbatch is not None and (microbatch < 1 or config.batch_size % microbatch):
        raise InputError(
            f"microbatch is {microbatch}: expected a divisor of the batch size, {config.batch_size}"
        )


def _check_optimizer(config: TrainConfig) -> None:
    if config.optimizer != "sgd" and config.momentum != TrainConfig.momentum:
        raise InputError(
            f"momentum is {config.momentum} and optimizer is {config.optimizer!r}: expected "
            "momentum with optimizer 'sgd' only"
        )


def _check_schedule(config: TrainConfig) -> None:
    epochs = config.drop_epochs
    if (config.schedule == "step") != bool(epochs):
        raise InputError(
            f"schedule is {config.schedule!r} and drop_epochs is {epochs}: "
            "expected drop_epochs with schedule 'step', and only with it, "
            "as in --schedule step --drop-epochs 30 60"
        )
    if list(epochs) != sorted(set(epochs)) or min(epochs, default=1) < 1:
        raise InputError(f"drop_epochs is {epochs}: expected increasing numbers from 1 on")
    if config.schedule != "cosine" and config.warmup_epochs:
        raise InputError(
            f"schedule is {config.schedule!r} and warmup_epochs is {config.warmup_epochs}: "
            "expected warmup_epochs with schedule 'cosine' only"
        )
    if config.warmup_epochs >= config.epochs:
        raise InputError(
            f"warmup_epochs is {config.warmup_epochs}: expected less than the epochs, "
            f"{config.epochs}"
        )
