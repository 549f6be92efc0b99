import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from tests.helpers.tiny_data import encode, noise
from vgg_jax.configs.colours import IMAGENET
from vgg_jax.configs.train import TrainConfig
from vgg_jax.data import eval_batches, open_split, rescaled_images, train_batches
from vgg_jax.errors import InputError

TINY = TrainConfig(image_size=32, scale=(32, 40), batch_size=4, epochs=3, seed=5)


def truncated(folder):
    encoded = encode(noise(40, 40), "JPEG")
    (folder / "train" / "bees" / "broken.jpg").write_bytes(encoded[: len(encoded) // 2])


def no_image(folder):
    (folder / "train" / "bees" / "broken.jpg").write_bytes(b"RIFF\0\0\0\0WEBPand nothing more")


@pytest.mark.parametrize("spoil", [truncated, no_image])
def test_a_broken_image_is_named(folder, spoil):
    spoil(folder)
    source = open_split(str(folder), "train")
    path = str(folder / "train" / "bees" / "broken.jpg")
    for batches in (
        train_batches(source, TINY, IMAGENET),
        train_batches(source, TINY, IMAGENET, first_epoch=1, first_batch=1),
        eval_batches(source, TINY, 4),
    ):
        with pytest.raises(InputError) as error:
            list(batches)
        message = str(error.value)
        assert (
            message.startswith(f"cannot decode {path!r}: ")
            and "; expected a whole image, so replace it" in message
        )
        assert "nvalid JPEG data" in message or "Pillow" in message
        assert (
            len(message) < len(path) + 200
            and "\n" not in message
            and "{{" not in message
            and "Traceback" not in message
        )


def test_the_batches_before_a_broken_image_arrive(folder):
    truncated(folder)
    source = open_split(str(folder), "train")
    broken = next(i for i in range(source.size) if "broken" in source.file_name(i))
    arrived = []
    with pytest.raises(InputError, match=r"broken\.jpg"):
        for batch in eval_batches(source, TINY, 4):
            arrived += batch["index"].tolist()
    assert arrived == list(range(broken // 4 * 4))


def test_a_file_that_disappears_is_named(folder):
    source = open_split(str(folder), "train")
    (folder / "train" / "ants" / "3.png").unlink()
    with pytest.raises(InputError, match=r"cannot read .*train: .*ants/3\.png"):
        list(train_batches(source, TINY, IMAGENET))


def test_an_interrupt_ends_the_process(folder):
    for kind in ("png", "webp"):  # the second goes through Python threads
        (folder / "train" / "ants" / f"more.{kind}").write_bytes(encode(noise(40, 40), kind))
    script = f"""
from vgg_jax.configs.models import IMAGENET, TrainConfig
from vgg_jax.data import open_split, train_batches
config = TrainConfig(image_size=32, scale=(32,), batch_size=4, epochs=10**9)
for i, batch in enumerate(train_batches(open_split({str(folder)!r}, "train"), config, IMAGENET)):
    if i == 20:
        print("ready", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"ready\n"
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()  # one that did not end would go on for ever beside the other tests
    assert (
        b"KeyboardInterrupt" in errors
        and b"Exception ignored" not in errors
        and time.monotonic() - started < 15
    )


def test_what_would_be_too_large_at_the_test_scale_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (700, 1)).save(tmp_path / "a" / "line.png")
    source = open_split(str(tmp_path), "train")
    assert len(list(rescaled_images(source, (16,), True))) == 1
    with pytest.raises(
        InputError,
        match=r"cannot decode '.*a/line\.png': at the test scale it has more than 2,000,000 pixels",
    ):
        list(rescaled_images(source, (256,), True))
