"""Images that are odd, damaged or gone: read as other programs read them, named, or left out and counted."""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny import SHALLOW
from tests.helpers.tiny_data import encode, noise
from vgg_jax import CONFIGS, IMAGENET, InputError, TrainConfig, cli
from vgg_jax.data import (
    decode,
    eval_batches,
    measure_colours,
    open_split,
    open_train_val,
    read_exclude_list,
    tf,
    train_batches,
    verify_images,
    write_exclude_list,
)
from vgg_jax.data.decode import MAX_DECODED_PIXELS
from vgg_jax.errors import DataError

TINY = TrainConfig(image_size=32, scale=(32, 40), batch_size=4, epochs=2, seed=5)
PHOTO = noise(40, 50)


def animated(format):
    frames = [Image.fromarray(noise(20, 30, seed)) for seed in range(3)]
    buffer = io.BytesIO()
    frames[0].save(
        buffer,
        format,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if format == "WEBP" else {}),
    )
    return buffer.getvalue()


def saved(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def turned():
    exif = Image.Exif()
    exif[0x112] = 6
    return saved(Image.fromarray(PHOTO), "JPEG", exif=exif)


ALPHA = np.dstack([PHOTO, noise(40, 50, 1)[..., 0]])
DEEP = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32
ODD = {
    "one_pixel.png": encode(noise(1, 1)),
    "line.png": encode(noise(1, 5000)),
    "column.jpg": encode(noise(5000, 1), "JPEG"),
    "sixteen_bits.png": saved(Image.fromarray(DEEP)),
    "palette.png": saved(Image.fromarray(PHOTO).quantize(16)),
    "one_bit.png": saved(Image.fromarray(PHOTO).convert("1")),
    "alpha.png": saved(Image.fromarray(ALPHA)),
    "cmyk.jpg": saved(Image.fromarray(PHOTO).convert("CMYK"), "JPEG"),
    "grey.jpg": saved(Image.fromarray(PHOTO).convert("L"), "JPEG"),
    "animated.gif": animated("GIF"),
    "animated.webp": animated("WEBP"),
    "a_png.jpg": encode(PHOTO),
    "turned.jpg": turned(),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_is_decoded_as_pillow_decodes_it(name):
    with Image.open(io.BytesIO(ODD[name])) as image:
        if name == "turned.jpg":
            image = image.transpose(Image.Transpose.ROTATE_270)
        if name == "sixteen_bits.png":
            expected = np.repeat((np.asarray(image) >> 8)[..., None], 3, -1)
        elif name == "alpha.png":
            expected = np.asarray(image)[..., :3]
        else:
            expected = np.asarray(image.convert("RGB"))
    ours = decode(tf.constant(ODD[name])).numpy()
    assert ours.shape == expected.shape
    # CMYK has no standard way to RGB, and of a grey JPEG only the last bit of a rounding differs.
    bound = {"cmyk.jpg": 2, "grey.jpg": 1}.get(name, 0)
    assert np.abs(ours.astype(int) - expected).max() <= bound


@pytest.fixture
def odd(tmp_path):
    """A folder with all of them, in two classes."""
    for number, (name, content) in enumerate(ODD.items()):
        folder = tmp_path / "data" / f"class {number % 2}\n蚂蚁"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return tmp_path / "data"


def test_odd_images_make_batches(odd):
    source = open_split(str(odd), "train")
    assert sum(
        batch["mask"].sum() for batch in train_batches(source, TINY, IMAGENET)
    ) == TINY.epochs * len(ODD)
    assert sum(batch["mask"].sum() for batch in eval_batches(source, TINY, 4)) == len(ODD)


def bomb():
    """A PNG of 20,000 x 20,000 pixels in a few kilobytes."""
    return saved(Image.new("1", (20_000, 20_000)), "PNG")


BAD = {
    "cut.jpg": encode(PHOTO, "JPEG")[:400],
    "cut.png": encode(PHOTO)[:200],
    "cut.webp": encode(PHOTO, "WEBP")[:60],
    "cut.gif": encode(PHOTO, "GIF")[:20],
    "flipped.png": encode(PHOTO)[:60] + bytes([encode(PHOTO)[60] ^ 64]) + encode(PHOTO)[61:],
    "bomb.png": bomb(),
}  # fmt: skip


def with_bad(root, *names, many=0):
    """Two classes of whole images, 10 and more, with these bad ones in the first."""
    for label in ("ants", "bees"):
        (root / label).mkdir(parents=True)
        for i in range(5 + many):
            (root / label / f"{i}.png").write_bytes(encode(noise(20, 24, i)))
    for name in names:
        (root / "ants" / name).write_bytes(BAD[name])
    return str(root)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_named_or_left_out(name, tmp_path, capsys):
    """By default it ends the stream; with skip_bad it is masked, warned of once, and all others are there."""
    root = with_bad(tmp_path / "data", name)
    source = open_split(root, "train")
    for batches in (train_batches(source, TINY, IMAGENET), eval_batches(source, TINY, 4)):
        with pytest.raises(DataError, match=rf"cannot decode '.*ants/{name}'"):
            list(batches)
    skipping = TrainConfig(**{**vars(TINY), "skip_bad": True})
    source = open_split(root, "train", skip_bad=True)
    bad = next(i for i in range(source.size) if name in source.file_name(i))
    for make in (
        lambda: train_batches(source, skipping, IMAGENET),
        lambda: eval_batches(source, skipping, 4),
    ):
        batches = list(make())
        index, mask = (
            np.concatenate([batch[key] for batch in batches]) for key in ("index", "mask")
        )
        assert mask.tolist() == ((index >= 0) & (index != bad)).tolist()
        for batch in batches:
            assert not batch["image"][~batch["mask"]].any()
        assert (
            capsys.readouterr().err.count(f"{name}' cannot be read or decoded, and is left out")
            == 1
        )


def test_those_beside_a_bad_image_are_as_they_were(tmp_path):
    """In the order of the source, with their labels and pixels; a photo that is whole in one folder is cut in the other."""
    names = [str(tmp_path / name) for name in ("whole", "cut")]
    for root in names:
        with_bad(Path(root))
        (Path(root) / "ants" / "2.png").write_bytes(
            encode(PHOTO) if root.endswith("whole") else BAD["cut.png"]
        )
    skipping = TrainConfig(**{**vars(TINY), "skip_bad": True})
    whole, cut = (open_split(root, "train", skip_bad=True) for root in names)
    for make in (
        lambda source: train_batches(source, skipping, IMAGENET),
        lambda source: eval_batches(source, skipping, 4),
    ):
        for one, other in zip(make(whole), make(cut), strict=True):
            np.testing.assert_array_equal(one["index"], other["index"])
            there = other["mask"]
            assert (one["mask"] & ~there).sum() == (one["index"] == 2).sum()
            for key in ("image", "label", "colour_shift"):
                np.testing.assert_array_equal(one[key][there], other[key][there])


def test_colours_are_measured_without_a_bad_image(tmp_path, capsys):
    source = open_split(with_bad(tmp_path / "data", "cut.jpg"), "train", skip_bad=True)
    measured = measure_colours(source, skip_bad=True)
    assert measured.count == 10
    assert "cut.jpg' cannot be read" in capsys.readouterr().err
    expected = measure_colours(open_split(with_bad(tmp_path / "whole"), "train"))
    np.testing.assert_array_equal(measured.pixel_mean, expected.pixel_mean)
    np.testing.assert_array_equal(measured.image_std, expected.image_std)
    with pytest.raises(DataError, match=r"cut\.jpg"):
        measure_colours(source)


def test_a_list_of_another_split_is_taken(tmp_path):
    with_bad(tmp_path / "data" / "train")
    with_bad(tmp_path / "data" / "val")
    with_bad(tmp_path / "data" / "test", "cut.jpg")
    out = str(tmp_path / "list")
    assert cli.main(["verify-data", str(tmp_path / "data"), "--out", out]) == 3
    assert read_exclude_list(out) == ("test/ants/cut.jpg",)
    assert open_train_val(str(tmp_path / "data"), exclude=read_exclude_list(out))[0].size == 10
    assert open_split(str(tmp_path / "data"), "test", exclude=read_exclude_list(out)).size == 10


def test_what_was_found_is_listed_where_verifying_ends_early(tmp_path, capsys):
    with_bad(tmp_path / "data" / "train", "cut.jpg")
    with_bad(tmp_path / "data" / "val")
    shutil.rmtree(tmp_path / "data" / "val" / "ants")
    (tmp_path / "data" / "val" / "ants").mkdir()
    out = str(tmp_path / "list")
    assert cli.main(["verify-data", str(tmp_path / "data"), "--out", out]) == 2
    assert "ants' has no images" in capsys.readouterr().err
    assert read_exclude_list(out) == ("train/ants/cut.jpg",)


def test_a_home_is_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with_bad(tmp_path / "data", "cut.jpg")
    ((_, _, bad),) = verify_images("~/data")
    assert [each.file for each in bad] == ["ants/cut.jpg"]


def test_a_bomb_is_refused_before_it_is_decoded():
    assert MAX_DECODED_PIXELS < 20_000**2
    with pytest.raises(tf.errors.InvalidArgumentError, match="more than 178,956,970 pixels"):
        decode(tf.constant(BAD["bomb.png"]))


MEMORY = """
import resource, sys
from vgg_jax import IMAGENET, TrainConfig
from vgg_jax.data import open_split, train_batches
config = TrainConfig(image_size=32, scale=(32,), batch_size=4, epochs=1, skip_bad=True)
source = open_split(sys.argv[1], "train", skip_bad=True)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert sum(batch["mask"].sum() for batch in train_batches(source, config, IMAGENET)) == 10
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_bomb_takes_no_memory(tmp_path):
    """In a graph an assertion alone would hold up nothing: the image was decoded beside it, 1.2 GB."""
    root = with_bad(tmp_path / "data", "bomb.png")
    kilobytes = subprocess.run(
        [sys.executable, "-c", MEMORY, root], stdout=subprocess.PIPE, check=True
    ).stdout
    assert int(kilobytes) < 400_000


def test_too_many_bad_images_end_the_run(tmp_path):
    """One in a hundred may be bad, and one in any case."""
    root = with_bad(tmp_path / "data", "cut.jpg", "cut.png")
    source = open_split(root, "train", skip_bad=True)
    with pytest.raises(
        DataError, match=r"2 of the 12 images of .* expected at most one in 100; .*verify-data"
    ):
        list(eval_batches(source, TrainConfig(**{**vars(TINY), "skip_bad": True}), 4))


def test_a_file_that_vanishes_is_left_out(tmp_path, capsys):
    root = with_bad(tmp_path / "data")
    source = open_split(root, "train", skip_bad=True)
    (tmp_path / "data" / "bees" / "3.png").unlink()
    batches = list(eval_batches(source, TrainConfig(**{**vars(TINY), "skip_bad": True}), 4))
    assert sum(batch["mask"].sum() for batch in batches) == 9
    assert "bees/3.png' cannot be read" in capsys.readouterr().err


def test_an_image_that_may_not_be_read():
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # not pytest's own, which is closed to other users
        Path(folder).chmod(0o755)
        root = with_bad(Path(folder) / "data")
        open_split(root, "train")  # what is imported late
        (Path(root) / "bees" / "3.png").chmod(0)
        user = os.geteuid()
        if user == 0:  # who may read all
            os.seteuid(65534)
        try:
            with pytest.raises(DataError, match=r"1 of 10 files .* cannot be read: '.*bees/3.png'"):
                open_split(root, "train")
            source = open_split(root, "train", skip_bad=True)
            assert (
                sum(batch["mask"].sum() for batch in eval_batches(source, TINY, 4))
                == source.size
                == 9
            )
        finally:
            os.seteuid(user)


def test_files_that_are_no_images_of_every_kind(tmp_path):
    root = with_bad(tmp_path / "data")
    folder = tmp_path / "data" / "ants"
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    writer = os.open(folder / "pipe.jpg", os.O_RDWR)  # its reader would wait for more of it
    os.write(writer, encode(PHOTO))
    (tmp_path / "data" / "loop").symlink_to("loop")  # beside the classes
    with pytest.raises(DataError, match="5 of 15 files"):
        open_split(root, "train")
    assert len(open_split(root, "train", skip_bad=True).skipped) == 5
    os.close(writer)


def test_verify_finds_what_is_bad_and_exclude_leaves_it_out(tmp_path, capsys):
    """Whichever way the data's folder is called later, and wherever it is then."""
    root = with_bad(tmp_path / "data", *BAD)
    (tmp_path / "data" / "ants" / "text.jpg").write_text("no image")
    (tmp_path / "data" / "ants" / "two\nlines \udce9.jpg").write_bytes(BAD["cut.jpg"])
    out = str(tmp_path / "bad.jsonl")
    assert cli.main(["verify-data", root, "--out", out]) == 3
    said = capsys.readouterr().out
    assert "train: 8 of 18 images cannot be read" in said and "--exclude" in said
    expected = [*(f"ants/{name}" for name in (*BAD, "text.jpg")), "ants/two\nlines \udce9.jpg"]
    assert read_exclude_list(out) == tuple(sorted(expected))
    os.rename(root, tmp_path / "moved")
    train, validation = open_train_val(
        str(tmp_path / "moved") + "/", exclude=read_exclude_list(out)
    )
    assert train.size + validation.size == 10
    for source in (train, validation):
        assert sum(batch["mask"].sum() for batch in eval_batches(source, TINY, 4)) == source.size


def test_verify_says_why(tmp_path):
    root = with_bad(tmp_path / "data", "cut.jpg", "bomb.png")
    ((split, count, bad),) = verify_images(root)
    assert (split, count, [each.file for each in bad]) == (
        "train",
        12,
        ["ants/bomb.png", "ants/cut.jpg"],
    )
    assert bad[0].reason == "it has more than 178,956,970 pixels"
    assert "nvalid JPEG data" in bad[1].reason


def test_a_whole_data_set_verifies(tmp_path, prepared):
    out = tmp_path / "bad.jsonl"
    assert cli.main(["verify-data", with_bad(tmp_path / "data"), "--out", str(out)]) == 0
    assert out.read_text() == ""
    for folder in prepared.values():
        assert [
            (split, count, bad) for split, count, bad in verify_images("numbers", data_dir=folder)
        ] == [("train", 23, [])]


def test_records_are_excluded_by_their_number(prepared):
    for folder in prepared.values():
        whole, _ = open_train_val("numbers", data_dir=folder, validation_fraction=0.3)
        names = ("numbers train record 4", "numbers train record 22")
        train, validation = open_train_val(
            "numbers", data_dir=folder, validation_fraction=0.3, exclude=names
        )
        assert train.size + validation.size == 21
        seen = [
            int(example["index"])
            for source in (train, validation)
            for example in source.examples(None, 0).as_numpy_iterator()
        ]
        assert sorted(seen) == [i for i in range(23) if i not in (4, 22)]
        assert train.storage != whole.storage  # another list is another run


def test_a_list_of_other_data_is_refused(tmp_path):
    root = with_bad(tmp_path / "data")
    with pytest.raises(
        InputError, match=r"none of the 1 images to exclude, 'ants/x.jpg' for one, is in .*data"
    ):
        open_train_val(root, exclude=("ants/x.jpg",))


@pytest.mark.parametrize(
    "content", ["no JSON\n", '{"name": 1}\n', "[1]\n", '{"file": 3}\n', "\xff"]
)
def test_a_list_that_is_none(content, tmp_path):
    (tmp_path / "list").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match="expected the list that `vgg-jax verify-data` writes"):
        read_exclude_list(str(tmp_path / "list"))


def test_a_list_that_is_not_there(tmp_path, capsys):
    assert (
        cli.main(
            ["train", "digits", "--exclude", str(tmp_path / "nowhere"), "--no-compilation-cache"]
        )
        == 2
    )
    assert "nowhere (No such file or directory)" in capsys.readouterr().err


def test_a_list_is_read_as_it_was_written(tmp_path):
    ((_, _, bad),) = verify_images(with_bad(tmp_path / "data", *BAD))
    write_exclude_list(str(tmp_path / "list"), bad)
    assert read_exclude_list(str(tmp_path / "list")) == tuple(sorted(each.file for each in bad))
    assert [
        json.loads(line)["reason"] for line in (tmp_path / "list").read_text().splitlines()
    ] == [each.reason for each in bad]


@pytest.mark.parametrize("skip", [False, True])
def test_training_with_a_bad_image(skip, tmp_path, capsys, monkeypatch):
    """It ends with code 3, saying which; or goes on, and says over how many images its numbers are."""
    root = tmp_path / "data"
    with_bad(root / "train", "cut.jpg")
    with_bad(root / "val")
    monkeypatch.setitem(CONFIGS, "shallow", SHALLOW)
    argv = [
        "train",
        str(root),
        "--net",
        "shallow",
        "--image-size",
        "16",
        "--scale",
        "16",
        "--fc",
        "8",
        "8",
        "--batch-size",
        "4",
        "--epochs",
        "1",
    ]
    argv += [
        "--workdir",
        str(tmp_path / "w"),
        "--no-compilation-cache",
        *(["--skip-bad"] if skip else []),
    ]
    assert cli.main(argv) == (0 if skip else 3)
    captured = capsys.readouterr()
    assert "cut.jpg'" in captured.err
    if skip:
        (record,) = map(json.loads, (tmp_path / "w" / "metrics.jsonl").read_text().splitlines())
        assert (record["train"]["count"], record["validation"]["count"]) == (10, 10)
        shutil.rmtree(tmp_path / "w")
