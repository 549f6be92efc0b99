"""How a trained net is evaluated (§3.2)."""

import dataclasses

from vgg_jax.errors import InputError

# One crop; the corners and the centre; the whole image; a grid of 5x5 crops; the mean of the last two.
PROTOCOLS = ("center", "ten-crop", "dense", "multi-crop", "both")


@dataclasses.dataclass(frozen=True)
class EvalProtocol:
    """How the posteriors of an image are taken (§3.2); the defaults are dense, as in the paper. Raises InputError for another name."""

    name: str = "dense"
    flip: bool | None = (
        None  # the mean with the mirror image's posterior; None: where it is usual, see `use_flip`
    )
    softmax_first: bool = False  # at every position of a map, before their mean; the paper does not say which comes first
    ceil: bool = False  # pooling as in Caffe, an odd side rounded up

    @property
    def use_flip(self) -> bool:
        """Whether the mirror image counts: by default for all but one centre crop."""
        return self.name != "center" if self.flip is None else self.flip

    def __post_init__(self) -> None:
        if self.name not in PROTOCOLS:
            raise InputError(f"protocol is {self.name!r}: expected one of {', '.join(PROTOCOLS)}")


DENSE = EvalProtocol()


MAX_PIXELS_PER_BATCH = 800_000  # of the windows that are computed at once in an evaluation


MAX_IMAGE_PIXELS = 2_000_000  # pixels of one image at a test scale: they are computed at once, with net A in 1.7 GB, with D in 2.2, by XLA's plan
