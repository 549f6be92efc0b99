"""What all scripts share: run `main`, show and check flags, read what a command prints."""

import argparse
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vgg_jax.errors import InputError


def run(main: Callable[[], None]) -> None:
    """Runs `main`. A bad input prints one sentence and exits with code 2, as in `vgg-jax`."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows a docstring as it is, and the default of each flag."""

    def add_argument(self, action: argparse.Action) -> None:
        """Adds the default to the help of a flag that has one and does not name it."""
        value, text = action.default, action.help or ""
        is_default = not (value is None or value is False or value in ("", {}, argparse.SUPPRESS))
        if action.option_strings and is_default and "default:" not in text:
            values = value if isinstance(value, list | tuple) else [value]
            shown = "default: " + " ".join(map(str, values)).replace("%", "%%")
            action.help = f"{text}; {shown}" if text else shown
        super().add_argument(action)


def check_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Checks flags that are counts.

    Args:
        args: The parsed flags.
        *names: Names of fields of `args`.

    Raises:
        InputError: A value is smaller than 1.
    """
    for name in names:
        if getattr(args, name) < 1:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} is {getattr(args, name)}: expected at least 1")


def stdout_of(command: list[str], **options: Any) -> str:
    """Runs a command and returns its stdout. Its stderr is shown.

    Args:
        command: The program and its arguments.
        **options: Passed on to `subprocess.run`, for example `env`.

    Raises:
        InputError: The command cannot be started, or its exit code is not 0.
    """
    try:
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True, **options)
    except OSError as error:
        raise InputError(
            f"{command[0]!r} cannot be started: {error.strerror}; expected a command"
        ) from error
    if process.returncode:
        raise InputError(
            f"`{_shorten(command)}` ended with exit code {process.returncode}: expected 0; "
            "its messages are above"
        )
    return process.stdout


def json_result(command: list[str], key: str) -> Any:
    """Runs a command and returns one value of the JSON object on the last line of its stdout.

    Raises:
        InputError: The command fails, or its last line is not a JSON object with this key.
    """
    last_line = stdout_of(command).strip().rpartition("\n")[2]
    try:
        return json.loads(last_line)[key]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"`{_shorten(command)}` printed {last_line[:80]!r} last: "
            f"expected a JSON object with {key!r}"
        ) from error


def _shorten(command: list[str]) -> str:
    return textwrap.shorten(" ".join(command), 200)
