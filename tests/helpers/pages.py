"""The pages of the documentation, and the commands and programs in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


# Those in braces are Sphinx directives.
LANGUAGES = {
    "bash",
    "python",
    "html",
    "text",
    "{eval-rst}",
    "{toctree}",
    "{image} images/style_transfer.jpg",
}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert {language for language, _ in found} <= LANGUAGES, page
    return [Block(*block) for block in found]


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block, each as its words. `&&` separates commands."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    split = []
    for line in filter(None, words):
        while "&&" in line:
            split.append(line[: line.index("&&")])
            line = line[line.index("&&") + 1 :]
        split.append(line)
    return split


def prose(page: Path) -> str:
    """The text of a page without its fenced blocks, tables, pictures and comments."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if not re.match(r"\||<!--|!\[|#", line)]
    return "\n".join(lines)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(plain) == len(set(plain)), page
    return set(plain)
