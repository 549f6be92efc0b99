"""Images that the net of a weight file was trained with, and their description by a user."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

from vgg_jax.configs.colours import CHANNEL_ORDERS, IMAGE_RANGES
from vgg_jax.errors import InputError
from vgg_jax.weights.layouts import PREPROCESSINGS, Preprocessing, WeightLayout
from vgg_jax.weights.weights import channels_name

_DEFAULTS: dict[str, Any] = {"std": 1.0, "range": "0-255", "channels": "rgb"}
_FIELDS = ("mean", *_DEFAULTS)


class SourceImages(NamedTuple):
    """Images of a file's net: pixels in `range`, less `mean`, divided by `std`.

    Attributes:
        mean: Mean of each channel, in the order of `channels`, on the scale of `range`.
        std: Standard deviation of each channel, likewise.
        range: A key of `IMAGE_RANGES`.
        channels: One of `CHANNEL_ORDERS`; "rgb" if there are not three channels.
        origin: Where the description comes from.
        rounding: One of `ROUNDINGS`, for the centre crop.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    range: str
    channels: str
    origin: str
    rounding: str

    @property
    def bgr(self) -> bool:
        """True if conv1_1 reads blue, green, red."""
        return self.channels == "bgr"

    def to_preprocessing(self) -> Preprocessing:
        """Converts the mean and the std to RGB on the 0-255 scale, and keeps the rounding."""
        scale, order = 255 / IMAGE_RANGES[self.range], -1 if self.bgr else 1
        mean, std = (
            tuple(value * scale for value in values[::order]) for values in (self.mean, self.std)
        )
        return Preprocessing(mean, std, rounding=self.rounding)

    def __str__(self) -> str:
        count = len(self.mean)
        channels = self.channels.upper() if count == 3 else channels_name(count)
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return f"images {channels}, {self.range}, mean ({mean}), std ({std}) ({self.origin})"


def from_preprocessing(colours: Preprocessing, bgr: bool, origin: str) -> SourceImages:
    """Describes images by a mean and a std of RGB pixels on the 0-255 scale, and a rounding.

    Args:
        colours: The mean, the std and the rounding.
        bgr: True if conv1_1 reads blue, green, red.
        origin: Where the description comes from.

    Returns:
        The description, in the order of the file's channels.
    """
    order = -1 if bgr else 1
    mean, std = colours.mean_rgb[::order], colours.std_rgb[::order]
    channels = "bgr" if bgr else "rgb"
    return SourceImages(mean, std, "0-255", channels, origin, colours.rounding)


def parse(
    preprocessing: str | Mapping[str, Any], layout: WeightLayout, in_channels: int
) -> SourceImages:
    """Checks a user's description of the images of a file.

    Args:
        preprocessing: As in `vgg_jax.load`.
        layout: Layout of the file.
        in_channels: Channels that the file's conv1_1 reads.

    Returns:
        The description, complete.

    Raises:
        InputError: A value is not possible, or the description has two readings.
    """
    if isinstance(preprocessing, Mapping):
        return _parse_fields(preprocessing, layout, in_channels)
    if not isinstance(preprocessing, str) or preprocessing not in PREPROCESSINGS:
        raise InputError(
            f"preprocessing is {preprocessing!r}: expected one of {', '.join(PREPROCESSINGS)}, or "
            f"a dict with {', '.join(_FIELDS)}"
        )
    if in_channels != 3:
        raise InputError(
            f"preprocessing is {preprocessing!r} and the net's in_channels is {in_channels}: "
            "expected the mean and the std of its images instead; pass mean and std"
        )
    return from_preprocessing(*PREPROCESSINGS[preprocessing], f"passed: {preprocessing}")


