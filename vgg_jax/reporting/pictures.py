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
from vgg_jax.preprocessing import centre_offset
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
        class_index: Position of the predicted class among the net's.
        posterior: Posterior of the predicted class.
        label_posterior: Posterior of its class.
    """

    file: str
    pixels: np.ndarray
    label: str
    prediction: str
    class_index: int
    posterior: float
    label_posterior: float


class ExplainedPicture(NamedTuple):
    """A photo with its score map and Grad-CAM."""

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
            pixels=centre_square(example["scaled"][0][0], preprocessing["rounding"]),
            label=str(evaluation.classes[label]),
            prediction=str(evaluation.classes[prediction]),
            class_index=int(prediction),
            posterior=float(posteriors[prediction]),
            label_posterior=float(posteriors[label]),
        )
    return pictures


def centre_square(pixels: np.ndarray, rounding: str) -> np.ndarray:
    """Crops the largest square in the middle of an image, as the evaluation's centre crop.

    Args:
        pixels: The image, (H, W, 3).
        rounding: One of `ROUNDINGS`, for an odd margin.

    Returns:
        The square.
    """
    side = min(pixels.shape[:2])
    top, left = (centre_offset(length, side, rounding) for length in pixels.shape[:2])
    return pixels[top : top + side, left : left + side]


def explain_pictures(
    model: VGG,
    variables: Mapping[str, Any],
    mean_rgb: tuple[float, ...],
    pictures: Sequence[Picture],
) -> list[ExplainedPicture]:
    """Computes the score map and Grad-CAM of photos, for the classes that a net predicts.

    Args:
        model: The net.
        variables: Its variables.
        mean_rgb: Mean of each channel, which is subtracted.
        pictures: The photos, of one size.

    Returns:
        The photos with their maps.
    """
    if not pictures:
        return []
    images = np.stack([picture.pixels for picture in pictures])
    indices = [picture.class_index for picture in pictures]
    explanations = explain(model, variables, images, mean_rgb=mean_rgb, classes=indices)
    return [
        ExplainedPicture(
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
