"""A contact sheet of training images: the photos, their crops, and what evaluation sees."""

import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vgg_jax.errors import InputError, install_hint
from vgg_jax.paths import require_local
from vgg_jax.reporting.crops import Preview, open_preview
from vgg_jax.reporting.text import drawable, shorten_to_width
from vgg_jax.runs.files import check_free, replace_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

ENDINGS = (".png", ".pdf", ".svg")
IMAGES, EPOCHS = 8, 6

# All lengths are in pixels of the sheet.
DPI = 100
MARGIN, GAP = 16, 8
LABEL, LINE = 22, 15  # height of the line above a row, and of a line of small text
CHARACTER = 6.5  # width of a character of small text
CELL = 160  # side of a crop that is enlarged or reduced
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
    return draw(
        open_preview(
            data,
            images,
            epochs,
            data_dir=folder,
            download=download,
            validation=validation,
            classes=classes,
            **settings,
        )
    )


def require_matplotlib() -> None:
    """Raises InputError if matplotlib cannot be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"the preview needs matplotlib, which cannot be imported ({error}): "
            f"{install_hint('report')}"
        ) from error


def describe(preview: Preview) -> tuple[str, str]:
    """Describes a preview in words.

    Args:
        preview: The preview.

    Returns:
        Its images, as "8 of the 1617 images of digits train, epochs 1 to 6"; and what the net sees,
        as "S = 32, random crops of 32 pixels, no flip, no colour shift, Q = 32".
    """
    config, (count, epochs) = preview.config, preview.crops.crops.shape[:2]
    shown = f"all {count}" if count == preview.size else f"{count} of the {preview.size}"
    scales = " to ".join(map(str, sorted({*config.scale})))
    flip = "flip" if config.flip else "no flip"
    shift = f"colour shift {config.colour_shift:g}" if config.colour_shift else "no colour shift"
    return (
        f"{shown} images of {preview.source}, {'epoch' if epochs == 1 else 'epochs 1 to'} {epochs}",
        f"S = {scales}, {config.crop} crops of {config.image_size} pixels, {flip}, {shift}, "
        f"Q = {config.test_scale}",
    )


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
    cell = size * max(1, round(CELL / size)) if size <= 256 else 256
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

    crops, config = preview.crops, preview.config
    sides = layout(preview).sides
    heading = [
        line
        for text in describe(preview)
        for line in textwrap.wrap(text, max(20, int((sides[0] - 2 * MARGIN) / CHARACTER)))
    ]
    cell, photo_width, lefts, tops, (width, height) = layout(preview, len(heading))
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    for i, line in enumerate(heading):
        _write(axes, line, MARGIN, MARGIN + (i + 1) * LINE, colour="black" if i == 0 else GREY)
    epochs = crops.crops.shape[1]
    titles = ["photo", *(f"epoch {epoch + 1}" for epoch in range(epochs))]
    titles.append(f"(centre crop, Q = {config.test_scale})")
    title_base, widths = tops[0] - LABEL - GAP, [photo_width, *[cell] * (epochs + 1)]
    for title, left, column in zip(titles, lefts, widths, strict=True):
        _write(axes, title, left + column / 2, title_base, align="center")
    _write(axes, "evaluation", lefts[-1] + cell / 2, title_base - LINE, align="center")
    for row, top in enumerate(tops):
        _write_names(axes, preview, row, top - 6, width - 2 * MARGIN)
        photo = crops.photos[row]
        photo_sides = fit(photo, cell)
        middle = lefts[0] + (photo_width - photo_sides[0]) // 2
        _show(axes, photo, middle, top + (cell - photo_sides[1]) // 2, photo_sides)
        for panel, left in zip([*crops.crops[row], crops.evaluation[row]], lefts[1:], strict=True):
            _show(axes, panel, left, top, (cell, cell))
    axes.set(xlim=(0, width), ylim=(height, 0))
    return figure


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
    budget = max(24, int(width / CHARACTER)) - 2
    label = preview.classes[preview.crops.labels[row]]
    file = os.path.basename(preview.crops.names[row])
    class_name = shorten_to_width(label, max(budget // 2, budget - len(file)))
    text = _write(axes, class_name, MARGIN, base)
    name, families = drawable(shorten_to_width(file, budget - min(len(class_name), budget // 2)))
    axes.annotate(
        name,
        xy=(1, 0),  # the lower right corner of the first text
        xycoords=text,
        xytext=(7, 0),
        textcoords="offset points",
        color=GREY,
        **_STYLE | {"fontfamily": families, "verticalalignment": "bottom"},
    )


# Names may have dollar signs, and the user's settings may ask for TeX.
_STYLE: dict[str, Any] = {
    "fontsize": 8,
    "parse_math": False,
    "usetex": False,
    "verticalalignment": "baseline",
}


def _write(
    axes: "Axes", text: str, x: float, base: float, *, colour: str = "black", align: str = "left"
) -> "Text":
    """Writes a text whose last line stands on a height."""
    text, families = drawable(text)
    style = _STYLE | {"fontfamily": families, "horizontalalignment": align, "color": colour}
    return axes.text(x, base, text, **style)


def check_out(path: str, overwrite: bool) -> Path:
    """Checks that a sheet can be written to a file.

    Args:
        path: The file.
        overwrite: Replace an existing file.

    Returns:
        The path.

    Raises:
        InputError: The ending is unknown, the folder is missing, or the file exists.
    """
    target = require_local(os.path.expanduser(path), is_output=True)
    if target.suffix.lower() not in ENDINGS:
        raise InputError(f"out is {path!r}: expected a file ending in {', '.join(ENDINGS)}")
    if not target.parent.is_dir() or target.is_dir():
        raise InputError(f"cannot write {path}: expected the name of a file in an existing folder")
    check_free(target, overwrite)
    return target


def save(figure: "Figure", path: Path) -> None:
    """Writes a sheet in one step, so that no half of it is left.

    Args:
        figure: The sheet.
        path: The file, see `check_out`.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        with replace_atomically(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=DPI, bbox_inches=None)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror or error}): expected a file in a folder that "
            "can be written to; pass another --out"
        ) from error
