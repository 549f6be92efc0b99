"""The crops of a preview against those of training, and the sheet that shows them."""

import dataclasses
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import vgg_jax
from tests.helpers.storages import FILE_STORAGES, arrays, open_storage, write_photos
from tests.helpers.tiny_data import TINY_TRAIN, by_example, decode_by_pillow
from vgg_jax import IMAGENET, InputError
from vgg_jax.input_data import cached, cropped, eval_batches, train_batches
from vgg_jax.reporting import contact_sheet, text
from vgg_jax.reporting.contact_sheet import draw, fit, layout
from vgg_jax.reporting.crops import Crops, Preview, describe, first_crops, open_preview
from vgg_jax.reporting.grid import add_colour_shift

CONFIG = dataclasses.replace(TINY_TRAIN, scale=(32, 34))


def add_shift(image, shift):
    """What the net sees, pixel by pixel: float64 first, then whole numbers from 0 to 255."""
    moved = np.float64(image) + np.float64(shift)
    return np.where(moved < 0, 0, np.where(moved > 255, 255, np.round(moved))).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [False, True], ids=["stored", "cached"])
@pytest.mark.parametrize("storage", [*FILE_STORAGES, "arrays"])
def test_crops_are_those_of_training(storage, cache, tmp_path, request, monkeypatch):
    """The first rows of the first batch, and their crops in all batches, to the bit."""
    source = open_storage(storage, tmp_path, request, monkeypatch)
    if cache:
        source = cached(source, CONFIG)
    batches = list(cropped(train_batches(source, CONFIG, IMAGENET), CONFIG, IMAGENET))
    of_training = by_example(batches)
    crops = first_crops(source, CONFIG, IMAGENET, 6, CONFIG.epochs)
    order = np.concatenate([batch["index"] for batch in batches])[:6].tolist()
    assert crops.names == tuple(map(source.file_name, order))
    assert crops.crops.shape == (6, 3, 32, 32, 3) and crops.crops.dtype == np.uint8
    for row, index in enumerate(order):
        assert crops.labels[row] == of_training[0, index]["label"]
        for epoch in range(CONFIG.epochs):
            example = of_training[epoch, index]
            expected = add_shift(example["image"], example["colour_shift"])
            np.testing.assert_array_equal(crops.crops[row, epoch], expected)
    evaluated = cropped(eval_batches(source, CONFIG, 5)(), CONFIG, IMAGENET)
    whole = by_example(evaluated)
    for row, index in enumerate(order):
        np.testing.assert_array_equal(crops.evaluation[row], whole[0, index]["image"])
        assert min(crops.photos[row].shape[:2]) == CONFIG.test_scale


def test_colour_shift_is_added_rounded_and_clipped():
    image = np.array([[[[0, 100, 250]]], [[[3, 7, 255]]]], np.uint8)
    shift = np.array([[-3.2, 4.6, 7.0], [1.4, -0.6, 0.4]], np.float32)
    assert add_colour_shift(image, shift).reshape(2, 3).tolist() == [
        [0, 105, 255],
        [4, 6, 255],
    ]


def test_photos_are_whole(tmp_path):
    """As Pillow resizes them, up to a level."""
    folder = write_photos(tmp_path)
    crops = open_preview(folder, 4, 1, image_size=32, scale=(40,), colour_shift=0.0).crops
    for name, photo in zip(crops.names, crops.photos, strict=True):
        with open(name, "rb") as file:
            pixels = decode_by_pillow(file.read())
        expected = np.asarray(Image.fromarray(pixels).resize((60, 40), Image.Resampling.BILINEAR))
        assert np.abs(photo.astype(int) - expected).max() <= 1


