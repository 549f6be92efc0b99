"""Files that are changed at random, and bytes of any kind, are read or refused in one sentence; `fuzz.py` tries more of them."""

import json
import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults import fuzz
from vgg_jax import CONFIGS, InputError
from vgg_jax.data import read_list, write_list
from vgg_jax.data.verified import Bad
from vgg_jax.weights.containers import open_file

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
TRIALS = 60


@pytest.fixture(scope="module")
def files():
    pytest.importorskip("torch", reason="needs torch")
    pytest.importorskip("google.protobuf")
    return fuzz.weights_files() | fuzz.image_files() | fuzz.other_files()


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_changed_file_is_read_or_refused(kind, files, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "small", fuzz.SMALL)
    path = tmp_path / fuzz.file_name(kind)
    path.write_bytes(files[kind])
    assert fuzz.outcome(kind, path) == "read"
    rng = random.Random(0)
    for _ in range(TRIALS):
        path.write_bytes(fuzz.mutated(files[kind], rng))
        assert fuzz.outcome(kind, path) in ("read", "refused")


HEADS = [b"", b"\x89HDF\r\n\x1a\n", b"PK\x03\x04", b"\x80\x02", b"MATLAB".ljust(124) + b"\x00\x01IM", bytes([30]) + bytes(7) + b"{"]


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(HEADS), st.binary(max_size=300), st.sampled_from(["x.pth", "x.caffemodel"]))
def test_any_bytes_are_read_or_refused(head, rest, name):
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
@given(st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=[]), min_size=1)))
def test_a_list_keeps_every_name(names):
    """Surrogates, as Python has for bytes that are no UTF-8, and line ends of every kind."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "list"))
        write_list(path, [Bad(name, "cut") for name in names])
        assert read_list(path) == tuple(sorted(set(names)))


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)
def test_any_json_is_no_run(content):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "run.json").write_text(json.dumps(content))
        assert fuzz.outcome("run.json", Path(folder, "run.json")) == "refused"
