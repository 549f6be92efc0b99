"""From a trained net and a data set to class posteriors, errors and the files that keep both; fusion of such files (§3.2, §4)."""

import dataclasses
import io
import json
import re
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.configs.evaluation import DENSE, MAX_PIXELS_PER_BATCH, EvalProtocol
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.errors import InputError
from vgg_jax.evaluation.dense import iter_posteriors, resolve_protocol
from vgg_jax.metrics import compute_sums, finalize, wilson_interval
from vgg_jax.paths import to_path
from vgg_jax.runs.files import atomic_write
from vgg_jax.runs.metadata import load_run
from vgg_jax.weights import load


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The posteriors of a split, in its order."""

    posteriors: np.ndarray  # float32 (N, K)
    labels: np.ndarray  # int32 (N,)
    files: np.ndarray  # str (N,)
    classes: np.ndarray  # str (K,)

    def errors(self) -> dict[str, Any]:
        """Top-1 and top-5 error in [0, 1], each with its 95 % interval, the mean of -log of the right class's posterior, and the count."""
        logits = jnp.log(jnp.maximum(self.posteriors, np.finfo(np.float32).tiny))
        found = finalize(
            jax.tree.map(
                float,
                compute_sums(logits, jnp.asarray(self.labels), jnp.ones(len(self.labels), bool)),
            )
        )
        intervals = {
            f"{name}_interval": wilson_interval(found[name], len(self.labels))
            for name in ("top1_error", "top5_error")
        }
        return found | intervals


def evaluate(
    path: str | Path,
    data: str | None = None,
    split: str = "val",
    *,
    protocol: EvalProtocol = DENSE,
    scales: Sequence[int] = (),
    data_dir: str | None = None,
    download: bool = False,
    skip_bad: bool = False,
    pixels: int = MAX_PIXELS_PER_BATCH,
) -> tuple[Evaluation, dict[str, Any]]:
    """The best net of a run, or the net in a file of weights, on every image of a split: the evaluation and what is to be said of it.

    `data` is the run's own if none is given; of that, "val" is what the run validated on. Its classes are the net's or some of them, in
    any order; ImageNet's go by their WordNet ids. Test scales Q are by default the training scale S, or the middle of its jitter (§4.1),
    and 256 for a file of a 224-pixel net. Mirror images count by default unless the run was trained without them. Raises InputError
    for anything wrong in the input.
    """
    model, variables, metadata = load(path)
    config: Any = metadata.get("config")  # of a run
    protocol, scales = resolve_protocol(protocol, scales, model, metadata, path)
    from tqdm import tqdm

    from vgg_jax.data import (  # TensorFlow is for those who read files
        VALIDATION,
        open_split,
        open_train_val,
        rescaled_images,
    )

    if data is None and config is None:
        raise InputError(
            f"{path} is a file of weights and DATA is not given: expected an image folder or a name of TensorFlow Datasets"
        )
    data = config.data if data is None else data
    own = config is not None and data == config.data
    where: dict[str, Any] = {
        "data_dir": data_dir,
        "download": download,
        "skip_bad": skip_bad or (own and config.skip_bad),
    }
    where["exclude"] = config.exclude if own else ()
    if own and split in VALIDATION:
        train, source = open_train_val(
            data, validation_fraction=config.validation_fraction, seed=config.seed, **where
        )
        run = load_run(to_path(path))
        there, here = (
            (run.storage, run.train_size, run.validation_size),
            (train.storage, train.size, source.size),
        )
        if there != here:
            raise InputError(
                f"{data} is not what {path} was trained on: storage and sizes were {there} and are {here}, so what it "
                "validated on is not known; pass another --split, or the data as they were"
            )
    else:
        source = open_split(data, split, **where)
    positions = map_class_indices(
        source.classes, metadata["classes"], f"{source.name} has classes that {path} does not know"
    )

    labels, files = np.zeros(source.size, np.int32), []

    def images():
        for index, example in enumerate(
            rescaled_images(source, scales, metadata["preprocessing"]["exif"])
        ):
            labels[index] = positions[example["label"][0]]
            files.append(source.file_name(int(example["index"][0])))
            yield [image[0] for image in example["scaled"]]

    stream = iter_posteriors(
        model,
        variables,
        images(),
        mesh=make_mesh(len(jax.local_devices()), jax.local_devices()),
        protocol=protocol,
        mean_rgb=metadata["preprocessing"]["mean_rgb"],
        pixels=pixels,
    )
    found = np.full((source.size, model.num_classes), np.nan, np.float32)
    started, done = time.monotonic(), 0
    with tqdm(
        desc="evaluation", total=source.size, unit=" images", leave=False, disable=None
    ) as bar:
        for index, posterior in stream:
            found[index] = posterior
            done += 1
            bar.update()
    seconds = time.monotonic() - started
    assert done == source.size == len(files), f"{done} of {source.size} images were evaluated"
    evaluation = Evaluation(found, labels, np.array(files, str), np.array(metadata["classes"], str))
    facts = {
        "run": str(path),
        "epoch": metadata.get("epoch"),
        "data": data,
        "split": split,
        "net": metadata["net"],
        "scales": list(scales),
        "protocol": dataclasses.asdict(protocol) | {"flip": protocol.use_flip},
        **evaluation.errors(),
        "seconds": round(seconds, 3),
        "images_per_second": round(source.size / seconds, 2),
    }
    return evaluation, facts


