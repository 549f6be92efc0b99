"""Figures of a net: its filters, its activations, and where it looks in a photo."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vgg_jax.evaluation.explain import Explanation
from vgg_jax.reporting.grid import make_grid
from vgg_jax.reporting.style import figure_style, new_figure
from vgg_jax.reporting.text import drawable, shorten_to_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHANNELS = 5  # of each stage that are drawn, beside their mean
MAX_NAME = 36  # characters of a class name above a photo
OPACITY = 0.55  # of a map over a photo


def plot_filters(kernel: np.ndarray) -> "Figure":
    """Draws the kernels of the first convolution as colours.

    Args:
        kernel: (h, w, C, features) for C of 1 or 3 input channels.

    Returns:
        The figure. Each filter is divided by its largest value, and grey is 0. The gaps are
        transparent.
    """
    kernels = np.moveaxis(np.asarray(kernel, np.float32), -1, 0)
    largest = np.abs(kernels).max((1, 2, 3), keepdims=True)
    colours = kernels / np.maximum(largest, 1e-12) / 2 + 0.5
    colours = np.broadcast_to(colours, (*colours.shape[:3], 3))
    opaque = np.ones((*colours.shape[:3], 1), np.float32)
    grid = make_grid(np.concatenate([colours, opaque], -1), gap=1)
    with figure_style():
        figure = new_figure(3.4, 3.4 * grid.shape[0] / grid.shape[1])
        axes = figure.subplots()
        axes.imshow(grid, interpolation="nearest")
        axes.set_axis_off()
    return figure


def plot_activations(activations: Mapping[str, np.ndarray]) -> "Figure":
    """Draws the activations of one image, a row for each layer.

    Args:
        activations: Maps (h, w, C) by name of the layer.

    Returns:
        The figure: the mean over the channels, and the channels with the largest means.
    """
    with figure_style():
        figure = new_figure(5.0, 0.25 + 0.85 * len(activations))
        panels = figure.subplots(len(activations), 1 + CHANNELS, squeeze=False)
        for row, (name, maps) in zip(panels, activations.items(), strict=True):
            means = maps.mean((0, 1))
            channels = np.argsort(-means, kind="stable")[:CHANNELS]
            shown = [maps.mean(-1), *(maps[..., channel] for channel in channels)]
            for axes, image in zip(row, shown, strict=False):
                axes.imshow(image, cmap="magma", interpolation="nearest")
            for axes in row:
                axes.set_axis_off()
            row[0].set_title(name, fontsize=8, pad=2)
            for axes, channel in zip(row[1:], channels, strict=False):
                axes.set_title(str(channel), fontsize=8, pad=2)
    return figure


def plot_explanation(
    photo: np.ndarray, explanation: Explanation, classes: Sequence[str]
) -> "Figure":
    """Draws a photo, its score map and Grad-CAM side by side.

    Args:
        photo: uint8 (H, W, 3), at the test scale.
        explanation: The maps.
        classes: Names of the classes.

    Returns:
        The figure.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    index = explanation.class_index
    name, families = drawable(shorten_to_width(str(classes[index]), MAX_NAME))
    posterior = explanation.posterior[index]
    cam = explanation.grad_cam
    h, w = explanation.score_map.shape
    windows = "1 window" if h * w == 1 else f"{h} x {w} windows"
    panels = (
        (photo, f"{name}\n{posterior:.1%}", None),
        (
            score_overlay(photo, explanation),
            f"posterior of the class\nin {windows}",
            1.0,
        ),
        (cam_overlay(photo, explanation), f"Grad-CAM\nat {explanation.layer}", float(cam.max())),
    )
    height, width = photo.shape[:2]
    with figure_style():
        # Inches. A tall photo gets narrow panels, but not narrower than their titles.
        panel = float(np.clip(3.2 * 1.6 * width / height, 2.0, 3.2))
        photo_height = panel * height / width
        figure = new_figure(3 * panel, 0.95 + photo_height)
        rows = figure.subplots(2, 3, height_ratios=(photo_height, 0.12), squeeze=False)
        for (axes, bar), (image, title, largest) in zip(rows.T, panels, strict=True):
            axes.imshow(image)
            axes.set_title(title, fontfamily=families)
            axes.set_axis_off()
            bar.set_axis_off()
            if largest is not None:
                bar.set_axis_on()
                bar.grid(False)
                scale = ScalarMappable(Normalize(0, largest or 1.0), "inferno")
                ticks = np.linspace(0, scale.norm.vmax or 1.0, 3)
                figure.colorbar(
                    scale, cax=bar, orientation="horizontal", ticks=ticks, format="%.2g"
                )
    return figure


def score_overlay(photo: np.ndarray, explanation: Explanation) -> np.ndarray:
    """Paints the posterior of a class in each window over a photo.

    Each value is painted at the centre of its window. The border has the nearest value.

    Args:
        photo: uint8 (H, W, 3).
        explanation: The maps.

    Returns:
        uint8 (H, W, 3).
    """
    values = explanation.posterior_map
    coordinates = []
    for side, count in zip(photo.shape[:2], values.shape, strict=True):
        centres = (np.arange(side) + 0.5 - explanation.window / 2) / explanation.stride
        coordinates.append(np.clip(centres, 0, count - 1))
    return _paint(photo, _bilinear(values, *coordinates))


def cam_overlay(photo: np.ndarray, explanation: Explanation) -> np.ndarray:
    """Paints Grad-CAM over a photo, divided by its largest value.

    Args:
        photo: uint8 (H, W, 3).
        explanation: The maps.

    Returns:
        uint8 (H, W, 3).
    """
    cam = explanation.grad_cam / max(float(explanation.grad_cam.max()), 1e-12)
    coordinates = [
        np.clip((np.arange(side) + 0.5) / explanation.cam_stride - 0.5, 0, count - 1)
        for side, count in zip(photo.shape[:2], cam.shape, strict=True)
    ]
    return _paint(photo, _bilinear(cam, *coordinates))


def _bilinear(values: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """Interpolates values (h, w) at fractional rows and columns within them."""
    for axis, coordinates in enumerate((ys, xs)):
        first = np.minimum(coordinates.astype(int), max(values.shape[axis] - 2, 0))
        second = np.minimum(first + 1, values.shape[axis] - 1)
        share = (coordinates - first).reshape((-1, 1) if axis == 0 else (1, -1))
        values = values.take(first, axis) * (1 - share) + values.take(second, axis) * share
    return values


def _paint(photo: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Blends values from 0 to 1 (H, W), as colours, with the grey photo."""
    from matplotlib import colormaps

    colours = colormaps["inferno"](np.clip(heat, 0, 1))[..., :3] * 255
    grey = np.repeat(photo.mean(-1, keepdims=True), 3, -1)
    return (OPACITY * colours + (1 - OPACITY) * grey + 0.5).astype(np.uint8)