def _parse_fields(
    fields: Mapping[str, Any], layout: WeightLayout, in_channels: int
) -> SourceImages:
    unknown = [name for name in fields if name not in _FIELDS]
    if unknown:
        raise InputError(
            f"preprocessing has {', '.join(map(repr, unknown))}: expected {', '.join(_FIELDS)}"
        )
    # None of these has a default that is right for most nets with such a description.
    if "mean" not in fields:
        raise InputError(
            f"{' and '.join(fields) or 'preprocessing'} without a mean: expected the mean that is "
            "subtracted from the images as well; pass a mean, 0 for none"
        )
    if layout.bgr and in_channels == 3 and "channels" not in fields:
        raise InputError(
            f"mean is given without channels, and most nets in {layout.name}'s layout read BGR: "
            "expected channels rgb or bgr, which is the order of the mean and the std as well"
        )
    values: dict[str, Any] = _DEFAULTS | dict(fields)
    _check_choice("range", values["range"], IMAGE_RANGES)
    _check_choice("channels", values["channels"], CHANNEL_ORDERS)
    if values["channels"] == "bgr" and in_channels != 3:
        raise InputError(
            f"channels is 'bgr' and the net's in_channels is {in_channels}: expected no channels, "
            "which are for three of them"
        )
    mean, std = (_parse_colour(name, values[name], in_channels) for name in ("mean", "std"))
    _check_scale(mean, std, values["range"], "range" in fields)
    default = [name for name in _DEFAULTS if name not in fields]
    explicit = [name for name in _FIELDS if name in fields]
    origin = f"passed: {', '.join(explicit)}" + (f"; default: {', '.join(default)}" * bool(default))
    # Who trained with PyTorch most likely evaluates with it, whatever the mean is.
    rounding = layout.preprocessing.rounding
    return SourceImages(mean, std, values["range"], values["channels"], origin, rounding)


def _check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise InputError(f"{name} is {value!r}: expected one of {', '.join(allowed)}")


def _parse_colour(name: str, value: Any, in_channels: int) -> tuple[float, ...]:
    """Reads one number for all channels, or one for each."""
    if getattr(value, "ndim", None) == 0:  # an array of one number is no list
        value = value.item()
    is_list = isinstance(value, Iterable) and not isinstance(value, str)
    numbers: list[Any] = list(value) if is_list else [value]
    is_finite = all(
        isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x) for x in numbers
    )
    if not is_finite or len(numbers) not in (1, in_channels):
        raise InputError(
            f"{name} is {value!r}: expected one finite number, or one for each of {in_channels} "
            "channels"
        )
    colour = tuple(map(float, numbers))
    return colour * in_channels if len(colour) == 1 else colour


def _check_scale(
    mean: tuple[float, ...], std: tuple[float, ...], image_range: str, is_passed: bool
) -> None:
    """Checks that the mean and the std are of images in the range."""
    largest = IMAGE_RANGES[image_range]
    if min(mean) < 0 or max(mean) > largest:
        raise InputError(
            f"mean is {mean} and range is {image_range!r}: expected numbers from 0 to {largest:g}; "
            "mean and std are given on the scale of the range"
        )
    # Some nets divide by 256 instead of 255, and none by much more than the range.
    if min(std) <= 0 or max(std) > 2 * largest:
        raise InputError(
            f"std is {std} and range is {image_range!r}: expected positive numbers, at most "
            f"{2 * largest:g}; mean and std are given on the scale of the range"
        )
    if max(mean) > 1 > max(std):
        raise InputError(
            f"mean is {mean} and std is {std}, on two scales: expected both on the scale of the "
            f"range, {image_range!r}"
        )
    is_of_unit_range = max(mean) <= 1 and (max(mean) > 0 or max(std) <= 1)
    if is_of_unit_range and not is_passed:
        raise InputError(
            f"mean is {mean} and std is {std}, as if the images were in 0-1: expected a range, "
            "because the default is 0-255; pass range 0-1 or 0-255"
        )


def check_classes(classes: Any, num_classes: int) -> tuple[str, ...]:
    """Checks a user's names of the classes of a net.

    Args:
        classes: The names, in the order of the outputs.
        num_classes: Outputs of the net.

    Returns:
        The names.

    Raises:
        InputError: There is not one name for each class, a name occurs twice or is empty, or the
            classes are not names.
    """
    is_list = isinstance(classes, Sequence) and not isinstance(classes, str)  # a set has no order
    names = tuple(classes) if is_list else ()
    if not is_list or not all(isinstance(name, str) for name in names):
        raise InputError(f"classes is {classes!r}: expected a list of names")
    if len(names) != num_classes:
        raise InputError(
            f"classes has {len(names)} names and the net has {num_classes} classes: "
            "expected one name for each, in the order of the outputs"
        )
    if "" in names:
        raise InputError(f"the name of class {names.index('')} is empty: expected a name for each")
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise InputError(
            f"classes has {', '.join(map(repr, repeated[:5]))} more than once: "
            "expected another name for each class"
        )
    return names
