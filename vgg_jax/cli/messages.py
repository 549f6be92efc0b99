"""Shortens messages for the console."""

import re

MAX_LENGTH = 300
_REMEDY = ": expected "  # what follows tells the user what to do


def shorten(message: str, limit: int = MAX_LENGTH) -> str:
    """Shortens a message to a length, and tells how to see the rest.

    What was expected and what to do stay, if they fit. The list that is too long loses its end.

    Args:
        message: One sentence, such as "problem; problem; problem: expected this; do that".
        limit: Characters that are kept.

    Returns:
        The message, as it is or shortened.
    """
    if len(message) <= limit:
        return message
    head, mark, remedy = message.rpartition(_REMEDY)
    if mark and len(remedy) <= limit // 2:
        remedy = mark + remedy
        return _cut(head, limit - len(remedy)) + remedy
    return _cut(message, limit)


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
    room = limit - len(note)
    return text[: max(text.rfind(" ", room // 2, room + 1), 0) or room] + note
