"""Checkpoints that are damaged or cannot be written: none is lost, and no wrong one is read."""

import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import vgg_jax.runs.checkpoint
from vgg_jax import InputError
from vgg_jax.runs.checkpoint import CheckpointSaveError, CheckpointStore

# orbax may still read other files once one proved damaged.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

OLD = {
    "params": {
        "kernel": np.arange(6000, dtype=np.float32).reshape(20, 300),
        "bias": np.ones(300, np.float32),
    },
    "step": np.int32(7),
}
NEW = jax.tree.map(lambda x: x + x.dtype.type(1), OLD)
SHAPES = jax.eval_shape(lambda: OLD)


def flip_bit(content, seed):
    """Changes one random bit of some bytes."""
    bit = int(np.random.default_rng(seed).integers(len(content) * 8)) if content else 0
    return bytes(byte ^ (1 << bit % 8) if i == bit // 8 else byte for i, byte in enumerate(content))


DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
    "flipped": lambda file: file.write_bytes(flip_bit(file.read_bytes(), 0)),
    "flipped elsewhere": lambda file: file.write_bytes(flip_bit(file.read_bytes(), 1)),
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with the checkpoints 1, of OLD, and 2, of NEW."""
    folder = tmp_path_factory.mktemp("checkpoints") / "last"
    with CheckpointStore(folder) as last:
        last.save(1, OLD, {"epoch": 1, "loss": 0.5})
        last.save(2, NEW, {"epoch": 2, "loss": 0.25})
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_restore_after_damage_to_each_file(damage, checkpoints, tmp_path, caplog):
    """The damage changes nothing, or the checkpoint is set aside and the previous one is used."""
    quarantined = []
    files = [path for path in (checkpoints / "2").rglob("*") if path.is_file()]
    for i, file in enumerate(sorted(path.relative_to(checkpoints) for path in files)):
        folder = tmp_path / str(i) / "last"
        shutil.copytree(checkpoints, folder)
        DAMAGES[damage](folder / file)
        caplog.clear()
        with CheckpointStore(folder) as last:
            arrays, progress = last.restore(SHAPES)
            epoch = progress["epoch"]
            assert progress == {"epoch": epoch, "loss": 0.5 / epoch}
            jax.tree.map(np.testing.assert_array_equal, arrays, OLD if epoch == 1 else NEW)
            is_quarantined = epoch == 1
            assert (folder / "2.damaged").exists() == is_quarantined
            assert ("is damaged" in caplog.text) == is_quarantined
            if is_quarantined:
                quarantined.append(file)
                # The resumed run reaches the same step again.
                last.save(2, NEW, {"epoch": 2, "loss": 0.25})
                assert last.restore(SHAPES)[1]["epoch"] == 2
    assert len(quarantined) >= 3  # the arrays, their metadata, the progress


def edit_progress(change):
    """Returns a damage that changes the progress of checkpoint 2."""

    def edit(folder):
        files = [path for path in (folder / "2" / "progress").rglob("*") if path.is_file()]
        (file,) = (path for path in files if b"epoch" in path.read_bytes())
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return edit


def change_loss(content):
    content["progress"]["loss"] = 0.2


def remove_checksums(content):
    """Makes the content that of a version without checksums."""
    content.update(content.pop("progress"))
    del content["arrays"], content["checksum"]


def swap_arrays(folder):
    """Replaces the arrays of checkpoint 2 by those of checkpoint 1."""
    shutil.rmtree(folder / "2" / "arrays")
    shutil.copytree(folder / "1" / "arrays", folder / "2" / "arrays")


@pytest.mark.parametrize(
    "damage",
    [edit_progress(change_loss), edit_progress(remove_checksums), swap_arrays],
    ids=["loss", "no checksums", "arrays"],
)
def test_restore_checks_readable_content(damage, checkpoints, tmp_path, caplog):
    folder = tmp_path / "last"
    shutil.copytree(checkpoints, folder)
    damage(folder)
    with CheckpointStore(folder) as last:
        assert last.restore(SHAPES)[1] == {"epoch": 1, "loss": 0.5}
    assert "checksums" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2.damaged"]


def test_restore_transient_error_keeps_checkpoint(checkpoints, tmp_path, monkeypatch):
    folder = tmp_path / "last"
    shutil.copytree(checkpoints, folder)

    def fail(*_):
        raise PermissionError(13, "Permission denied")

    message = r"last/2 cannot be read now .*Permission denied.*: try again"
    with CheckpointStore(folder) as last:
        monkeypatch.setattr(last, "_read", fail)
        with pytest.raises(InputError, match=message):
            last.restore(SHAPES)
        monkeypatch.undo()
        assert last.restore(SHAPES)[1]["epoch"] == 2


def test_restore_after_loss_of_folders(checkpoints, tmp_path):
    for name in ("arrays", "progress"):
        shutil.copytree(checkpoints, tmp_path / name)
        shutil.rmtree(tmp_path / name / "2" / name)
        with CheckpointStore(tmp_path / name) as last:
            assert last.restore(SHAPES)[1]["epoch"] == 1
    shutil.copytree(checkpoints, tmp_path / "all")
    shutil.rmtree(tmp_path / "all" / "2")
    (tmp_path / "all" / "2").mkdir()
    with CheckpointStore(tmp_path / "all") as last:
        assert last.restore(SHAPES)[1]["epoch"] == 1
    assert (tmp_path / "all" / "2.damaged").is_dir()


def test_restore_all_corrupt_raises(checkpoints, tmp_path):
    folder = tmp_path / "last"
    shutil.copytree(checkpoints, folder)
    for file in folder.rglob("_METADATA"):
        file.write_bytes(b"")
    before = sorted(folder.rglob("*"))
    message = r"the checkpoint .*last/2 cannot be read .*and there is no other valid one"
    with CheckpointStore(folder) as last, pytest.raises(InputError, match=message):
        last.restore(SHAPES)
    assert sorted(folder.rglob("*")) == before


def test_read_only_store_moves_nothing(checkpoints, tmp_path, caplog):
    folder = tmp_path / "best"
    shutil.copytree(checkpoints, folder)
    (folder / "2" / "arrays" / "manifest.ocdbt").unlink()
    before = sorted(folder.rglob("*"))
    with CheckpointStore(folder, read_only=True) as best:
        assert best.restore(SHAPES)[1]["epoch"] == 1
    assert sorted(folder.rglob("*")) == before
    assert "best/2 is damaged" in caplog.text
    assert "read_only=True" not in caplog.text  # orbax warns that such a manager never saves


def test_save_on_full_disk_keeps_checkpoints(tmp_path):
    """A limit on the size of files makes the same writes fail as a full disk."""
    resource = pytest.importorskip("resource", reason="this system cannot limit files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointStore(tmp_path / "last") as last:
        last.save(1, OLD, {"epoch": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            for step in (2, 3):
                with pytest.raises(CheckpointSaveError, match=r"cannot save to .*last"):
                    last.save(step, NEW, {"epoch": step})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        # The partial checkpoints use no space.
        assert [path.name for path in (tmp_path / "last").iterdir()] == ["1"]
        assert last.restore(SHAPES)[1] == {"epoch": 1}
        last.save(2, NEW, {"epoch": 2})
        assert last.restore(SHAPES)[1] == {"epoch": 2}
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["1", "2"]


def test_save_checks_free_space(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=20_000))
    message = r"cannot save to .*last \(0 MB are needed, and 0 MB free\)"
    with CheckpointStore(tmp_path / "last") as last:
        with pytest.raises(CheckpointSaveError, match=message):
            last.save(1, OLD, {"epoch": 1})
        assert list((tmp_path / "last").iterdir()) == []


def test_save_fsync_error_discards_checkpoint(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    with CheckpointStore(tmp_path / "last") as last:
        last.save(1, OLD, {"epoch": 1})
        with monkeypatch.context() as patch:
            patch.setattr(vgg_jax.runs.checkpoint, "fsync", fail)
            for step in (2, 3):
                with pytest.raises(CheckpointSaveError, match="Input/output error"):
                    last.save(step, NEW, {"epoch": step})
                assert last.restore(SHAPES)[1] == {"epoch": 1}
        last.save(3, NEW, {"epoch": 3})
        assert last.restore(SHAPES)[1] == {"epoch": 3}


@pytest.mark.parametrize(("failures", "is_saved"), [(2, True), (3, False)])
def test_save_retries_in_store(failures, is_saved, tmp_path, monkeypatch):
    calls = []

    def save_once(self, step, arrays, progress):
        calls.append(step)
        if len(calls) <= failures:
            raise CheckpointSaveError(f"attempt {len(calls)}")

    monkeypatch.setattr(CheckpointStore, "_save_once", save_once)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with CheckpointStore(tmp_path / "last") as last:
        last._is_remote = True
        if is_saved:
            last.save(1, OLD, {})
        else:
            with pytest.raises(CheckpointSaveError, match="attempt 3"):
                last.save(1, OLD, {})
    assert calls == [1, 1, 1]
