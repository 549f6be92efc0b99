"""Photos of a data set by their position, and what a net makes of them."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vgg_jax.evaluation.evaluate import Evaluation
from vgg_jax.evaluation.explain import Explanation, explain
from vgg_jax.input_data import pick, rescaled_images
from vgg_jax.model import VGG
from vgg_jax.reporting.classes import predicted_classes
from vgg_jax.reporting.net_figures import cam_overlay, score_overlay

if TYPE_CHECKING:
    from vgg_jax.input_data import Source

MAX_SIDE = 224  # pixels of a photo in a report
JPEG_QUALITY = 85


class Picture(NamedTuple):
    """A photo in a gallery.

    Attributes:
        file: Name of the file.
        pixels: Its centre square at the test scale, uint8 (Q, Q, 3).
        label: Its class.
        prediction: The predicted class.
        posterior: Posterior of the predicted class.
        label_posterior: Posterior of its class.
    """

    file: str
    pixels: np.ndarray
    label: str
    prediction: str
    posterior: float
    label_posterior: float


class Look(NamedTuple):
    """Where a net looks in a photo."""

    picture: Picture
    explanation: Explanation
    score_overlay: np.ndarray  # uint8 (Q, Q, 3)
    cam_overlay: np.ndarray  # uint8 (Q, Q, 3)


def read_pictures(
    source: "Source",
    positions: Sequence[int],
    evaluation: Evaluation,
    preprocessing: Mapping[str, Any],
) -> dict[int, Picture]:
    """Reads photos of a source.

    Args:
        source: The images that were evaluated.
        positions: Positions of the photos in the source's order.
        evaluation: The posteriors of the source.
        preprocessing: "scale", "exif" and "rounding", as `vgg_jax.load` returns them.

    Returns:
        The photos by position.

    Raises:
        DataError: A photo cannot be read.
    """
    ordered = sorted(set(positions))
    if not ordered:
        return {}
    predictions = predicted_classes(evaluation)
    examples = rescaled_images(
        pick(source, np.array(ordered)),
        (preprocessing["scale"],),
        preprocessing["exif"],
        preprocessing["rounding"],
    )
    pictures = {}
    for position, example in zip(ordered, examples, strict=True):
        posteriors = evaluation.posteriors[position]
        label, prediction = evaluation.labels[position], predictions[position]
        pictures[position] = Picture(
            file=str(evaluation.files[position]),
            pixels=centre_square(example["scaled"][0][0]),
            label=str(evaluation.classes[label]),
            prediction=str(evaluation.classes[prediction]),
            posterior=float(posteriors[prediction]),
            label_posterior=float(posteriors[label]),
        )
    return pictures


def centre_square(pixels: np.ndarray) -> np.ndarray:
    """The largest square in the middle of an image (H, W, 3)."""
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def look_at(
    model: VGG,
    variables: Mapping[str, Any],
    mean_rgb: tuple[float, ...],
    pictures: Sequence[Picture],
    classes: Sequence[str],
) -> list[Look]:
    """Computes where a net looks in photos, for the classes that it predicts.

    Args:
        model: The net.
        variables: Its variables.
        mean_rgb: Mean of each channel, which is subtracted.
        pictures: The photos, of one size.
        classes: Names of the net's classes.

    Returns:
        The maps of each photo.
    """
    if not pictures:
        return []
    images = np.stack([picture.pixels for picture in pictures])
    indices = [list(classes).index(picture.prediction) for picture in pictures]
    explanations = explain(model, variables, images, mean_rgb=mean_rgb, classes=indices)
    return [
        Look(
            picture,
            explanation,
            score_overlay(picture.pixels, explanation),
            cam_overlay(picture.pixels, explanation),
        )
        for picture, explanation in zip(pictures, explanations, strict=True)
    ]


def jpeg_bytes(pixels: np.ndarray) -> bytes:
    """Encodes pixels (H, W, 3), at most `MAX_SIDE` on each side, as a JPEG file."""
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def data_url(jpeg: bytes) -> str:
    """A JPEG file as the source of an <img>."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
