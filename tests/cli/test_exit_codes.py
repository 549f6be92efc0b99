"""Exit codes and messages of errors."""

import io
import os
import sys

import pytest

from vgg_jax import InputError, cli
from vgg_jax.cli.exit_codes import explain
from vgg_jax.errors import DataError

# An error of Google's object store, by its module.
StoreError = type("StoreError", (Exception,), {"__module__": "gcsfs.retry"})


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("two\n  lines"), 2, "two lines"),
        (DataError("a.jpg"), 3, "a.jpg"),
        (OSError(28, "full", "w"), 2, "[Errno 28] full: 'w'"),
        (
            ModuleNotFoundError("no", name="optax"),
            2,
            "this command needs optax: run pip install -e '.[train]' in a clone of vgg_jax",
        ),
        (StoreError("gone\naway"), 69, "the object store cannot be used (gone away)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_explain(error, code, message):
    assert explain(error, {"workdir": "gs://bucket/run"}) == (code, message)


@pytest.mark.parametrize(
    ("error", "workdir"),
    [
        (ValueError("a bug"), "gs://bucket/run"),
        (ModuleNotFoundError("no", name="vgg_jax.none"), "gs://bucket/run"),
        (StoreError("another program's"), "runs/one"),
    ],
)
def test_explain_leaves_bugs(error, workdir):
    assert explain(error, {"workdir": workdir, "seed": 0}) is None


def test_output_that_is_closed(monkeypatch):
    """As `vgg-jax weights | head`, after head has ended."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(["weights"]) == 141


def test_output_that_has_few_characters(monkeypatch, tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.main(["verify", str(tmp_path / "caf\N{LATIN SMALL LETTER E WITH ACUTE}.onnx")]) == 2
    stream.flush()
    assert b"caf\\xe9.onnx" in stream.buffer.getvalue()
