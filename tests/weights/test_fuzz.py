"""Randomly changed files, and any bytes, are read or refused in one sentence.

`tools/fuzz.py` tries more of them.
"""

import contextlib
import io
import json
import random
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import fuzz
from vgg_jax import CONFIGS, InputError
from vgg_jax.data import read_exclude_list, write_exclude_list
from vgg_jax.data.verify import BadImage
from vgg_jax.runs.metadata import load_run
from vgg_jax.weights.formats import open_file

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
TRIALS = 60


@pytest.fixture(scope="module")
def files():
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("google.protobuf")
    return fuzz.weights_files() | fuzz.image_files() | fuzz.other_files()


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_changed_file_read_or_refused(kind, files, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "small", fuzz.SMALL)
    path = tmp_path / fuzz.file_name(kind)
    path.write_bytes(files[kind])
    assert fuzz.outcome(kind, path) == "read"
    rng = random.Random(0)
    for _ in range(TRIALS):
        path.write_bytes(fuzz.mutated(files[kind], rng))
        start = time.monotonic()
        assert fuzz.outcome(kind, path) in ("read", "refused")
        assert time.monotonic() - start < fuzz.HANG


HEADS = [
    b"",
    b"\x89HDF\r\n\x1a\n",
    b"PK\x03\x04",
    b"\x80\x02",
    b"MATLAB".ljust(124) + b"\x00\x01IM",
    bytes([30]) + bytes(7) + b"{",
]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(HEADS), st.binary(max_size=300), st.sampled_from(["x.pth", "x.caffemodel"]))
def test_open_file_any_bytes(head, rest, name):
    pytest.importorskip("torch", reason="needs torch")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(head + rest)
        try:
            for tensor in open_file(path).tensors.values():
                assert all(side >= 0 for side in tensor.shape)
        except InputError as error:
            assert "\n" not in str(error)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=[]), min_size=1))
)
def test_exclude_list_keeps_any_name(names):
    """Surrogates, which stand for bytes that are no UTF-8, and every kind of line end."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "list"))
        write_exclude_list(path, [BadImage(name, "cut") for name in names])
        assert read_exclude_list(path) == tuple(sorted(set(names)))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
RUN_METADATA = json.loads(fuzz.other_files()["run.json"])


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(
        [
            *RUN_METADATA,
            "config/net",
            "config/fc",
            "config/scale",
            "colours/mean_rgb",
            "colours/eigenvectors",
        ]
    ),
    JSON,
)
def test_load_run_any_value(field, value):
    """If it is read, the types are those that the rest of the program expects."""
    content = json.loads(json.dumps(RUN_METADATA))
    group, _, name = field.rpartition("/")
    (content[group] if group else content)[name] = value
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "run.json").write_text(json.dumps(content))
        assert fuzz.outcome("run.json", Path(folder, "run.json")) in ("read", "refused")
        with contextlib.suppress(InputError):
            run = load_run(Path(folder))
            assert all(isinstance(name, str) for name in run.classes)
            assert np.array(run.colours.mean_rgb, float).shape == (3,)
            assert np.array(run.colours.eigenvectors, float).shape == (3, 3)


def test_load_run_refuses_in_one_line(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RUN_METADATA | {"train\nsize": 3}))
    assert fuzz.outcome("run.json", tmp_path / "run.json") == "refused"


def test_load_evaluation_member_not_array(files, tmp_path):
    """NumPy returns the bytes of a member that is not an array."""
    path = tmp_path / "file.npz"
    with zipfile.ZipFile(io.BytesIO(files["npz"])) as whole, zipfile.ZipFile(path, "w") as changed:
        for name in whole.namelist():
            changed.writestr(name, b"no array" if name == "labels.npy" else whole.read(name))
    assert fuzz.outcome("npz", path) == "refused"


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"config": ' * 50_000, '{"train_size": ' + "1" * 5000 + "}"]
)
def test_load_run_rejects_extreme_json(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    (tmp_path / "list").write_text(content)
    with pytest.raises(InputError, match=r"run\.json cannot be read"):
        load_run(tmp_path)
    with pytest.raises(InputError, match="list cannot be read"):
        read_exclude_list(str(tmp_path / "list"))
