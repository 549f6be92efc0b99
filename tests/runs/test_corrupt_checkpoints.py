"""Checkpoints that are damaged, cannot be written, or belong to another process: nothing is lost, and nothing wrong is read."""

import json
import multiprocessing
import shutil
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import vgg_jax.runs.checkpoint
from vgg_jax import InputError
from vgg_jax.runs.checkpoint import CheckpointSaveError, CheckpointStore
from vgg_jax.runs.files import workdir_lock
from vgg_jax.runs.metadata import load_existing_run

# What orbax had in hand when a file turned out to be damaged.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

OLD = {
    "params": {
        "kernel": np.arange(6000, dtype=np.float32).reshape(20, 300),
        "bias": np.ones(300, np.float32),
    },
    "step": np.int32(7),
}
NEW = jax.tree.map(lambda x: x + x.dtype.type(1), OLD)
SHAPES = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    ),
    OLD,
)


def flipped(content, seed):
    """One bit of it is the other way round."""
    at = int(np.random.default_rng(seed).integers(len(content) * 8)) if content else 0
    return bytes(byte ^ (1 << at % 8) if i == at // 8 else byte for i, byte in enumerate(content))


DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
    "flipped": lambda file: file.write_bytes(flipped(file.read_bytes(), 0)),
    "flipped elsewhere": lambda file: file.write_bytes(flipped(file.read_bytes(), 1)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the checkpoints 1, of OLD, and 2, of NEW."""
    folder = tmp_path_factory.mktemp("saved") / "last"
    with CheckpointStore(folder) as last:
        last.save(1, OLD, {"epoch": 1, "loss": 0.5})
        last.save(2, NEW, {"epoch": 2, "loss": 0.25})
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_damaged_checkpoint_nothing_is_used(damage, saved, tmp_path, capsys):
    """Whichever of its files is damaged: either that changes nothing, or the checkpoint is set aside and the one before is used."""
    set_aside = []
    for file in sorted(
        path.relative_to(saved) for path in (saved / "2").rglob("*") if path.is_file()
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "last"
        shutil.copytree(saved, folder)
        DAMAGES[damage](folder / file)
        with CheckpointStore(folder) as last:
            arrays, progress = last.restore(SHAPES)
            epoch = progress["epoch"]
            assert progress == {"epoch": epoch, "loss": 0.5 / epoch}
            jax.tree.map(np.testing.assert_array_equal, arrays, OLD if epoch == 1 else NEW)
            aside = epoch == 1
            assert (folder / "2.damaged").exists() == aside
            assert ("is damaged" in capsys.readouterr().err) == aside
            if aside:
                set_aside.append(file)
                last.save(
                    2, NEW, {"epoch": 2, "loss": 0.25}
                )  # the run comes to the same step again
                assert last.restore(SHAPES)[1]["epoch"] == 2
    assert len(set_aside) >= 3  # the arrays, what is said of them, the progress


def test_what_is_readable_and_wrong_is_not_used(saved, tmp_path, capsys):
    """One number of the progress is another; the arrays are those of another checkpoint; a checkpoint of before there were checksums."""

    def changed(progress):
        progress["progress"]["loss"] = 0.2

    def unsealed(progress):
        progress.update(progress.pop("progress"))
        del progress["arrays"], progress["checksum"]

    def others_arrays(folder):
        shutil.rmtree(folder / "2" / "arrays")
        shutil.copytree(folder / "1" / "arrays", folder / "2" / "arrays")

    def edit(change):
        def edited(folder):
            (file,) = (
                path
                for path in (folder / "2" / "progress").rglob("*")
                if path.is_file() and b"epoch" in path.read_bytes()
            )
            progress = json.loads(file.read_text())
            change(progress)
            file.write_text(json.dumps(progress))

        return edited

    for i, damage in enumerate((edit(changed), edit(unsealed), others_arrays)):
        folder = tmp_path / str(i) / "last"
        shutil.copytree(saved, folder)
        damage(folder)
        with CheckpointStore(folder) as last:
            assert last.restore(SHAPES)[1] == {"epoch": 1, "loss": 0.5}
        assert "checksums" in capsys.readouterr().err
        assert sorted(path.name for path in folder.iterdir()) == ["1", "2.damaged"]


def test_what_cannot_be_read_now_is_not_set_aside(saved, tmp_path, monkeypatch):
    folder = tmp_path / "last"
    shutil.copytree(saved, folder)
    with CheckpointStore(folder) as last:
        monkeypatch.setattr(
            last,
            "_read",
            lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")),
        )
        with pytest.raises(
            InputError, match=r"last/2 cannot be read now .*Permission denied.*: try again"
        ):
            last.restore(SHAPES)
        monkeypatch.undo()
        assert last.restore(SHAPES)[1]["epoch"] == 2


def test_a_checkpoint_of_which_half_is_gone(saved, tmp_path):
    for name in ("arrays", "progress"):
        shutil.copytree(saved, tmp_path / name)
        shutil.rmtree(tmp_path / name / "2" / name)
        with CheckpointStore(tmp_path / name) as last:
            assert last.restore(SHAPES)[1]["epoch"] == 1
    shutil.copytree(saved, tmp_path / "all")
    shutil.rmtree(tmp_path / "all" / "2")
    (tmp_path / "all" / "2").mkdir()
    with CheckpointStore(tmp_path / "all") as last:
        assert last.restore(SHAPES)[1]["epoch"] == 1
    assert (tmp_path / "all" / "2.damaged").is_dir()


def test_where_none_is_whole_none_is_touched(saved, tmp_path):
    folder = tmp_path / "last"
    shutil.copytree(saved, folder)
    for file in folder.rglob("_METADATA"):
        file.write_bytes(b"")
    before = sorted(folder.rglob("*"))
    with (
        CheckpointStore(folder) as last,
        pytest.raises(
            InputError,
            match=r"the checkpoint .*last/2 cannot be read .*and no other is there that can",
        ),
    ):
        last.restore(SHAPES)
    assert sorted(folder.rglob("*")) == before


def test_a_reader_moves_nothing(saved, tmp_path, capsys):
    folder = tmp_path / "best"
    shutil.copytree(saved, folder)
    (folder / "2" / "arrays" / "manifest.ocdbt").unlink()
    before = sorted(folder.rglob("*"))
    with CheckpointStore(folder, read_only=True) as best:
        assert best.restore(SHAPES)[1]["epoch"] == 1
    assert sorted(folder.rglob("*")) == before
    assert "best/2 is damaged" in capsys.readouterr().err


def test_epochs_without_a_checkpoint_are_not_begun_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    (tmp_path / "last" / "3.damaged").mkdir(parents=True)
    with pytest.raises(
        InputError, match=r"holds no checkpoint, and .*metrics.jsonl tells of epochs"
    ):
        load_existing_run(tmp_path)


def test_a_full_disk_costs_no_checkpoint(tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the same places."""
    resource = pytest.importorskip("resource", reason="no limits on files here")
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
        assert [path.name for path in (tmp_path / "last").iterdir()] == [
            "1"
        ]  # what was begun takes no room
        assert last.restore(SHAPES)[1] == {"epoch": 1}
        last.save(2, NEW, {"epoch": 2})
        assert last.restore(SHAPES)[1] == {"epoch": 2}
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["1", "2"]


def test_too_little_room_is_said_beforehand(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path / "last") as last:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=20_000))
        with pytest.raises(
            CheckpointSaveError, match=r"cannot save to .*last \(0 MB are needed, and 0 MB free\)"
        ):
            last.save(1, OLD, {"epoch": 1})
        assert list((tmp_path / "last").iterdir()) == []


