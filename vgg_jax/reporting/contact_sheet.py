"""A contact sheet of training images: the photos, their crops, and what evaluation sees."""

import io
import math
import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vgg_jax.reporting.crops import Preview, describe, open_preview
from vgg_jax.reporting.output import displayable, require_matplotlib
from vgg_jax.reporting.text import drawable, shorten_to_width, text_width

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDINGS = (".png", ".pdf", ".svg")
IMAGES, EPOCHS = 8, 6

# All lengths are in pixels of the sheet.
DPI = 100
MARGIN, GAP = 16, 8
LABEL, LINE = 22, 15  # height of the line above a row, and of a line of small text
CHARACTER = 6.5  # width of a character of small text
MIN_CELL, MAX_CELL = 144, 256  # sides below which a crop is enlarged, and above which reduced
PHOTO_RATIO = 1.5  # width of the column of photos, in crops
FRAME, GREY = "0.8", "0.45"


class Layout(NamedTuple):
    """Positions of the panels, in pixels from the top left corner."""

    cell: int  # side of a crop
    photo_width: int  # of the widest photo
    lefts: tuple[int, ...]  # of the columns
    tops: tuple[int, ...]  # of the rows
    sides: tuple[int, int]  # width and height of the sheet


def preview(
    data: Any,
    *,
    images: int = IMAGES,
    epochs: int = EPOCHS,
    data_dir: str | os.PathLike | None = None,
    download: bool = False,
    validation: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
    **settings: Any,
) -> "Figure":
    """Draws what the net sees of the first training images, as `vgg-jax preview` does.

    A row has the photo, its crops in the first epochs of training, and the crop of the evaluation.
    The crops are those of training, with its flips and colour shifts.

    Args:
        data: As the first argument of `vgg_jax.fit`: a name or a folder, a path of an .npz file,
            arrays (images, labels), or a TrainConfig.
        images: Maximum number of images. They are the first ones of the first epoch.
        epochs: Number of epochs whose crops are drawn.
        data_dir: Folder of prepared data sets.
        download: Download and prepare the data set first.
        validation: Arrays (images, labels) to validate on, as for `vgg_jax.fit`.
        classes: Names of the classes of arrays.
        **settings: Fields of TrainConfig, if `data` is not one.

    Returns:
        A figure of matplotlib. `figure.savefig("preview.png")` writes it.

    Raises:
        InputError: An argument is wrong, matplotlib is missing, or the data is missing or cannot be
            used.
        DataError: An image cannot be read.
    """
    require_matplotlib()
    folder = None if data_dir is None else os.fspath(data_dir)
    opened = open_preview(
        data,
        images,
        epochs,
        data_dir=folder,
        download=download,
        validation=validation,
        classes=classes,
        **settings,
    )
    return displayable(draw(opened))


def layout(preview: Preview, num_lines: int = 2) -> Layout:
    """Computes the positions of the panels of a sheet.

    Args:
        preview: The preview.
        num_lines: Lines of the heading.

    Returns:
        The positions.
    """
    count, epochs, size = preview.crops.crops.shape[:3]
    # Small crops are enlarged by a whole number, so that their pixels stay squares.
    cell = min(size, MAX_CELL) if size >= MIN_CELL else size * math.ceil(MIN_CELL / size)
    widths = (fit(photo, cell)[0] for photo in preview.crops.photos)
    photo_width = max(cell, *widths)
    first_crop = MARGIN + photo_width + 2 * GAP
    lefts = [MARGIN, *(first_crop + i * (cell + GAP) for i in range(epochs))]
    lefts.append(lefts[-1] + cell + 2 * GAP)
    first_row = MARGIN + (num_lines + 2) * LINE + 2 * GAP
    tops = [first_row + LABEL + i * (cell + LABEL + GAP) for i in range(count)]
    sides = lefts[-1] + cell + MARGIN, tops[-1] + cell + MARGIN
    return Layout(cell, photo_width, tuple(lefts), tuple(tops), sides)


def fit(photo: np.ndarray, cell: int) -> tuple[int, int]:
    """Computes the size at which a whole photo is drawn.

    Args:
        photo: The photo, (H, W, 3).
        cell: Height of the row.

    Returns:
        Width and height in pixels: at most PHOTO_RATIO times the height of the row, and that.
    """
    height, width = photo.shape[:2]
    zoom = min(PHOTO_RATIO * cell / width, cell / height)
    return max(1, round(width * zoom)), max(1, round(height * zoom))


