"""Exceptions whose message is meant for the user."""

from collections.abc import Sequence

# The exit code if another process of the run ended. `vgg_jax.cli.exit_codes` lists the others.
PROCESS_LOST_EXIT_CODE = 76


class InputError(ValueError):
    """An invalid input.

    The message is one sentence. It names the problem, the value, what was expected and the remedy.
    """


class DataError(InputError):
    """An image, or a file that holds images, cannot be read."""


class OutOfMemoryError(Exception):
    """Memory ran out. The message is one sentence with what would fit."""


def install_hint(extra: str) -> str:
    """Tells how to install an extra of pyproject.toml, for use inside a message."""
    return f"run pip install -e '.[{extra}]' in a clone of vgg_jax"


def single_line(error: BaseException | str, max_length: int | None = 200) -> str:
    """Returns an exception's message on one line, cut to a length, for use inside another message.

    Args:
        error: The exception, or a text.
        max_length: Characters that are kept; None keeps all. Some libraries put a whole stack into
            a message.

    Returns:
        The message with single spaces. It is the class's name if the message is empty.
    """
    return " ".join(str(error).split())[:max_length] or type(error).__name__


def shorten_names(names: Sequence[str], max_names: int = 5) -> str:
    """Lists names, for use inside a message.

    Args:
        names: The names.
        max_names: Number of names that are shown.

    Returns:
        "'ants', 'bees' and 3 more".
    """
    shown = ", ".join(map(repr, names[:max_names]))
    return shown + (f" and {len(names) - max_names} more" if len(names) > max_names else "")
