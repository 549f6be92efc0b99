"""The lock of a workdir, and atomic writes."""

import multiprocessing
import signal

import pytest

from vgg_jax import InputError
from vgg_jax.runs.files import atomic_write, replace_atomically, workdir_lock


def test_atomic_write_keeps_old_file_on_error(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    atomic_write(path, b"old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, b"new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("leftover", ["file", "folder", "link"])
def test_replace_atomically_removes_leftover(leftover, tmp_path):
    path, temporary = tmp_path / "out", tmp_path / "out.new"
    (tmp_path / "other").mkdir()
    if leftover == "file":
        temporary.write_bytes(b"left over")
    elif leftover == "folder":
        (temporary / "left over").mkdir(parents=True)
    else:
        temporary.symlink_to(tmp_path / "other")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["other", "out"]


def test_replace_atomically_replaces_folder(tmp_path):
    path = tmp_path / "out"
    (path / "old").mkdir(parents=True)
    with pytest.raises(ValueError, match="stop"), replace_atomically(path) as temporary:
        (temporary / "new").mkdir(parents=True)
        raise ValueError("stop")
    assert [entry.name for entry in path.iterdir()] == ["old"]
    with replace_atomically(path) as temporary:
        (temporary / "new").mkdir(parents=True)
    assert [entry.name for entry in path.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_write_rejects_folder(tmp_path):
    (tmp_path / "out" / "kept").mkdir(parents=True)
    with pytest.raises(OSError, match="out"):
        atomic_write(tmp_path / "out", b"new")
    assert (tmp_path / "out" / "kept").is_dir()


def hold_lock(workdir, ready):
    with workdir_lock(workdir):
        ready.set()
        signal.pause()


@pytest.mark.integration
def test_workdir_lock_excludes_other_process(tmp_path):
    workdir = tmp_path / "run"
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    holder = spawn.Process(target=hold_lock, args=(workdir, ready), daemon=True)
    holder.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match="another process trains in"), workdir_lock(workdir):
        pass
    holder.kill()
    holder.join()
    with workdir_lock(workdir):
        pass


def test_workdir_lock_removes_empty_workdir(tmp_path):
    with pytest.raises(ValueError, match="no data"), workdir_lock(tmp_path / "runs" / "run"):
        assert (tmp_path / "runs" / "run").is_dir()
        raise ValueError("no data")
    assert list(tmp_path.iterdir()) == []


def test_workdir_lock_rejects_file_as_parent(tmp_path):
    (tmp_path / "file").write_text("")
    message = "cannot write to"
    with pytest.raises(InputError, match=message), workdir_lock(tmp_path / "file" / "run"):
        pass