def map_class_indices(names: Sequence[str], known: Sequence[str], otherwise: str) -> np.ndarray:
    """int (n,): where a net has the classes of a data set. "n01440764" is also "n01440764 tench, Tinca tinca"."""
    places = {name.split()[0]: i for i, name in enumerate(known) if re.match(r"n\d{8} ", name)} | {
        name: i for i, name in enumerate(known)
    }
    unknown = [name for name in names if name not in places]
    if unknown:
        few = [
            ", ".join(map(repr, some[:5])) + (", …" if len(some) > 5 else "")
            for some in (unknown, known)
        ]
        raise InputError(f"{otherwise}: {few[0]}; expected some of its {len(known)}: {few[1]}")
    return np.array([places[name] for name in names])


def save_evaluation(out: str | Path, evaluation: Evaluation, facts: dict[str, Any]) -> None:
    """Writes posteriors.npz and evaluation.json into the folder, each whole or not at all."""
    folder, content = to_path(out), io.BytesIO()
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(content, **dataclasses.asdict(evaluation))
    atomic_write(folder / "posteriors.npz", content.getvalue())
    atomic_write(folder / "evaluation.json", (json.dumps(facts, indent=1) + "\n").encode())


def load_evaluation(path: str | Path) -> Evaluation:
    """Raises InputError for a file that `save_evaluation` did not write."""
    try:
        with to_path(path).open("rb") as file, np.load(file, allow_pickle=False) as content:
            evaluation = Evaluation(
                **{field.name: content[field.name] for field in dataclasses.fields(Evaluation)}
            )
        if not all(isinstance(array, np.ndarray) for array in vars(evaluation).values()):
            raise ValueError("a part of it is no array")
        n, k = evaluation.posteriors.shape
        if (evaluation.labels.shape, evaluation.files.shape, evaluation.classes.shape) != (
            (n,),
            (n,),
            (k,),
        ):
            raise ValueError("its arrays do not fit together")
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        TypeError,
        RuntimeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise InputError(
            f"{path} cannot be read ({error}): expected a posteriors.npz as `vgg-jax evaluate` writes it"
        ) from error
    return evaluation


def fuse(paths: Sequence[str | Path]) -> Evaluation:
    """The mean of the posteriors in some files (§4.4). Raises InputError where their images, labels or classes differ."""
    first = load_evaluation(paths[0])
    total = np.zeros(first.posteriors.shape)
    for path in paths:
        other = load_evaluation(path)
        for name, what in (("classes", "class"), ("files", "image"), ("labels", "label of image")):
            one, two = getattr(first, name), getattr(other, name)
            if not np.array_equal(one, two):
                raise InputError(
                    f"{path} does not fit {paths[0]}: {what} {_first_difference(two, one)}; evaluate both on the same split"
                )
        total += other.posteriors
    return dataclasses.replace(first, posteriors=(total / len(paths)).astype(np.float32))


def format_errors(facts: dict[str, Any]) -> str:
    """The errors in one line, with all that they depend on."""
    parts = []
    for k in (1, 5):
        low, high = facts[f"top{k}_error_interval"]
        parts.append(f"top-{k} error {facts[f'top{k}_error']:.2%} ({low:.2%} to {high:.2%})")
    return f"{', '.join(parts)}; 95 % intervals, {facts['count']} images"


def _first_difference(here: Sequence, there: Sequence) -> str:
    if len(here) != len(there):
        return f"count is {len(here)} and {len(there)}"
    at = next(i for i, (one, two) in enumerate(zip(here, there, strict=True)) if one != two)
    return f"{at} is {str(here[at])!r} and {str(there[at])!r}"