def test_what_did_not_reach_the_disk_is_not_saved(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path / "last") as last:
        last.save(1, OLD, {"epoch": 1})
        sync = vgg_jax.runs.checkpoint.sync
        for step in (2, 3):
            monkeypatch.setattr(
                vgg_jax.runs.checkpoint,
                "sync",
                lambda path: (_ for _ in ()).throw(OSError(5, "Input/output error")),
            )
            with pytest.raises(CheckpointSaveError, match="Input/output error"):
                last.save(step, NEW, {"epoch": step})
            assert last.restore(SHAPES)[1] == {"epoch": 1}
        monkeypatch.setattr(vgg_jax.runs.checkpoint, "sync", sync)
        last.save(3, NEW, {"epoch": 3})
        assert last.restore(SHAPES)[1] == {"epoch": 3}


def holding(workdir, ready):
    with workdir_lock(workdir):
        ready.set()
        signal.pause()


def test_two_runs_in_one_workdir(tmp_path):
    """The second is refused, as long as the first one lives."""
    workdir = tmp_path / "run"
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    other = spawn.Process(target=holding, args=(workdir, ready), daemon=True)
    other.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match="another process trains in"), workdir_lock(workdir):
        pass
    other.kill()
    other.join()
    with workdir_lock(workdir):
        pass


def test_where_nothing_was_begun_nothing_is_left(tmp_path):
    with pytest.raises(ValueError, match="no data"), workdir_lock(tmp_path / "runs" / "run"):
        assert (tmp_path / "runs" / "run").is_dir()
        raise ValueError("no data")
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="cannot write to"),
        workdir_lock(tmp_path / "file" / "run"),
    ):
        pass
