"""The command line: runs a command, and turns its errors into one sentence and an exit code.

Exit codes: 0 done, 1 a check that did not hold, 2 bad input, 3 an image that cannot be read, 4 diverged, 69 an object store that fails, 74
the end could not be saved, 75 stopped and resumable, 76 ended because another process of the run had, 130 interrupted.
"""

import os
import sys
from collections.abc import Sequence

from vgg_jax.cli.commands import COMMANDS, train
from vgg_jax.cli.parser import parser
from vgg_jax.errors import DataError, InputError
from vgg_jax.paths import is_store_error
from vgg_jax.runtime.compilation_cache import enable_compilation_cache
from vgg_jax.runtime.memory import use_huge_pages
from vgg_jax.runtime.signals import exit_on_second_signal


def main(argv: Sequence[str] | None = None) -> int:
    arguments = vars(parser().parse_args(argv))
    command = COMMANDS[arguments.pop("command")]
    if argv is None and command is train:
        use_huge_pages()
        exit_on_second_signal()
    try:
        if arguments.pop("compilation_cache", False):
            enable_compilation_cache()
        code = command(**arguments)
    except InputError as error:
        print(f"vgg-jax: {' '.join(str(error).split())}", file=sys.stderr)
        code = 3 if isinstance(error, DataError) else 2
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("vgg_jax"):
            raise
        print(
            f"vgg-jax: this command needs {error.name}: pip install 'vgg-jax[train]'",
            file=sys.stderr,
        )
        code = 2
    except (
        OSError
    ) as error:  # a disk that is full, a folder that may not be read: the message has the path
        print(f"vgg-jax: {error}", file=sys.stderr)
        code = 2
    except Exception as error:
        if not (is_store_error(error) and any("://" in str(value) for value in arguments.values())):
            raise
        print(
            f"vgg-jax: the object store cannot be used ({' '.join(str(error).split())[:300]})",
            file=sys.stderr,
        )
        code = 69
    except KeyboardInterrupt:
        print("vgg-jax: interrupted", file=sys.stderr)
        code = 130
    if argv is None and code:  # at once: no thread that still compiles or writes is waited for
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
