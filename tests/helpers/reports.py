"""Folders of runs, written by hand, that reports are made of."""

import json

from tests.helpers.tiny import init
from vgg_jax import IMAGENET, TrainConfig
from vgg_jax.division import INPUT_VERSION
from vgg_jax.input_data import open_train_val
from vgg_jax.model import build_model
from vgg_jax.runs.checkpoint import CheckpointStore
from vgg_jax.runs.metadata import RunMetadata, create_run


def record(epoch, accuracy, lr=0.1):
    """A line of metrics.jsonl."""
    errors = {"top1_error": 1 - accuracy, "top5_error": 0.0, "accuracy": accuracy}
    return {
        "epoch": epoch,
        "time": f"2026-01-02T12:{epoch:02d}:00",
        "seconds": 10.0,
        "images_per_second": 2.2,
        "input_wait_seconds": 1.0,
        "validation_seconds": 4.0,
        "learning_rate": lr,
        "train": {"loss": 0.5 / epoch, "count": 22, **errors},
        "validation": {"loss": 1 / epoch, "count": 7, **errors},
    }


RECORDS = (
    record(1, 0.5),
    record(2, 0.75),
    record(3, 0.75, lr=0.01),
    record(4, 0.625, lr=0.01),
)


def write_run(folder, photos, records=RECORDS, best_epoch=2, **settings):
    """Writes a run of the net "shallow" on photos or an .npz file, with random parameters."""
    values = {"net": "shallow", "fc": (24, 16), "image_size": 16, "scale": (24,)}
    config = TrainConfig(data=str(photos), learning_rate=0.1, **values | settings)
    train, validation = open_train_val(config, version=INPUT_VERSION)
    folder.mkdir(parents=True, exist_ok=True)
    create_run(
        folder,
        RunMetadata(
            config,
            train.classes,
            IMAGENET,
            train.storage,
            train.size,
            validation.size,
            command="vgg-jax train photos",
            environment={"jax": "1.2.3", "devices": "1 x cpu"},
        ),
    )
    lines = [json.dumps(line) + "\n" for line in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    if records:
        validated = records[best_epoch - 1]["validation"]
        with CheckpointStore(folder / "best") as best:
            variables = init(build_model(config, len(train.classes)))
            best.save(best_epoch, variables, {"epoch": best_epoch, "validation": validated})
    return folder
