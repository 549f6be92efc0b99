"""Texts of any script in a picture of matplotlib."""

import contextlib
import functools
import unicodedata

FONT = "DejaVu Sans"  # comes with matplotlib
BOX = "\N{WHITE SQUARE}"


def drawable(text: str) -> tuple[str, list[str]]:
    """Finds fonts that draw a text without a warning.

    Args:
        text: Any text.

    Returns:
        The text, with a box for each character that no installed font has, and the families of the
        fonts.
    """
    missing = {character for character in text if ord(character) not in _characters(FONT)}
    families = [FONT]
    for family in _other_fonts() if missing else ():
        covered = {character for character in missing if ord(character) in _characters(family)}
        if covered:
            families.append(family)
            missing -= covered
        if not missing:
            break
    return "".join(BOX if character in missing else character for character in text), families


def _other_fonts() -> list[str]:
    """Families of the installed fonts with an upright face of regular weight."""
    from matplotlib.font_manager import fontManager

    names = {
        entry.name
        for entry in fontManager.ttflist
        if entry.style == "normal" and entry.weight in (400, "normal", "regular")
    }
    # The font of last resort has a box for each script.
    return sorted(name for name in names - {FONT} if not name.startswith("Last Resort"))


@functools.cache
def _characters(family: str) -> frozenset[int]:
    """The characters of a font, without those that are not printed."""
    from matplotlib import font_manager

    # A font may have been removed since matplotlib listed it, or may consist of bitmaps.
    with contextlib.suppress(OSError, RuntimeError, ValueError):
        font = font_manager.get_font(font_manager.findfont(family, fallback_to_default=False))
        if font.scalable:
            return frozenset(code for code in font.get_charmap() if chr(code).isprintable())
    return frozenset()


def shorten_to_width(text: str, width: int) -> str:
    """Leaves out the middle of a text that is too wide.

    Args:
        text: The text.
        width: Maximum width, as `text_width` counts it.

    Returns:
        The text, or its beginning and its end around an ellipsis.
    """
    if text_width(text) <= width:
        return text
    head = _prefix(text, (width - 1) // 2)
    tail = _prefix(text[::-1], width - 1 - (width - 1) // 2)[::-1]
    return f"{head}…{tail}"


def text_width(text: str) -> int:
    """Estimates the width of a text, in Latin letters. A Chinese character counts as two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _prefix(text: str, width: int) -> str:
    """The longest beginning of a text that is narrow enough."""
    prefix = text[:width]
    while text_width(prefix) > width:
        prefix = prefix[:-1]
    return prefix
