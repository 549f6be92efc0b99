"""The commands of the command line; each returns an exit code."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from vgg_jax.configs.evaluation import EvalProtocol
from vgg_jax.configs.models import CONFIGS
from vgg_jax.configs.presets import preset
from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError
from vgg_jax.paths import to_path
from vgg_jax.runtime.memory import configure_malloc


def train(
    data: str, workdir: str | None, data_dir: str | None, download: bool, **given: Any
) -> int:
    how = {
        name: given.pop(name) for name in ("save_seconds", "on_nan", "debug_nans") if name in given
    }
    if "exclude" in given:
        from vgg_jax.data import read_exclude_list

        given["exclude"] = read_exclude_list(given["exclude"])
    distributed = given.pop("distributed", "auto")
    spread = given.pop("mesh", {}) | {
        name: given.pop(name) for name in ("fsdp", "reduce") if name in given
    }
    config = preset(data, **given)
    from vgg_jax.distributed import multihost
    from vgg_jax.distributed.sharding import MeshConfig
    from vgg_jax.training.report import divergence_hint

    layout = MeshConfig(**spread)
    if joined := multihost.initialize(distributed):
        if not multihost.is_main_process():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # also what C++ prints
        print(joined, flush=True)
    from vgg_jax.training.loop import CheckpointSaveError, DivergedError, fit

    try:
        with multihost.shutdown_on_exit():
            outcome = fit(
                config,
                workdir or f"runs/{slugify(data)}-{config.net}",
                data_dir,
                download,
                layout=layout,
                **how,
            )
    except multihost.ProcessLostError as error:
        print(f"vgg-jax: {error}", file=sys.stderr)
        return 76
    except DivergedError as error:
        if multihost.is_main_process():
            print(f"vgg-jax: {error}: {divergence_hint(error.rate)}", file=sys.stderr)
        return 4
    except CheckpointSaveError as error:
        if multihost.is_main_process():
            print(
                f"vgg-jax: {error}; make room, and the same command goes on from what was saved before",
                file=sys.stderr,
            )
        return 74
    return 75 if outcome.stopped else 0


def slugify(data: str) -> str:
    """What data is called in the name of a folder."""
    return data.rstrip("/").replace("/", "-").replace(":", "-").strip(".-") or "data"


def summary(
    net: str,
    num_classes: int,
    batch_norm: bool,
    image_size: int,
    batch_size: int | None,
    **step: Any,
) -> int:
    from vgg_jax.summary import table

    if batch_size is None and step["microbatch"] is not None:
        raise InputError(f"microbatch is {step['microbatch']}: expected --batch-size beside it")
    shape: dict[str, Any] = {
        "image_size": image_size,
        "scale": (image_size,),
        "batch_size": batch_size,
    }
    config = (
        None if batch_size is None else TrainConfig(net=net, batch_norm=batch_norm, **shape, **step)
    )
    print(table(CONFIGS[net], num_classes, batch_norm, image_size))
    if config is not None:
        from vgg_jax.training.memory_estimate import estimate_step_memory

        found = {
            name: f"{size / 1e9:.2f} GB"
            for name, size in estimate_step_memory(config, num_classes).items()
        }
        print(
            f"A training step of {batch_size} images takes {found['total']}: {found['state']} for parameters and momentum, the rest for"
        )
        print(
            "activations, gradients and XLA, on one device like this; what the process held before comes on top. Nothing was run."
        )
    return 0


def statistics(data: str, split: str, data_dir: str | None, download: bool, skip_bad: bool) -> int:
    from vgg_jax.data import measure_colours, open_split

    source = open_split(data, split, data_dir=data_dir, download=download, skip_bad=skip_bad)
    measured = measure_colours(source, skip_bad=skip_bad)
    print(f"{source.name}: {measured.count} images, RGB on the 0-255 scale")
    for label, values in (
        ("mean over all pixels", measured.pixel_mean),
        ("std over all pixels", measured.pixel_std),
        ("mean of the images' means", measured.image_mean),
        ("mean of the images' stds", measured.image_std),
    ):
        print(f"{label:<26}" + "".join(f"{value:>10.3f}" for value in values))
    return 0


def verify_data(data: str, data_dir: str | None, download: bool, out: str) -> int:
    from vgg_jax.data import verify_images, write_exclude_list

    found = []
    try:
        for split, count, bad in verify_images(data, data_dir=data_dir, download=download):
            print(f"{data} {split}: {len(bad)} of {count} images cannot be read", flush=True)
            for each in bad:
                print(f"  {each.file!r}: {each.reason}", flush=True)
            found += bad
    finally:
        if found:
            write_exclude_list(out, found)
    write_exclude_list(out, found)
    if found:
        print(f"{out}: their list; `vgg-jax train {data} --exclude {out}` leaves them out")
    return 3 if found else 0


def import_(file: str, out: str, net: str | None, check: str | None) -> int:
    from vgg_jax.weights import read, save

    weights = read(file, net)
    save(out, weights)
    mean = ", ".join(f"{value:.3f}" for value in weights.preprocessing.mean_rgb)
    print(f"{file}: {weights}; images are RGB, 0-255, less ({mean}); written to {out}")
    if check is None:
        return 0
    from vgg_jax.weights.compare_torch import TOLERANCE, compare_with_torch

    differences = compare_with_torch(weights)
    for layer, difference in differences.items():
        print(f"{layer:<10}{difference:>10.1e}")
    worst = max(differences, key=lambda layer: differences[layer])
    print(
        f"largest difference from PyTorch: {differences[worst]:.1e} of the largest value, in {worst}; bound {TOLERANCE:.0e}"
    )
    return 0 if differences[worst] < TOLERANCE else 1


def export(
    net: str,
    out: str,
    layout: str,
    output: str,
    uint8: bool,
    fold_batch_norm: bool,
    bfloat16: bool,
    arch: str | None,
) -> int:
    from vgg_jax.export import ExportSpec, write
    from vgg_jax.export import fold_batch_norm as folded
    from vgg_jax.weights import read

    weights = read(net, arch)
    write(
        out,
        ExportSpec(folded(weights) if fold_batch_norm else weights, output, uint8, bfloat16),
        layout,
    )
    print(f"{out}: written; `vgg-jax verify {out}` asks it again")
    return 0


def verify(file: str) -> int:
    from vgg_jax.export.verify import TOLERANCE, verify

    said, difference = verify(file)
    print(
        f"{file}: {said}; largest difference from the answer at export: {difference:.1e} of the largest value; bound {TOLERANCE:.0e}"
    )
    return 0 if difference < TOLERANCE else 1


def selfcheck() -> int:
    from vgg_jax import selfcheck

    found = selfcheck.run_checks()
    print(selfcheck.report(found))
    return 0 if all(each.passed for each in found) and not selfcheck.known_fault() else 1


def predict(
    net: str, images: list[str], top: int, as_json: bool, protocol: str, scales: list[int]
) -> int:
    configure_malloc()
    from vgg_jax.evaluation.predict import predict

    failed = False
    for file, best, error in predict(
        net, images, protocol=EvalProtocol(protocol), scales=scales, top=top
    ):
        failed = failed or error is not None
        if as_json:
            known = {
                "top": [{"class": name, "probability": probability} for name, probability in best]
            }
            print(
                json.dumps({"file": file} | (known if error is None else {"error": error})),
                flush=True,
            )
        elif error is not None:
            print(
                f"vgg-jax: {error}; expected a JPEG, PNG, WebP, BMP or GIF image", file=sys.stderr
            )
        else:
            print(
                f"{file}: " + "; ".join(f"{name} {probability:.1%}" for name, probability in best),
                flush=True,
            )
    return 3 if failed else 0


def evaluate(
    run: str,
    data: str | None,
    split: str,
    scales: list[int],
    protocol: str,
    flip: bool | None,
    softmax_first: bool,
    ceil: bool,
    out: str | None,
    **where: Any,
) -> int:
    configure_malloc()
    from vgg_jax.evaluation.evaluate import evaluate, format_errors, save_evaluation

    chosen = EvalProtocol(protocol, flip, softmax_first, ceil)
    beside = run if to_path(run).is_dir() else run + "-evaluated"
    new = to_path(out or beside)
    made = not new.is_dir() and (out is not None or to_path(run).is_file())
    if made:
        new.mkdir(parents=True)  # now rather than when all is computed
    try:
        evaluation, facts = evaluate(run, data, split, protocol=chosen, scales=scales, **where)
    except BaseException:
        if made:
            new.rmdir()
        raise
    flags = [
        name
        for name, on in (
            ("mirrored", facts["protocol"]["flip"]),
            ("softmax-first", softmax_first),
            ("ceil", ceil),
        )
        if on
    ]
    folder = out or os.path.join(
        beside,
        "-".join(
            [
                *([slugify(data)] if data else []),
                split,
                protocol,
                *map(str, facts["scales"]),
                *flags,
            ]
        ),
    )
    save_evaluation(folder, evaluation, facts)
    print(
        f"{', '.join([protocol, 'Q = ' + ', '.join(map(str, facts['scales'])), *flags])}: {format_errors(facts)}"
    )
    print(
        f"{facts['seconds']:.1f} s, {facts['images_per_second']:.1f} images/s; {folder}/evaluation.json, {folder}/posteriors.npz"
    )
    return 0


def fuse(posteriors: list[str], out: str | None) -> int:
    from vgg_jax.evaluation.evaluate import format_errors, fuse, save_evaluation

    fused = fuse(posteriors)
    facts = {"fused": posteriors} | fused.errors()
    if out is not None:
        save_evaluation(out, fused, facts)
    print(f"mean of {len(posteriors)} posteriors: {format_errors(facts)}")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "evaluate": evaluate,
    "fuse": fuse,
    "predict": predict,
    "import": import_,
    "export": export,
    "verify": verify,
    "summary": summary,
    "statistics": statistics,
    "verify-data": verify_data,
    "selfcheck": selfcheck,
}
