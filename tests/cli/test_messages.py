"""Messages of at most 300 characters, and `--verbose`."""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers.caches import use_caches
from tests.helpers.weights_files import random_tensors, torchvision_state
from vgg_jax.cli import main
from vgg_jax.cli.messages import MAX_LENGTH, shorten
from vgg_jax.cli.parser import parser
from vgg_jax.weights.pretrained import WEIGHTS, own_file

NAMES = [f"unexpected tensor layer{i}.weight" for i in range(40)]


def test_short_message_stays():
    message = "x" * MAX_LENGTH
    assert shorten(message) == message


@pytest.mark.parametrize(
    ("message", "start", "end"),
    [
        (  # the remedy comes first
            f"a.pth is no VGG: expected D, pass --net; {'; '.join(NAMES)}",
            "a.pth is no VGG: expected D, pass --net; unexpected tensor layer0.weight; ",
            " … and {} more; --verbose lists all; unexpected tensor layer39.weight",
        ),
        (  # the remedy comes last
            f"no layout has {', '.join(NAMES)}: expected one of Keras; pass --net",
            "no layout has unexpected tensor layer0.weight, ",
            " … and {} more; --verbose lists all: expected one of Keras; pass --net",
        ),
    ],
)
def test_list_is_cut_and_remedy_stays(message, start, end):
    text = shorten(message)
    assert len(text) <= MAX_LENGTH
    assert text.startswith(start)
    left_out = len(NAMES) - text.count("unexpected tensor")
    assert text.endswith(end.format(left_out))
    kept = re.search(r"layer(\d+)\.weight …", text)
    assert int(kept[1]) == text.partition("…")[0].count("unexpected tensor") - 1


def test_long_path_keeps_what_is_wrong():
    path = f"/home/{'deep/' * 50}photos"
    message = f"no labels for the 12 images of {path!r}, which can only be predicted: expected x"
    assert len(message) > MAX_LENGTH
    text = shorten(message)
    assert len(text) < MAX_LENGTH
    assert text.startswith("no labels for the 12 images of '/home/deep/")
    assert text.endswith("deep/photos', which can only be predicted: expected x")


@pytest.mark.parametrize("is_damaged", [False, True])
def test_absent_weights_keep_url_and_command(is_damaged, tmp_path, monkeypatch, capsys):
    """Also if a copy in a cache is refused, whose path is long."""
    use_caches(monkeypatch, tmp_path)
    for name, entry in WEIGHTS.items():
        if is_damaged:
            own_file(entry).parent.mkdir(parents=True)
            own_file(entry).write_bytes(b"")
        assert main(["import", name, str(tmp_path / "out.safetensors")]) == 2
        message = capsys.readouterr().err.strip()
        assert len(message) <= MAX_LENGTH
        assert message.startswith(f"vgg-jax: {name} is not here ")
        assert f"`vgg-jax fetch {name}`" in message
        assert message.endswith(f" from {entry.url}")


@pytest.mark.parametrize(
    ("message", "end"),
    [
        (  # a warning has no "expected"
            f"{'long/' * 20}a.pth: the key 'model' is read; left out: {', '.join(NAMES)}; "
            "to read another, save its weights to a file of their own",
            "; to read another, save its weights to a file of their own",
        ),
        (  # the last clause only, after a list of choices
            f"net is 'F': expected one of {', '.join(NAMES)}; pass --net",
            " … and 34 more; --verbose lists all; pass --net",
        ),
        (f"{'word ' * 80}see https://example.org/x", " https://example.org/x"),
        (f"{'word ' * 80}: expected a URL, {'word ' * 50}https://a.org/x", " https://a.org/x"),
    ],
)
def test_end_stays(message, end):
    text = shorten(message)
    assert len(text) <= MAX_LENGTH
    assert text.endswith(end)
    assert " … " in text and "--verbose" in text


@pytest.mark.parametrize("message", ["word " * 200, "x" * 1000, f"{'x' * 1000}: expected a file"])
def test_other_text_is_cut_after_word(message):
    text = shorten(message)
    assert MAX_LENGTH - 30 < len(text) <= MAX_LENGTH
    assert " … (--verbose shows all)" in text
    assert text.endswith("expected a file") == message.endswith("expected a file")


def test_verbose_shows_whole_message(tmp_path, capsys):
    """The exception has the whole text in any case."""
    state = torchvision_state(random_tensors("A"), "A")
    state |= {f"features.{i}.weight": np.zeros(3, np.float32) for i in range(100, 140)}
    save_file(state, tmp_path / "net.safetensors")
    command = ["import", str(tmp_path / "net.safetensors"), str(tmp_path / "out.safetensors")]
    assert main(command) == 2
    short = capsys.readouterr().err
    assert len(short.strip()) <= MAX_LENGTH
    assert "--verbose lists all" in short
    assert main([*command, "--verbose"]) == 2
    message = capsys.readouterr().err
    assert all(f"features.{i}.weight" in message for i in range(100, 140))
    assert "--verbose" not in message


def test_warning_is_shortened(tmp_path, capsys):
    """It lists the tensors of a decoder, which is no part of the VGG."""
    state = torchvision_state(random_tensors("A"), "A")
    state = {name: array for name, array in state.items() if name.startswith("features")}
    state |= {f"decoder.{i}.weight": np.zeros((3, 3), np.float32) for i in range(40)}
    save_file(state, tmp_path / "net.safetensors")
    command = ["import", str(tmp_path / "net.safetensors"), str(tmp_path / "out.safetensors")]
    assert main(command) == 0
    warning = capsys.readouterr().err.strip()
    assert warning.startswith("warning: ")
    assert re.search(r"decoder\.\d+\.weight … and \d+ more; --verbose lists all$", warning)
    assert len(warning) <= MAX_LENGTH
    assert main([*command, "--verbose", "--overwrite"]) == 0
    warning = capsys.readouterr().err
    assert all(f"decoder.{i}.weight" in warning for i in range(40))


def test_each_command_has_verbose():
    for command in ("train", "summary A", "verify x", "selfcheck", "statistics", "fuse x"):
        assert parser().parse_args([*command.split(), "--verbose"]).verbose
