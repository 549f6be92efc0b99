"""Colours, fonts and sizes of figures, and their formats."""

import contextlib
import html
import io
import re
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vgg_jax.reporting.output import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Text, axes and grid. In an HTML page they take the page's own colours, see `inline_svg`.
INK = "#22262e"
GRID = "#c9ccd1"
COLOURS = ("#2f7fd6", "#d9652b", "#2f9e63", "#a35cc7", "#b8921a", "#6d7684", "#c94f6d", "#1f9aa8")
_SETTINGS: Any = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "text.usetex": False,
    "text.parse_math": False,  # a class name may contain "$"
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's font
    "svg.hashsalt": "vgg_jax",  # equal figures get equal files
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}


@contextlib.contextmanager
def figure_style() -> Iterator[None]:
    """Applies the settings within the block. The user's own settings return after it.

    Raises:
        InputError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """Makes an empty figure, within a block of `figure_style`.

    It belongs to no window, so nothing keeps it once the caller has dropped it.

    Args:
        width: Width in inches.
        height: Height in inches.

    Returns:
        The figure, whose layout fits its labels.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def figure_bytes(figure: "Figure", format: str) -> bytes:
    """Renders a figure.

    Args:
        figure: The figure.
        format: "svg", "png" or "pdf".

    Returns:
        The content of the file.
    """
    buffer = io.BytesIO()
    options: dict[str, Any] = {"metadata": {"Date": None}} if format == "svg" else {}
    with figure_style():
        figure.savefig(buffer, format=format, dpi=150, facecolor="white", **options)
    return buffer.getvalue()


def inline_svg(figure: "Figure", label: str) -> str:
    """Renders a figure for an HTML page, whose colours it takes, light or dark.

    Args:
        figure: The figure.
        label: What the figure shows, for screen readers.

    Returns:
        An <svg> element. It is at most as wide as the figure, and scales down.
    """
    buffer = io.BytesIO()
    with figure_style():
        figure.savefig(buffer, format="svg", dpi=150, transparent=True, metadata={"Date": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    # The identifiers of several figures on a page must differ.
    prefix = f"f{zlib.crc32(text.encode()):08x}-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text)
    width = re.search(r'width="([\d.]+)pt"', text)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    size = f"max-width:{float(width[1]):.0f}pt" if width else ""
    label = html.escape(label, quote=True)
    attributes = f'role="img" aria-label="{label}" style="width:100%;{size}"'
    return text.replace("<svg", f"<svg {attributes}", 1)
