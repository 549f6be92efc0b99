"""The documentation agrees with the code and with the results, and its links lead somewhere."""

import dataclasses
import importlib.util
import json
import re
import signal
import tomllib

import pytest

import vgg_jax
from tests.helpers.pages import PAGES, ROOT, anchors, blocks, commands, prose
from tools import benchmarks_page, experiments_page
from vgg_jax import CONFIGS, VGG
from vgg_jax.cli.commands import COMMANDS
from vgg_jax.cli.exit_codes import ExitCode
from vgg_jax.cli.parser import parser
from vgg_jax.configs.evaluation import PROTOCOLS
from vgg_jax.summary import summarize, totals

README, TRAINING = ROOT / "README.md", ROOT / "docs" / "training.md"
MARKDOWN = [
    path
    for folder in (".", "docs", "experiments", "experiments/launch")
    for path in sorted((ROOT / folder).glob("*.md"))
]


def test_performance_anchors_exist():
    linked = {
        anchor
        for folder in ("vgg_jax", "tests", "experiments")
        for path in (ROOT / folder).rglob("*.py")
        for anchor in re.findall(r"docs/performance\.md#([\w-]+)", path.read_text())
    }
    assert len(linked) > 30
    assert linked <= anchors(ROOT / "docs" / "performance.md")


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match("https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    for block in blocks(page):
        if block.language != "bash":
            continue
        for command in commands(block.text):
            if "vgg-jax" in command:
                parser().parse_args(command[command.index("vgg-jax") + 1 :] or ["--version"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_inline_commands_exist(page):
    """Placeholders in capitals, such as NET, are left out."""
    inline = re.findall(r"`(vgg-jax [^`]+|python -m [^`]+)`", prose(page))
    for command in map(str.split, inline):
        if command[0] == "python":
            assert importlib.util.find_spec(command[2]), command
        elif not {"NET", "N", "COMMAND", "RUN_OR_WEIGHTS", "FILE", "DATA"} & {*command}:
            arguments = [word for word in command[1:] if word not in ("--help", "[DATA]")]
            assert not arguments or arguments[0] in COMMANDS, command
            if len(arguments) > 1 and "--scales" not in command:
                parser().parse_args(arguments)


def test_no_placeholder_is_left():
    for page in PAGES:
        found = re.search(r"\b(OUTPUT|SIZE|TABLE)_|_(OUTPUT|SIZE|TABLE)\b", page.read_text())
        assert not found, page


def test_api_page_has_all_public_names():
    text = (ROOT / "docs" / "api.md").read_text()
    missing = [name for name in vgg_jax.__all__ if not re.search(rf"\b{name}\b", text)]
    assert missing == ["__version__"]
    signature = re.search(r"vgg_jax\.VGG\((.*)\)", text).group(1)
    fields = [
        field.name for field in dataclasses.fields(VGG) if field.name not in ("parent", "name")
    ]
    assert re.findall(r"(\w+)=", signature) == fields


def test_pip_commands_name_extras_and_files():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set()
    for page in PAGES:
        extras |= {*re.findall(r"pip install (?:-e )?'\.\[([\w,]+)\]'", page.read_text())}
        for file in re.findall(r"pip install -r ([\w.-]+)", page.read_text()):
            assert (ROOT / file).exists()
    names = {name for extra in extras for name in extra.split(",")}
    assert names == project["optional-dependencies"].keys()


def test_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    sentences = re.split(r"(?<=[.!?])\*?\s+|\n\n|\n- ", re.sub(r"\]\([^)]*\)", "]", prose(README)))
    long = [sentence for sentence in sentences if len(sentence.split()) > 20]
    assert not long


def test_readme_lists_the_nets():
    for name in ("A", "A-LRN", "B", "C", "D", "E"):
        total = totals(summarize(CONFIGS[name]))
        row = re.search(rf"^\| `{name}` \|.*$", README.read_text(), re.MULTILINE).group()
        assert f"| {total['params']:,} | {total['macs'] / 1e9:.2f} G |" in row
        convs = sum(len(stage) for stage in CONFIGS[name].stages)
        assert f"| {convs + 3} |" in row


def test_training_page_has_all_flags_and_exit_codes():
    text = TRAINING.read_text()
    subparsers = next(a for a in parser()._actions if hasattr(a, "choices") and a.choices)
    flags = [action.option_strings for action in subparsers.choices["train"]._actions]
    missing = [names[-1] for names in flags if names and f"`{names[0]}`" not in text]
    assert missing == ["--help"]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == {
        *ExitCode,
        128 + signal.SIGTERM,
    }


def test_evaluation_page_has_all_protocols():
    text = (ROOT / "docs" / "evaluation.md").read_text()
    assert {*re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)} >= {*PROTOCOLS}


def test_paper_page_names_files():
    text = (ROOT / "docs" / "paper.md").read_text()
    paths = re.findall(r"`((?:vgg_jax|experiments)/[\w/.]+)`", text)
    assert len(paths) > 15
    for path in paths:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("generator", [benchmarks_page, experiments_page])
def test_page_of_results_is_fresh(generator):
    """`python -m tools.benchmarks_page` and `python -m tools.experiments_page` renew them."""
    assert generator.page() == generator.PAGE.read_text()
    for name, data in generator.plots().items():
        text = (benchmarks_page.IMAGES / f"{name}.svg").read_text()
        description = re.search(r"<dc:description>(.*?)</dc:description>", text, re.DOTALL)
        assert json.loads(description.group(1)) == json.loads(json.dumps(data))


def test_tables_of_benchmarks_are_fresh():
    """`python -m tools.benchmarks_page` renews them."""
    for name in benchmarks_page.TABLES:
        assert benchmarks_page.with_tables(name) == (ROOT / name).read_text()


def test_floor_never_rounds_up():
    assert benchmarks_page.floor(1.999) == "1.99"
    assert benchmarks_page.floor(0.888) == "0.88"
    assert benchmarks_page.floor(1.19) == "1.19"


def test_contributing_names_tests_and_markers():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    markers = [
        marker.split(":")[0] for marker in project["tool"]["pytest"]["ini_options"]["markers"]
    ]
    for block in blocks(ROOT / "CONTRIBUTING.md"):
        for command in commands(block.text):
            if command[0] == "pytest" and "-m" in command:
                assert command[command.index("-m") + 1] in markers
            elif command[0] == "pytest":
                assert all((ROOT / path).exists() for path in command[1:])
