"""Sentences that the pages of results have in common."""

import statistics
from collections.abc import Sequence
from typing import Any


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation in %, of fractions."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def facts(part: dict[str, Any]) -> str:
    """The device, the versions and the commands of a result."""
    commands = part.get("commands", part.get("command", []))
    code = "\n".join([commands] if isinstance(commands, str) else commands)
    known = part.get("versions", {})
    for run in part.get("runs", []):
        known = known | run.get("versions", {})
    versions = ", ".join(f"{name} {version}" for name, version in known.items())
    return f"Machine: {part['device']}. Versions: {versions}.\n\n```text\n{code}\n```"