@pytest.mark.slow
def test_settings_decide_the_crops(tmp_path):
    """Measured colours, flips, the seed, and images that are left out."""
    folder = write_photos(tmp_path)
    still = {"image_size": 32, "crop": "centre", "flip": False}
    plain = open_preview(folder, 4, 3, **still, colour_shift=0.0).crops
    for epoch in range(3):
        np.testing.assert_array_equal(plain.crops[:, epoch], plain.evaluation)
    reseeded = open_preview(folder, 4, 3, **still, colour_shift=0.0, seed=1).crops
    assert reseeded.names != plain.names
    measured = open_preview(folder, 4, 3, **still, statistics="measure").crops
    usual = open_preview(folder, 4, 3, **still).crops
    assert measured.names == usual.names == plain.names
    assert not np.array_equal(measured.crops, usual.crops)
    flipped = open_preview(folder, 4, 9, **still | {"flip": True}, colour_shift=0.0).crops
    mirrored = (flipped.crops == flipped.evaluation[:, None, :, ::-1]).all((2, 3, 4))
    assert 9 < mirrored.sum() < 27  # of 36 crops; half are expected
    left_out = open_preview(folder, 100, 1, **still, exclude=("a/0.png",))
    assert left_out.size == 12 and "0.png" not in {*map(base_name, left_out.crops.names)}


def base_name(path):
    return path.rpartition("/")[2]


@pytest.mark.slow
def test_unreadable_image_is_left_out(tmp_path, caplog):
    folder = write_photos(tmp_path)
    intact = open_preview(folder, 4, 1, image_size=32).crops
    with open(intact.names[1], "r+b") as file:
        file.truncate(120)
    with pytest.raises(InputError, match=f"cannot decode '{intact.names[1]}'"):
        open_preview(folder, 4, 1, image_size=32)
    skipped = open_preview(folder, 3, 1, image_size=32, skip_bad=True).crops
    assert skipped.names == (intact.names[0], *intact.names[2:4])
    np.testing.assert_array_equal(skipped.crops, intact.crops[[0, 2, 3]])
    assert "cannot be read or decoded, and is left out" in caplog.text
    everything = open_preview(folder, 100, 1, image_size=32, skip_bad=True)
    assert len(everything.crops.labels) == everything.size - 1


def made_up(count=2, epochs=3, size=32, classes=("ants", "bees"), names=None, photo=(40, 60)):
    """A preview of noise."""
    rng = np.random.default_rng(0)

    def noise(*shape):
        return rng.integers(0, 256, (*shape, 3), np.uint8)

    crops = Crops(
        photos=tuple(noise(*photo) for _ in range(count)),
        crops=noise(count, epochs, size, size),
        evaluation=noise(count, size, size),
        labels=np.arange(count, dtype=np.int32) % len(classes),
        names=names or tuple(f"photos/train/{i}.jpg" for i in range(count)),
    )
    config = dataclasses.replace(CONFIG, image_size=size, scale=(size,))
    return Preview(crops, config, "photos train", 40, classes)


def as_png(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


@pytest.mark.parametrize(("size", "zoom"), [(32, 5), (64, 3), (224, 1)])
def test_sheet_has_the_pixels_of_the_crops(size, zoom):
    preview = made_up(size=size, photo=(size, size))
    figure = draw(preview)
    (axes,) = figure.axes
    assert len(axes.images) == 2 * (1 + 3 + 1)
    sheet, places = as_png(figure), layout(preview)
    assert places.cell == size * zoom
    assert sheet.shape == (*places.sides[::-1], 3)
    for row, top in enumerate(places.tops):
        panels = [preview.crops.photos[row], *preview.crops.crops[row]]
        for panel, left in zip([*panels, preview.crops.evaluation[row]], places.lefts, strict=True):
            shown = sheet[top : top + size * zoom, left : left + size * zoom]
            np.testing.assert_array_equal(shown, panel.repeat(zoom, 0).repeat(zoom, 1))
    assert (sheet[:, : contact_sheet.MARGIN - 1] == 255).all()


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ((50, 50), (100, 100)),
        ((50, 75), (150, 100)),
        ((10, 100), (150, 15)),
        ((100, 10), (10, 100)),
    ],
)
def test_photo_fits_into_its_column(sides, expected):
    assert fit(np.zeros((*sides, 3)), 100) == expected


def test_describe():
    images, settings = describe(made_up())
    assert images == "2 of the 40 images of photos train, epochs 1 to 3"
    assert settings == "S = 32, random crops of 32 pixels, flip, colour shift 0.1, Q = 32"
    preview = made_up(epochs=1)
    config = dataclasses.replace(
        preview.config, scale=(32, 48), flip=False, colour_shift=0.0, crop="centre"
    )
    images, settings = describe(preview._replace(config=config, size=2))
    assert images == "all 2 images of photos train, epoch 1"
    assert settings == "S = 32 to 48, centre crops of 32 pixels, no flip, no colour shift, Q = 40"


