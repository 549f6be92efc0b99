"""Links from the code to the documentation lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def anchors(path):
    """The anchors of a page's headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_performance_anchors_exist():
    names = anchors(ROOT / "docs" / "performance.md")
    assert len(names) == len(set(names))
    linked = {
        anchor
        for folder in ("vgg_jax", "tests", "experiments")
        for path in (ROOT / folder).rglob("*.py")
        for anchor in re.findall(r"docs/performance\.md#([\w-]+)", path.read_text())
    }
    assert len(linked) > 30
    assert linked <= set(names)