def draw(preview: Preview) -> "Figure":
    """Draws a contact sheet.

    Args:
        preview: The crops and their origin.

    Returns:
        A figure of matplotlib, which belongs to no window and no global state.
    """
    from matplotlib.figure import Figure

    crops = preview.crops
    inner = layout(preview).sides[0] - 2 * MARGIN
    heading = [
        line for text in describe(preview) for line in textwrap.wrap(text, int(inner / CHARACTER))
    ]
    positions = layout(preview, len(heading))
    width, height = positions.sides
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for i, line in enumerate(heading):
        colour = "black" if i == 0 else GREY
        _write(axes, line, MARGIN, MARGIN + (i + 1) * LINE, width=inner, colour=colour)
    _write_titles(axes, preview, positions)
    for row, top in enumerate(positions.tops):
        _write_names(axes, preview, row, top - 6, inner)
        photo, cell = crops.photos[row], positions.cell
        sides = fit(photo, cell)
        _show(axes, photo, positions.lefts[0], top + (cell - sides[1]) // 2, sides)
        panels = [*crops.crops[row], crops.evaluation[row]]
        for panel, left in zip(panels, positions.lefts[1:], strict=True):
            _show(axes, panel, left, top, (cell, cell))
    axes.set(xlim=(0, width), ylim=(height, 0))  # each image has changed them
    return figure


def _write_titles(axes: "Axes", preview: Preview, positions: Layout) -> None:
    """Writes the titles of the columns."""
    epochs = preview.crops.crops.shape[1]
    titles = ["photo", *(f"epoch {epoch + 1}" for epoch in range(epochs)), "evaluation"]
    base, cell = positions.tops[0] - LABEL - GAP - LINE, positions.cell
    for title, left in zip(titles, positions.lefts, strict=True):
        is_last = title == "evaluation"
        _write(axes, title, left, base if is_last else base + LINE, width=cell)
    protocol = f"(centre crop, Q = {preview.config.test_scale})"
    _write(axes, protocol, positions.lefts[-1], base + LINE, width=cell)


def _show(axes: "Axes", image: np.ndarray, left: int, top: int, sides: tuple[int, int]) -> None:
    """Draws an image with a frame of one pixel around it."""
    from matplotlib.patches import Rectangle

    width, height = sides
    frame = (left - 1, top - 1), width + 2, height + 2
    axes.add_patch(Rectangle(*frame, facecolor=FRAME, linewidth=0, zorder=-1))
    is_enlarged = width >= image.shape[1]
    axes.imshow(
        image,
        extent=(left, left + width, top + height, top),
        interpolation="nearest" if is_enlarged else "antialiased",
        aspect="auto",
        resample=True,
    )


def _write_names(axes: "Axes", preview: Preview, row: int, base: float, width: float) -> None:
    """Writes the name of the class, and that of the file, above a row."""
    label = preview.classes[preview.crops.labels[row]]
    used = _write(axes, label, MARGIN, base, width=width / 2) + GAP
    file = os.path.basename(preview.crops.names[row])
    _write(axes, file, MARGIN + used, base, width=width - used, colour=GREY)


def _write(
    axes: "Axes",
    content: str,
    x: float,
    base: float,
    *,
    width: float,
    colour: str = "black",
) -> float:
    """Writes one line, whose middle is left out if it is too wide, and returns its width."""
    shown, families = drawable(content)
    text = axes.text(
        x,
        base,
        shown,
        fontsize=8,
        fontfamily=families,
        color=colour,
        # Names may have dollar signs, and the user's settings may ask for TeX.
        parse_math=False,
        usetex=False,
    )
    length = text_width(content)
    while (actual := text.get_window_extent().width) > width and length > 1:
        length = max(1, min(length - 1, int(length * width / actual)))
        shown, families = drawable(shorten_to_width(content, length))
        text.set(text=shown, fontfamily=families)
    return actual


def sheet_bytes(figure: "Figure", ending: str) -> bytes:
    """Renders a sheet.

    Args:
        figure: The sheet.
        ending: One of `ENDINGS`.

    Returns:
        The content of the file.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending[1:].lower(), dpi=DPI, bbox_inches=None)
    return buffer.getvalue()
