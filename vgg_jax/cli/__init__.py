"""The command line: runs a command, and turns its errors into one sentence and an exit code."""

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Sequence

from vgg_jax.cli.commands import COMMANDS, predict, train
from vgg_jax.cli.exit_codes import ExitCode, explain
from vgg_jax.cli.logs import configure_logging, log_python_warnings
from vgg_jax.cli.messages import shorten
from vgg_jax.cli.parser import parse_args
from vgg_jax.runtime.compilation_cache import enable_compilation_cache
from vgg_jax.runtime.memory import use_huge_pages
from vgg_jax.runtime.signals import exit_on_second_signal


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command of `vgg-jax`.

    Args:
        argv: The arguments. None means those of this program. The process then belongs to the
            command: it may start again with huge pages, and it exits at once after an error.

    Returns:
        The exit code, see `vgg_jax.cli.exit_codes.ExitCode`.
    """
    _prepare_streams()
    arguments = parse_args(argv)
    command, verbose = COMMANDS[arguments.pop("command")], arguments.pop("verbose")
    if command is train:
        arguments["command_line"] = shlex.join(
            ["vgg-jax", *(sys.argv[1:] if argv is None else argv)]
        )
    configure_logging(results_only=command is predict, verbose=verbose)
    if argv is None:
        log_python_warnings()
    if argv is None and command is train:
        use_huge_pages()
        exit_on_second_signal()
    try:
        if arguments.pop("compilation_cache", False):
            enable_compilation_cache()
        code = int(command(**arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, `head` for example, has had enough. Python would flush the rest at its exit.
        with contextlib.suppress(OSError):  # a stream of a test has no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.PIPE_CLOSED
    except (Exception, KeyboardInterrupt) as error:
        explanation = explain(error, arguments)
        if explanation is None:
            raise
        code, message = explanation
        message = f"vgg-jax: {message}"
        print(message if verbose else shorten(message), file=sys.stderr)
    if argv is None and code:
        # Ends at once: threads that still compile or write are not waited for.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _prepare_streams() -> None:
    """Lets stdout and stderr take every name. A stream that the shell has closed takes nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # as by `>&-`; `print` would take stdout for stderr
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            # A name of a file or a class may have characters that the terminal cannot show.
            stream.reconfigure(errors="backslashreplace")
