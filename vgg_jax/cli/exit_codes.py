"""Exit codes of the command line."""

import enum
from collections.abc import Mapping
from typing import Any

from vgg_jax.errors import PROCESS_LOST_EXIT_CODE, DataError, InputError, install_hint
from vgg_jax.paths import is_remote, is_store_error


class ExitCode(enum.IntEnum):
    """Exit codes of `vgg-jax`. The codes from 64 to 78 follow sysexits.h.

    `explain` gives the codes of errors. The commands return the others.
    """

    DONE = 0
    CHECK_FAILED = 1  # verify, import --check or selfcheck found a difference
    BAD_INPUT = 2  # also a missing package, and a file that cannot be opened or written
    BAD_IMAGE = 3  # an image that cannot be read
    DIVERGED = 4  # a non-finite loss
    STORE_FAILED = 69  # the object store cannot be used
    NOT_SAVED = 74  # the end of a run could not be saved
    STOPPED = 75  # a run was stopped by a signal; the same command resumes it
    PROCESS_LOST = PROCESS_LOST_EXIT_CODE  # 76: another process of the run ended
    INTERRUPTED = 130  # Ctrl-C
    PIPE_CLOSED = 141  # the reader of the output, such as head, ended first; as after SIGPIPE


def explain(error: BaseException, arguments: Mapping[str, Any]) -> tuple[ExitCode, str] | None:
    """Turns an error into an exit code and a message.

    Args:
        error: An error that a command raised.
        arguments: The arguments of the command.

    Returns:
        The code and one sentence for the user, or None if the error is a bug.
    """
    message = " ".join(str(error).split())
    match error:
        case DataError():
            return ExitCode.BAD_IMAGE, message
        case InputError():
            return ExitCode.BAD_INPUT, message
        case ModuleNotFoundError(name=name) if not str(name).startswith("vgg_jax"):
            return ExitCode.BAD_INPUT, f"this command needs {name}: {install_hint('train')}"
        case OSError():  # a full disk or a folder without permission; the message has the path
            return ExitCode.BAD_INPUT, str(error)
        case KeyboardInterrupt():
            return ExitCode.INTERRUPTED, "interrupted"
    uses_store = any(is_remote(str(value)) for value in arguments.values())
    if uses_store and is_store_error(error):
        return ExitCode.STORE_FAILED, f"the object store cannot be used ({message[:300]})"
    return None
