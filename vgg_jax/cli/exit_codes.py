"""Exit codes of the command line."""

import enum
import re
import sys
from collections.abc import Mapping
from typing import Any

from vgg_jax.errors import (
    PROCESS_LOST_EXIT_CODE,
    DataError,
    InputError,
    OutOfMemoryError,
    install_hint,
    single_line,
)
from vgg_jax.paths import is_remote, is_store_error
from vgg_jax.runtime.memory import is_out_of_memory
from vgg_jax.runtime.signals import Terminated


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
    OUT_OF_MEMORY = 71  # the memory of this machine or of an accelerator does not suffice
    NOT_SAVED = 74  # the end of a run could not be saved
    STOPPED = 75  # a run was stopped by a signal; the same command resumes it
    PROCESS_LOST = PROCESS_LOST_EXIT_CODE  # 76: another process of the run ended
    INTERRUPTED = 130  # Ctrl-C
    PIPE_CLOSED = 141  # the reader of the output, such as head, ended first; as after SIGPIPE
    TERMINATED = 143  # SIGTERM


def _platform_fault() -> str | None:
    """Tells why jax has no devices, if a command has imported it. Its own error may be empty."""
    jax: Any = sys.modules.get("jax")
    try:
        if jax is not None:
            jax.devices()
    except Exception as error:
        reason = f" ({single_line(error)})" if str(error) else ""
        return (
            f"JAX_PLATFORMS is {jax.config.jax_platforms!r}, and jax finds no such device{reason}: "
            "expected a platform of this machine, such as cpu; unset it, or install jax for that "
            "platform, for example by pip install 'jax[cuda13]'"
        )
    return None


def _memory_remedy(arguments: Mapping[str, Any]) -> str:
    """Names the flags of the command that take less memory."""
    if "pixels" in arguments:
        return f"pass fewer --pixels than {arguments['pixels']}, or smaller --scales"
    if "batch_size" in arguments or "command_line" in arguments:  # `train` has its own defaults
        cache = ", or leave out --cache" if arguments.get("cache") else ""
        return f"pass a smaller --microbatch or --batch-size{cache}"
    if "scales" in arguments:
        return "pass smaller --scales or images, or --protocol center"
    return "close other programs, or use a machine with more memory"


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
        case OutOfMemoryError():
            return ExitCode.OUT_OF_MEMORY, message
        case _ if is_out_of_memory(error):
            remedy = _memory_remedy(arguments)
            return ExitCode.OUT_OF_MEMORY, f"out of memory ({single_line(error)}): {remedy}"
        case OSError():  # a full disk or a folder without permission; the message has the path
            return ExitCode.BAD_INPUT, str(error)
        case Terminated():
            return ExitCode.TERMINATED, "ended by SIGTERM"
        case KeyboardInterrupt():
            return ExitCode.INTERRUPTED, "interrupted"
    # jax reads its variables while it is imported.
    if match := re.search(r"(?:for environment '|for JAX flag )(jax_\w+)", message, re.IGNORECASE):
        return ExitCode.BAD_INPUT, f"{message}: correct or unset {match[1].upper()}"
    if (fault := _platform_fault()) is not None:
        return ExitCode.BAD_INPUT, fault
    uses_store = any(is_remote(str(value)) for value in arguments.values())
    if uses_store and is_store_error(error):
        return ExitCode.STORE_FAILED, f"the object store cannot be used ({message[:300]})"
    return None
