"""Images that cannot be decoded or read: named, or skipped and counted."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.corrupt_images import CORRUPT, PHOTO, SKIPPING, make_folder
from tests.helpers.tiny_data import TINY_TRAIN, encode
from vgg_jax import IMAGENET, cli
from vgg_jax.data import eval_batches, measure_colours, open_split, train_batches
from vgg_jax.errors import DataError

ROOT = Path(__file__).parents[2]


def count_examples(batches):
    return sum(batch["mask"].sum() for batch in batches)


@pytest.mark.parametrize("name", CORRUPT)
def test_eval_batches_name_corrupt_image(name, tmp_path):
    source = open_split(make_folder(tmp_path / "data", name), "train")
    with pytest.raises(DataError, match=rf"cannot decode '.*ants/{name}'"):
        list(eval_batches(source, TINY_TRAIN, 4))


def test_train_batches_name_corrupt_image(tmp_path):
    source = open_split(make_folder(tmp_path / "data", "cut.jpg"), "train")
    with pytest.raises(DataError, match=r"cannot decode '.*ants/cut.jpg'"):
        list(train_batches(source, TINY_TRAIN, IMAGENET))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cut.jpg", "bomb.png"])
def test_batches_skip_corrupt_image(name, tmp_path, caplog):
    """The image is masked, one warning is logged, and all others arrive."""
    source = open_split(make_folder(tmp_path / "data", name), "train", skip_bad=True)
    corrupt = next(i for i in range(source.size) if source.file_name(i).endswith(name))
    for batches in (train_batches(source, SKIPPING, IMAGENET), eval_batches(source, SKIPPING, 4)):
        caplog.clear()
        arrays = list(batches)
        index, mask = (
            np.concatenate([batch[key] for batch in arrays]) for key in ("index", "mask")
        )
        assert mask.tolist() == ((index >= 0) & (index != corrupt)).tolist()
        for batch in arrays:
            assert not batch["image"][~batch["mask"]].any()
        records = [record for record in caplog.records if record.name == "vgg_jax.data.batches"]
        assert [record.levelname for record in records] == ["WARNING"]
        message = f"{name}' cannot be read or decoded, and is left out"
        assert message in records[0].getMessage()


@pytest.mark.slow
def test_batches_skip_keeps_other_examples(tmp_path):
    """One image is intact in one folder and corrupt in the other. The rest of a batch is equal."""
    sources = []
    for name, content in (("intact", encode(PHOTO)), ("corrupt", CORRUPT["cut.png"])):
        root = make_folder(tmp_path / name)
        (tmp_path / name / "ants" / "2.png").write_bytes(content)
        sources.append(open_split(root, "train", skip_bad=True))
    for make_batches in (
        lambda source: train_batches(source, SKIPPING, IMAGENET),
        lambda source: eval_batches(source, SKIPPING, 4),
    ):
        for intact, corrupt in zip(*map(make_batches, sources), strict=True):
            np.testing.assert_array_equal(intact["index"], corrupt["index"])
            mask = corrupt["mask"]
            assert (intact["mask"] & ~mask).sum() == (intact["index"] == 2).sum()
            for key in ("image", "label", "colour_shift"):
                np.testing.assert_array_equal(intact[key][mask], corrupt[key][mask])


def test_batches_skip_deleted_file(tmp_path, caplog):
    source = open_split(make_folder(tmp_path / "data"), "train", skip_bad=True)
    (tmp_path / "data" / "bees" / "3.png").unlink()
    assert count_examples(eval_batches(source, SKIPPING, 4)) == 9
    assert "bees/3.png' cannot be read" in caplog.text


def test_batches_skip_one_percent_at_most(tmp_path):
    """One image is always allowed."""
    root = make_folder(tmp_path / "data", "cut.jpg", "cut.png")
    source = open_split(root, "train", skip_bad=True)
    message = r"2 of the 12 images of .* expected at most one in 100; .*verify-data"
    with pytest.raises(DataError, match=message):
        list(eval_batches(source, SKIPPING, 4))


def test_measure_colours_skips_corrupt_image(tmp_path, caplog):
    source = open_split(make_folder(tmp_path / "data", "cut.jpg"), "train", skip_bad=True)
    measured = measure_colours(source, skip_bad=True)
    assert measured.count == 10
    assert "cut.jpg' cannot be read" in caplog.text
    expected = measure_colours(open_split(make_folder(tmp_path / "intact"), "train"))
    np.testing.assert_array_equal(measured.pixel_mean, expected.pixel_mean)
    np.testing.assert_array_equal(measured.image_std, expected.image_std)
    with pytest.raises(DataError, match=r"cut\.jpg"):
        measure_colours(source)


@pytest.mark.integration
def test_batches_of_bomb_take_no_memory(tmp_path):
    """A plain assertion in a graph runs beside the decoder, which takes 1.2 GB."""
    root = make_folder(tmp_path / "data", "bomb.png")
    command = [sys.executable, "-m", "tests.programs.input_memory", root]
    kilobytes = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    assert int(kilobytes) < 400_000


def test_folder_with_unreadable_file():
    # pytest's own temporary folder is closed to other users.
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        root = make_folder(Path(folder) / "data")
        open_split(root, "train")  # import modules while they can be read
        (Path(root) / "bees" / "3.png").chmod(0)
        user = os.geteuid()
        if user == 0:  # root may read every file
            os.seteuid(65534)
        try:
            with pytest.raises(DataError, match=r"1 of 10 files .* cannot be read: '.*bees/3.png'"):
                open_split(root, "train")
            source = open_split(root, "train", skip_bad=True)
            assert count_examples(eval_batches(source, TINY_TRAIN, 4)) == source.size == 9
        finally:
            os.seteuid(user)


def test_folder_with_files_of_other_kinds(tmp_path):
    root = make_folder(tmp_path / "data")
    ants = tmp_path / "data" / "ants"
    (ants / "empty.jpg").write_bytes(b"")
    (ants / "text.jpg").write_text("no image")
    (ants / "loop.jpg").symlink_to("loop.jpg")
    (ants / "folder.jpg").mkdir()
    os.mkfifo(ants / "pipe.jpg")
    writer = os.open(ants / "pipe.jpg", os.O_RDWR)  # a reader would wait for more
    os.write(writer, encode(PHOTO))
    (tmp_path / "data" / "loop.txt").symlink_to("loop.txt")  # beside the class folders
    with pytest.raises(DataError, match="5 of 15 files"):
        open_split(root, "train")
    assert len(open_split(root, "train", skip_bad=True).skipped) == 5
    os.close(writer)


@pytest.mark.slow
@pytest.mark.usefixtures("small_nets")
@pytest.mark.parametrize("skip", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_train_with_corrupt_image(skip, tmp_path, capsys, caplog):
    """It ends with code 3 and names the image, or skips it and reports the number of images."""
    root, workdir = tmp_path / "data", tmp_path / "workdir"
    make_folder(root / "train", "cut.jpg")
    make_folder(root / "val")
    argv = ["train", str(root), "--workdir", str(workdir), "--no-compilation-cache"]
    # The programs are those of `make_config`, which other tests compile as well.
    argv += ["--net", "shallow", "--image-size", "16", "--scale", "16", "--fc", "24", "16"]
    argv += ["--batch-norm", "--batch-size", "8", "--epochs", "1"]
    argv += ["--skip-bad"] if skip else []
    assert cli.main(argv) == (0 if skip else 3)
    if not skip:
        assert "cut.jpg'" in capsys.readouterr().err
        return
    assert "cut.jpg' cannot be read" in caplog.text
    (record,) = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    assert (record["train"]["count"], record["validation"]["count"]) == (10, 10)
