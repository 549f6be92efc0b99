"""What the scripts beside it share: how they end on a bad input, and how they read what another one prints."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from vgg_jax.errors import InputError


def run(main: Callable[[], None]) -> None:
    """On a bad input one sentence and exit code 2, as `vgg-jax` has it."""
    try:
        main()
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def output_of(command: list[str], **options) -> str:
    """What a command prints; what it says besides is shown. Raises InputError where it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, **options)
    except OSError as error:
        raise InputError(
            f"{command[0]!r} cannot be started: {error.strerror}; expected a command"
        ) from error
    if done.returncode:
        raise InputError(
            f"`{_shown(command)}` ended with exit code {done.returncode}: expected 0; see what it says above"
        )
    return done.stdout


def figure(command: list[str], name: str) -> float:
    """A figure of the JSON object that is the last line of what a command prints. Raises InputError where there is none."""
    last = output_of(command).strip().rpartition("\n")[2]
    try:
        return json.loads(last)[name]
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"`{_shown(command)}` printed {last[:80]!r} last: expected a JSON object with {name!r}"
        ) from error


def _shown(command: list[str]) -> str:
    return textwrap.shorten(" ".join(command), 200)