def test_any_name_is_drawn_without_a_warning():
    """Warnings are errors in tests. TeX would fail on the dollar signs."""
    classes = ("$x_{\\frac$", "蟻と蜂" * 90, "a\nb\t\udcff", "n01440764 " * 40)
    names = ("муравей.jpg", "百" * 300, "$\\alpha$ 50%.jpg", "x" * 300 + ".jpg")
    figure = draw(made_up(count=4, epochs=1, classes=classes, names=names))
    width = layout(made_up(epochs=1)).sides[0]
    as_png(figure)
    names = figure.axes[0].texts[-8:]
    assert all(text.get_window_extent().x1 < width - 15 for text in figure.axes[0].texts)
    assert [name.get_text() for name in names[:2]] == ["$x_{\\frac$", "муравей.jpg"]
    assert names[4].get_text() == "a□b□□" and all("…" in names[i].get_text() for i in (2, 3, 6, 7))


def test_missing_glyphs_become_boxes(monkeypatch):
    monkeypatch.setattr(text, "_other_fonts", lambda: [])
    assert text.drawable("蟻 ants é муравей") == ("□ ants é муравей", ["DejaVu Sans"])


def test_installed_fonts_are_used():
    """STIXGeneral comes with matplotlib, and has a letter that DejaVu Sans lacks."""
    letter = chr(min(text._characters("STIXGeneral") - text._characters("DejaVu Sans")))
    shown, families = text.drawable(f"a{letter}")
    assert shown == f"a{letter}" and len(families) == 2


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        ("ants", 4, "ants"),
        ("0123456789", 7, "012…789"),
        ("0123456789", 6, "01…789"),
        ("蟻蟻蟻蟻蟻", 10, "蟻蟻蟻蟻蟻"),
        ("蟻蟻蟻蟻蟻", 9, "蟻蟻…蟻蟻"),
    ],
)
def test_shorten_to_width(name, width, expected):
    assert text.shorten_to_width(name, width) == expected


@pytest.mark.slow
def test_preview_takes_what_fit_takes(tmp_path):
    """Arrays, their file and a configuration, with the same crops."""
    np.savez(tmp_path / "x.npz", x_train=arrays()[0], y_train=arrays()[1])
    settings = {"image_size": 32, "seed": 3}
    in_memory = vgg_jax.reporting.preview(arrays(), images=3, epochs=2, **settings)
    file = vgg_jax.reporting.preview(tmp_path / "x.npz", images=3, epochs=2, **settings)
    for one, other in zip(in_memory.axes[0].images, file.axes[0].images, strict=True):
        np.testing.assert_array_equal(one.get_array(), other.get_array())
    config = vgg_jax.preset(write_photos(tmp_path), image_size=32)
    assert len(vgg_jax.reporting.preview(config, images=3, epochs=2).axes[0].images) == 3 * 4


def test_preview_leaves_out_held_out_arrays():
    """With arrays to validate on, training gets all others."""
    preview = open_preview(arrays(), 2, 1, validation=arrays(4), classes=["ant", "bee"])
    assert (preview.size, preview.classes) == (14, ("ant", "bee"))
    assert open_preview(arrays(), 2, 1).size == 13  # one is held out


@pytest.mark.slow
def test_preview_of_arrays_needs_no_tensorflow(tmp_path):
    np.savez(tmp_path / "x.npz", x_train=arrays()[0], y_train=arrays()[1])
    program = (
        "import sys, vgg_jax; sys.modules['tensorflow'] = None; "
        f"vgg_jax.reporting.preview({str(tmp_path / 'x.npz')!r}, images=2, epochs=1); "
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "images is 0: expected a number from 1 to 100"),
        ({"epochs": 101}, "epochs is 101: expected a number from 1 to 100"),
        ({"images": 50, "epochs": 50}, "images is 50 and epochs is 50: expected at most 2000"),
        ({"sclae": 3}, "sclae is no setting"),
        ({"image_size": 32, "scale": (30,)}, "scale is .* expected at least the image size, 32"),
    ],
)
def test_preview_refuses(options, message):
    with pytest.raises(InputError, match=message):
        vgg_jax.reporting.preview("digits", **options)


def test_preview_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"need matplotlib.*pip install -e '\.\[report\]'"):
        vgg_jax.reporting.preview("digits")
