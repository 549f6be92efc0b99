"""Evaluation protocols and their memory limits (§3.2)."""

import dataclasses

from vgg_jax.errors import InputError

PROTOCOLS = (
    "center",  # one crop
    "ten-crop",  # four corners and the centre, each with its mirror image
    "dense",  # the score map of the whole image
    "multi-crop",  # a grid of 5x5 crops
    "both",  # the mean of dense and multi-crop
)

# How the classes of a data set are found among those of a net.
MATCHES = ("exact", "order", "synset", "name")
# How the lengths of a resized image and the place of its centre crop become whole numbers.
ROUNDINGS = (
    "nearest",  # the longer side to the nearest integer, half of an odd margin up
    "torchvision",  # the longer side down, half of an odd margin to the even integer
)


@dataclasses.dataclass(frozen=True)
class EvalProtocol:
    """The computation of an image's class posteriors (§3.2). The paper's default is dense.

    Attributes:
        name: One of `PROTOCOLS`.
        flip: Averages with the posteriors of the mirror image. None: see `use_flip`.
        softmax_first: Applies the soft-max at every position before averaging a dense score map.
            The paper does not give the order.
        ceil: Rounds an odd side up in a pooling, as Caffe does.
        rounding: One of `ROUNDINGS`, for the centre crop. `resolve_protocol` takes the net's own.

    Raises:
        InputError: If the name or the rounding is unknown.
    """

    name: str = "dense"
    flip: bool | None = None
    softmax_first: bool = False
    ceil: bool = False
    rounding: str = "nearest"

    @property
    def use_flip(self) -> bool:
        """True if the mirror image counts: by default for all protocols except "center"."""
        return self.name != "center" if self.flip is None else self.flip

    def __post_init__(self) -> None:
        if self.name not in PROTOCOLS:
            raise InputError(f"protocol is {self.name!r}: expected one of {', '.join(PROTOCOLS)}")
        check_rounding(self.rounding)


def check_rounding(rounding: object) -> None:
    """Raises InputError unless `rounding` is one of `ROUNDINGS`."""
    if rounding not in ROUNDINGS:
        raise InputError(f"rounding is {rounding!r}: expected one of {', '.join(ROUNDINGS)}")


DENSE = EvalProtocol()

# Pixels of the crops or images that are computed at once: they bound the memory of an evaluation.
MAX_PIXELS_PER_BATCH = 800_000

# Pixels of one image at a test scale. Larger images are refused, because one image is computed at
# once (docs/performance.md#largest-image).
MAX_IMAGE_PIXELS = 2_000_000
