"""Exit codes and messages of errors."""

import errno
import io
import os
import subprocess
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
    ("error", "arguments", "remedy"),
    [
        (MemoryError("Unable to allocate 9 GiB"), {"pixels": 9, "scales": []}, "--pixels than 9"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), {}, "more memory"),
        (MemoryError(), {}, "(MemoryError): close other programs"),
        (RuntimeError("OOM when allocating tensor"), {"scales": []}, "smaller --scales"),
        (RuntimeError("std::bad_alloc"), {"batch_size": 3}, "--microbatch or --batch-size"),
        (MemoryError(), {"command_line": "vgg-jax train"}, "--microbatch or --batch-size"),
        (MemoryError(), {"command_line": "", "cache": True}, "size, or leave out --cache"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), {"file": "x"}, "more memory"),
    ],
)
def test_explain_lack_of_memory(error, arguments, remedy):
    code, message = explain(error, arguments)
    assert code == 71
    assert message.startswith("out of memory (")
    assert remedy in message


@pytest.mark.integration
@pytest.mark.parametrize("name", ["JAX_ENABLE_X64", "JAX_NUM_CPU_DEVICES"])
def test_invalid_setting_of_jax_is_one_sentence(name):
    result = subprocess.run(
        [sys.executable, "-m", "vgg_jax", "selfcheck"],
        env=os.environ | {name: "banana"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.endswith(f": correct or unset {name}\n")


@pytest.mark.integration
@pytest.mark.parametrize("platform", ["cuda", "banana"])
@pytest.mark.parametrize("command", ["train", "selfcheck"])
def test_missing_platform_is_one_sentence(command, platform, tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": platform, "CUDA_VISIBLE_DEVICES": "-1"}
    result = subprocess.run(
        [sys.executable, "-m", "vgg_jax", command],
        env=environment | {"PYTHONPATH": os.getcwd()},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"JAX_PLATFORMS is '{platform}', and jax finds no such device" in result.stderr


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


@pytest.mark.parametrize(
    ("stream", "command", "code"),
    [("stdout", ["weights"], 0), ("stderr", ["config", "/nowhere"], 2), ("stderr", ["weight"], 2)],
)
def test_output_that_the_shell_closes(stream, command, code, monkeypatch, capsys):
    """As `vgg-jax weights >&-`, which leaves Python no stream."""
    monkeypatch.setattr(sys, stream, None)
    try:
        assert cli.main(command) == code
    except SystemExit as error:  # of a wrong command
        assert error.code == code
    getattr(sys, stream).close()
    assert capsys.readouterr().out == ""


def test_output_that_has_few_characters(monkeypatch, tmp_path):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", stream)
    assert cli.main(["verify", str(tmp_path / "caf\N{LATIN SMALL LETTER E WITH ACUTE}.onnx")]) == 2
    stream.flush()
    assert b"caf\\xe9.onnx" in stream.buffer.getvalue()
