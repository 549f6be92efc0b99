"""A JSON file of results that a script extends run by run, so that it can resume.

The file has parts, which may come from different commands. A part has its command, device, versions
and settings, the finished runs, and a summary of them. Several processes may add to one file.
"""

import argparse
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from vgg_jax.errors import InputError
from vgg_jax.runs.files import atomic_write, file_lock

Runs = list[dict[str, Any]]


class ResultPart:
    """One part of a result file.

    Attributes:
        runs: The finished runs that the file had when it was last read.
    """

    def __init__(
        self,
        path: str | Path,
        name: str,
        header: dict[str, Any],
        *,
        key: Collection[str],
        summarize: Callable[[Runs], Any] = lambda runs: None,
    ) -> None:
        """Opens the part, which may be new.

        Args:
            path: The file. It is made by the first `add`.
            name: Key of the part.
            header: What all runs have in common, such as "device", "versions" and "settings".
            key: Names of the values that tell runs apart, such as "seed".
            summarize: Maps all runs to the summary in the file.

        Raises:
            InputError: The file is no such JSON document, or its runs have another header.
        """
        self._path, self._name = Path(path), name
        # As JSON returns it: tuples become lists.
        self._header = json.loads(json.dumps(header))
        self._key, self._summarize = key, summarize
        if not self._path.parent.is_dir():
            raise InputError(f"no folder {str(self._path.parent)!r}: expected one for {path}")
        self.runs: Runs = self._runs_of(self._read())

    def find(self, **values: Any) -> dict[str, Any] | None:
        """Finds the finished run that has these values."""
        matching = (run for run in self.runs if values.items() <= run.items())
        return next(matching, None)

    def add(self, run: dict[str, Any]) -> None:
        """Adds a run and the summary of all runs to the file.

        Runs that other processes have added since are kept. If one of them has the key of this run,
        this run is dropped.

        Args:
            run: The run.

        Raises:
            InputError: The file is no result file any more, or its runs have another header.
        """
        # A writer holds the lock for milliseconds, so nobody is told of the wait.
        lock = self._path.with_name(f"{self._path.name}.lock")
        with file_lock(lock, on_wait=lambda: None):
            document = self._read()
            self.runs = self._runs_of(document)
            if self.find(**{name: run[name] for name in self._key}):
                return
            self.runs.append(run)
            summary = self._summarize(self.runs)
            document[self._name] = self._header | {"summary": summary, "runs": self.runs}
            atomic_write(self._path, (json.dumps(document, indent=1) + "\n").encode())

    def _read(self) -> dict[str, Any]:
        if not self._path.exists():
            return {}
        try:
            document = json.loads(self._path.read_text())
        except (ValueError, OSError) as error:
            raise self._no_result_file() from error
        if not isinstance(document, dict) or not all(map(_is_part, document.values())):
            raise self._no_result_file()
        return document

    def _no_result_file(self) -> InputError:
        return InputError(
            f"{self._path} is no result file: expected JSON of this script; pass another --out"
        )

    def _runs_of(self, document: dict[str, Any]) -> Runs:
        """The runs of the part, whose header must be this one."""
        if self._name not in document:
            return []
        part = document[self._name]
        for name, value in self._header.items():
            # The command may differ in what is no setting, such as the name of the file.
            if name != "command" and part.get(name) != value:
                raise InputError(
                    f"{self._path} has runs with {name} {_difference(part.get(name), value)}: "
                    "expected those of this command; pass another --out"
                )
        return part["runs"]


def _is_part(part: Any) -> bool:
    if not isinstance(part, dict) or not isinstance(part.get("runs"), list):
        return False
    return all(isinstance(run, dict) for run in part["runs"])


def _difference(old: Any, new: Any) -> str:
    """The values of a header that differ: "seeds [0], not [1]"."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{old!r}, not {new!r}"
    names = [name for name in old | new if old.get(name) != new.get(name)]
    return ", ".join(f"{name} {old.get(name)!r}, not {new.get(name)!r}" for name in names)


def make_header(
    module: str, args: argparse.Namespace, packages: Collection[str], not_settings: Collection[str]
) -> dict[str, Any]:
    """Makes the header of a part from the arguments of a command.

    Args:
        module: The module that `python -m` runs.
        args: The arguments, with "part", "data", "out" and "device".
        packages: Packages whose versions are recorded.
        not_settings: Names of further arguments that may differ between runs.

    Returns:
        "command", "device", "versions" and "settings".
    """
    others = {"part", "data", "out", "device", *not_settings}
    found = {package: importlib.metadata.version(package) for package in packages}
    return {
        "command": command_line(module, args.data),
        "device": args.device,
        "versions": {"python": platform.python_version()} | found,
        "settings": {name: value for name, value in vars(args).items() if name not in others},
    }


def command_line(module: str, data: str | None) -> str:
    """The command that runs, without the folders of this machine.

    Args:
        module: The module that `python -m` runs.
        data: The argument that names the images.
    """
    words = [
        Path(word).name if word == data or Path(word).is_absolute() else word
        for word in sys.argv[1:]
    ]
    return shlex.join(["python", "-m", module, *words])


def log(line: str) -> None:
    """Prints a line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)
