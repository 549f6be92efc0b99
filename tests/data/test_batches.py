import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.tiny_data import TINY_TRAIN, encode, noise
from vgg_jax.configs.colours import IMAGENET
from vgg_jax.data import eval_batches, open_split, rescaled_images, train_batches
from vgg_jax.errors import InputError

ROOT = Path(__file__).parents[2]


def write_truncated(path):
    encoded = encode(noise(40, 40), "JPEG")
    path.write_bytes(encoded[: len(encoded) // 2])


def write_only_a_header(path):
    path.write_bytes(b"RIFF\0\0\0\0WEBPand nothing more")


@pytest.mark.slow
@pytest.mark.parametrize("write_broken", [write_truncated, write_only_a_header])
def test_batches_name_broken_image(folder, write_broken):
    path = folder / "train" / "bees" / "broken.jpg"
    write_broken(path)
    source = open_split(str(folder), "train")
    for batches in (
        train_batches(source, TINY_TRAIN, IMAGENET),
        train_batches(source, TINY_TRAIN, IMAGENET, first_epoch=1, first_batch=1),
        eval_batches(source, TINY_TRAIN, 4),
    ):
        with pytest.raises(InputError) as error:
            list(batches)
        message = str(error.value)
        assert message.startswith(f"cannot decode {str(path)!r}: ")
        assert "; expected an intact image: replace or remove it; a run resumes" in message
        assert "nvalid JPEG data" in message or "Pillow" in message
        assert len(message) < len(str(path)) + 200
        assert not any(part in message for part in ("\n", "{{", "Traceback"))


def test_batches_before_broken_image_arrive(folder):
    write_truncated(folder / "train" / "bees" / "broken.jpg")
    source = open_split(str(folder), "train")
    broken = next(i for i in range(source.size) if source.file_name(i).endswith("broken.jpg"))
    arrived = []
    with pytest.raises(InputError, match=r"broken\.jpg"):
        for batch in eval_batches(source, TINY_TRAIN, 4):
            arrived += batch["index"].tolist()
    assert arrived == list(range(broken // 4 * 4))


def test_batches_name_deleted_file(folder):
    source = open_split(str(folder), "train")
    (folder / "train" / "ants" / "3.png").unlink()
    with pytest.raises(InputError, match=r"cannot read .*train: .*ants/3\.png"):
        list(train_batches(source, TINY_TRAIN, IMAGENET))


def test_batches_name_image_too_large_at_scale(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (700, 1)).save(tmp_path / "a" / "line.png")
    source = open_split(str(tmp_path), "train")
    assert len(list(rescaled_images(source, (16,), True))) == 1
    message = r"cannot decode '.*a/line\.png': at the test scale it has more than 2,000,000 pixels"
    with pytest.raises(InputError, match=message):
        list(rescaled_images(source, (256,), True))


@pytest.mark.integration
def test_batches_interrupt_ends_process(folder):
    for format in ("png", "webp"):  # Python decodes WebP, in threads of TensorFlow
        (folder / "train" / "ants" / f"more.{format}").write_bytes(encode(noise(40, 40), format))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.programs.endless_batches", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        seconds = time.monotonic() - started
    finally:
        process.kill()  # if the interrupt did not end it
    assert b"KeyboardInterrupt" in errors and b"Exception ignored" not in errors
    assert seconds < 15
