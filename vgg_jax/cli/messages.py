"""Shortens messages for the console."""

import re

MAX_LENGTH = 300
_MIN_HEAD = 60  # characters that are left for the problem itself
_MARKS = (": expected ", "; ")  # what follows tells the user what to do
_LONG_PATH = re.compile(r"(?<![^\s'])(/[^\s']{24})[^\s']{40,}([^\s']{24})")


def shorten(message: str, limit: int = MAX_LENGTH) -> str:
    """Shortens a message to a length, and tells how to see the rest.

    The end, which tells what to do, stays if it fits. Long paths before it lose their middle. If
    that does not suffice, what stands before the end loses its own end, or that of a list.

    Args:
        message: One sentence, such as "problem; problem; problem: expected this; do that".
        limit: Characters that are kept.

    Returns:
        The message, as it is or shortened.
    """
    if len(message) <= limit:
        return message
    remedy = _remedy(message, limit - _MIN_HEAD)
    problem = _LONG_PATH.sub(r"\1…\2", message.removesuffix(remedy))
    length = limit - len(remedy)
    return (problem if len(problem) <= length else _cut(problem, length)) + remedy


def _remedy(message: str, limit: int) -> str:
    """The end of a message: all that was expected, the last clause, or a URL; "" if none fits."""
    for mark in _MARKS:
        remedy = mark + message.rpartition(mark)[2]
        if mark in message and len(remedy) <= limit:
            return remedy
    last_word = " " + message.rpartition(" ")[2]
    return last_word if "://" in last_word and len(last_word) <= limit else ""


def _cut(text: str, limit: int) -> str:
    """Cuts after an item of a list, else after a word, else anywhere."""
    # A comma may be one of a shape in a list of clauses.
    separator = "; " if "; " in text[limit:] else ", "
    ends = [match.start() for match in re.finditer(separator, text)]
    for kept in range(len(ends), 0, -1):
        note = f" … and {len(ends) - kept + 1} more; --verbose lists all"
        # A cut in the first half would lose more than the list.
        if limit // 2 <= ends[kept - 1] <= limit - len(note):
            return text[: ends[kept - 1]] + note
    note = " … (--verbose shows all)"
    length = limit - len(note)
    return text[: max(text.rfind(" ", length // 2, length + 1), 0) or length] + note
