"""Files that the commands of this package write, and the packages that they need."""

import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vgg_jax.errors import InputError, install_hint, single_line
from vgg_jax.paths import require_local
from vgg_jax.runs.files import atomic_write, check_free

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_out(path: str | os.PathLike, endings: Sequence[str], overwrite: bool) -> Path:
    """Checks that a file can be written, before the work begins.

    Args:
        path: The file.
        endings: The endings to choose from, such as ".png".
        overwrite: Replace an existing file.

    Returns:
        The path.

    Raises:
        InputError: The ending is another one, the folder is missing or cannot be written to, or the
            file exists.
    """
    target = require_local(os.path.expanduser(path), is_output=True)
    if target.suffix.lower() not in endings:
        raise InputError(f"out is {str(path)!r}: expected a file ending in {', '.join(endings)}")
    if not target.parent.is_dir() or target.is_dir():
        raise InputError(f"cannot write {path}: expected the name of a file in an existing folder")
    check_free(target, overwrite)
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({error.strerror}): expected a folder that can be written to; "
            "pass another --out"
        ) from error
    return target


def write_out(path: Path, content: bytes) -> None:
    """Writes a file in one step, so that no half of it is left.

    Args:
        path: The file, as from `check_out`.
        content: Its bytes.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        atomic_write(path, content)
    except OSError as error:
        raise InputError(
            f"cannot write {path} ({single_line(error.strerror or error)}): expected room in a "
            "folder that can be written to; pass another --out"
        ) from error


def displayable(figure: "Figure") -> "Figure":
    """Lets a notebook show a figure that no window of pyplot holds.

    Args:
        figure: The figure.

    Returns:
        The same figure. Once pyplot is imported, a notebook shows it in the format of its settings.
    """

    def render() -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()

    figure._repr_png_ = render  # type: ignore[attr-defined]
    return figure


def require_matplotlib() -> None:
    """Raises InputError if matplotlib cannot be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"figures need matplotlib, which cannot be imported ({error}): {install_hint('report')}"
        ) from error
