"""Output of the package's log messages by the command line."""

import logging
import sys
import warnings
from typing import Any, ClassVar

from vgg_jax.cli.messages import shorten
from vgg_jax.errors import single_line


class _ConsoleHandler(logging.Handler):
    """Prints INFO to stdout as it is, and WARNING and above to stderr as "warning: …".

    With `results_only`, nothing is printed to stdout. Without `verbose`, a warning is shortened.
    What is said about data is printed once, though a command opens the same data several times.

    The streams are looked up at each record, since tests and `os.dup2` replace them. An error of
    a stream, such as a closed pipe, reaches the caller as it does from `print`.
    """

    results_only = False
    verbose = False
    said_about_data: ClassVar[set[str]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = self.format(record)
        if record.name.startswith("vgg_jax.data."):
            if message in self.said_about_data:
                return
            self.said_about_data.add(message)
        if record.levelno >= logging.WARNING:
            message = f"warning: {message}"
            print(message if self.verbose else shorten(message), file=sys.stderr, flush=True)
        else:
            print(message, file=sys.stderr if self.results_only else sys.stdout, flush=True)


def configure_logging(results_only: bool = False, verbose: bool = False) -> None:
    """Prints the log messages of `vgg_jax`. A second call adds no second handler.

    Args:
        results_only: Leave stdout to the results of the command, which other programs may read.
        verbose: Print warnings in full.
    """
    _ConsoleHandler.results_only, _ConsoleHandler.verbose = results_only, verbose
    _ConsoleHandler.said_about_data.clear()
    logger = logging.getLogger("vgg_jax")
    logger.setLevel(logging.INFO)
    if any(isinstance(handler, _ConsoleHandler) for handler in logger.handlers):
        return
    logger.addHandler(_ConsoleHandler())
    # orbax adds a handler to the root logger when it is imported, and each message would be
    # printed twice. If the caller configured a root handler, records also propagate to it.
    logger.propagate = bool(logging.root.handlers)


def log_python_warnings() -> None:
    """Logs the warnings of other libraries in one line, without the place in their code."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        logging.getLogger("vgg_jax").warning(single_line(str(message), None))

    warnings.showwarning = show
