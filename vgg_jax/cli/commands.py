"""The commands of the command line. Each takes the parsed flags and returns an exit code."""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vgg_jax.cli.exit_codes import ExitCode
from vgg_jax.configs.evaluation import EvalProtocol
from vgg_jax.configs.models import CONFIGS
from vgg_jax.configs.presets import preset
from vgg_jax.configs.train import TrainConfig
from vgg_jax.errors import InputError
from vgg_jax.image_files import FORMATS
from vgg_jax.paths import is_npz, is_remote, require_local, to_path
from vgg_jax.runtime.memory import configure_malloc
from vgg_jax.runtime.signals import interrupt_on_sigterm

# Each command imports the rest of the package itself, so that `vgg-jax --help` needs no jax.


def train(
    data: str,
    workdir: str | None,
    data_dir: str | None,
    download: bool,
    command_line: str,
    **flags: Any,
) -> ExitCode:
    """Trains a net. Flags that were not passed are absent from `flags`: the preset decides."""
    loop_options = _pop(
        flags, "save_seconds", "keep", "on_nan", "debug_nans", "tensorboard", "profile"
    )
    mesh_options = flags.pop("mesh", {}) | _pop(flags, "fsdp", "reduce")
    distributed = flags.pop("distributed", "auto")
    _read_exclude(flags)
    if is_npz(data):
        net, settings = flags.get("net", TrainConfig.net), flags
    else:
        config = preset(data, **flags)
        net, settings = config.net, {}
    from vgg_jax.distributed import multihost
    from vgg_jax.distributed.sharding import MeshConfig
    from vgg_jax.training.report import divergence_hint

    mesh_config = MeshConfig(**mesh_options)
    if message := multihost.initialize(distributed):
        if not multihost.is_main_process():
            # Replaces the file descriptor of stdout, since C++ prints to it as well.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        print(message, flush=True)
    from vgg_jax.runs.checkpoint import CheckpointSaveError
    from vgg_jax.training.loop import fit
    from vgg_jax.training.trainer import DivergedError

    workdir = workdir or default_workdir(data, net)
    try:
        with multihost.shutdown_on_exit():
            result = fit(
                data if is_npz(data) else config,
                workdir,
                data_dir,
                download,
                mesh_config=mesh_config,
                command=command_line,
                **loop_options,
                **settings,
            )
            if not result.stopped and multihost.is_main_process():
                print(_next_commands(workdir, data_dir), flush=True)
    except multihost.ProcessLostError as error:
        print(f"vgg-jax: {error}", file=sys.stderr)
        return ExitCode.PROCESS_LOST
    except DivergedError as error:
        if multihost.is_main_process():
            print(f"vgg-jax: {error}: {divergence_hint(error.rate)}", file=sys.stderr)
        return ExitCode.DIVERGED
    except CheckpointSaveError as error:
        if multihost.is_main_process():
            remedy = "make room, and run the same command to resume from the last save"
            print(f"vgg-jax: {error}; {remedy}", file=sys.stderr)
        return ExitCode.NOT_SAVED
    return ExitCode.STOPPED if result.stopped else ExitCode.DONE


def _read_exclude(flags: dict[str, Any]) -> None:
    """Replaces the name of a list of images to exclude, if it was passed, by its content."""
    if "exclude" in flags:
        from vgg_jax.data import read_exclude_list

        flags["exclude"] = read_exclude_list(flags["exclude"])


def preview(
    data: str,
    data_dir: str | None,
    download: bool,
    out: str,
    overwrite: bool,
    images: int,
    epochs: int,
    **flags: Any,
) -> ExitCode:
    """Draws the crops that training gets. Flags that were not passed are absent from `flags`."""
    from vgg_jax.reporting import contact_sheet
    from vgg_jax.reporting.crops import describe, open_preview
    from vgg_jax.reporting.output import check_out, require_matplotlib, write_out

    require_matplotlib()
    path = check_out(out, contact_sheet.ENDINGS, overwrite)
    _read_exclude(flags)
    opened = open_preview(data, images, epochs, data_dir=data_dir, download=download, **flags)
    write_out(path, contact_sheet.sheet_bytes(contact_sheet.draw(opened), path.suffix))
    shown, settings = describe(opened)
    count = len(opened.crops.labels)
    fewer = f" ({images} were asked for)" if count < images else ""
    print(f"wrote {out}: {shown}{fewer}; {settings}")
    return ExitCode.DONE


def _next_commands(workdir: str, data_dir: str | None) -> str:
    """Lists commands that use a finished run, and need no other packages than training does."""
    run = shlex.quote(workdir)
    flags = "" if data_dir is None else f" --data-dir {shlex.quote(data_dir)}"
    return (
        f"evaluate it: vgg-jax evaluate {run}{flags}\n"
        f"use it:      vgg-jax predict {run} PHOTO.jpg\n"
        f"export it:   vgg-jax export {run} net.savedmodel"
    )


def _pop(flags: dict[str, Any], *names: str) -> dict[str, Any]:
    """Removes the flags of these names, if present, and returns them."""
    return {name: flags.pop(name) for name in names if name in flags}


def default_workdir(data: str, net: str) -> str:
    """Names the folder of a run after its data and its net.

    Args:
        data: The name of a data set, or the path of a folder or a file.
        net: Column of Table 1.

    Returns:
        "runs/NAME-NET". NAME is the last part of the path of a folder, and the last two of a file.
        A run that an earlier version named after the whole path keeps its folder.
    """
    name, path = data, os.path.abspath(os.path.expanduser(data))
    if is_remote(data):
        name = os.path.basename(data.rstrip("/"))
    elif os.path.isdir(path):
        name = os.path.basename(path)
    elif os.path.isfile(path):
        stem = os.path.splitext(path)[0]
        name = "/".join(stem.split(os.sep)[-2:])
    earlier, folder = f"runs/{slugify(data)}-{net}", f"runs/{slugify(name)}-{net}"
    is_earlier = os.path.exists(f"{earlier}/run.json") and not os.path.exists(f"{folder}/run.json")
    return earlier if is_earlier else folder


def slugify(data: str) -> str:
    """Turns a data set's name or path into the name of a folder."""
    return data.rstrip("/").replace("/", "-").replace(":", "-").strip(".-") or "data"


def summary(
    net: str,
    num_classes: int | None,
    batch_norm: bool,
    image_size: int | None,
    fc: list[int] | None,
    batch_size: int | None,
    microbatch: int | None,
    dtype: str,
    freeze: list[str] | None,
    optimizer: str | None,
) -> ExitCode:
    """Prints a net's layers and cost, and the memory of a training step if asked to."""
    from vgg_jax.summary import table

    shape: dict[str, Any] = {"num_classes": num_classes, "batch_norm": batch_norm or None}
    shape |= {"image_size": image_size, "fc": fc and tuple(fc)}
    shape = {name: value for name, value in shape.items() if value is not None}
    top = True
    if net in CONFIGS:
        shape = {"net": net} | shape
    elif shape:
        flags = ", ".join("--" + name.replace("_", "-") for name in shape)
        raise InputError(
            f"{flags}: expected with one of {', '.join(CONFIGS)}; {net} is a run or a weight file, "
            "and has a shape of its own"
        )
    else:
        shape, top = _saved_shape(net)
    num_classes, in_channels = shape.pop("num_classes", 1000), shape.pop("in_channels", 3)
    config = TrainConfig(
        **shape,
        scale=(shape.get("image_size", 224),),
        dtype=dtype,
        freeze=tuple(freeze or ()),
        optimizer=optimizer or "sgd",
    )
    if batch_size is not None:
        config = dataclasses.replace(config, batch_size=batch_size, microbatch=microbatch)
    elif microbatch is not None:
        raise InputError(f"microbatch is {microbatch}: expected --batch-size with it")
    elif freeze or optimizer:
        flag = f"freeze is {' '.join(freeze)}" if freeze else f"optimizer is {optimizer}"
        raise InputError(
            f"{flag}: expected --batch-size with it, because it changes the memory of a training "
            "step only"
        )
    if batch_size is not None and in_channels != 3:
        raise InputError(
            f"the net's in_channels is {in_channels}: expected no --batch-size with it, because "
            "vgg-jax trains on RGB images"
        )
    print(table(config.vgg, num_classes, config.batch_norm, config.image_size, top, in_channels))
    if batch_size is not None:
        from vgg_jax.training.memory_estimate import estimate_step_memory, free_device_memory

        free = free_device_memory()
        free_text = f" {free / 1e9:.2f} GB are free here." if math.isfinite(free) else ""
        memory = estimate_step_memory(config, num_classes)
        total, state = memory["total"] / 1e9, memory["state"] / 1e9
        kept = "the moments of AdamW" if config.optimizer == "adamw" else "momentum"
        print(
            f"A training step of {batch_size} images takes {total:.2f} GB: "
            f"{state:.2f} GB for parameters and {kept}, the rest for\n"
            "activations, gradients and XLA, on one device like this; "
            "memory that the process already holds is not included. "
            f"The step was compiled, not run.{free_text}"
        )
    return ExitCode.DONE


def _saved_shape(path: str) -> tuple[dict[str, Any], bool]:
    """Returns the fields of TrainConfig that shape a saved net, and whether it has FC layers."""
    from vgg_jax.weights.fetch import resolve

    folder = to_path(resolve(path)[0])
    if not folder.exists():
        raise InputError(
            f"net is {path!r}: expected one of {', '.join(CONFIGS)}, the workdir of a run, a "
            "weight file, or a name that `vgg-jax weights` lists"
        )
    if folder.is_dir():
        from vgg_jax.runs.metadata import load_run

        run = load_run(folder)
        names = ("net", "batch_norm", "image_size", "fc")
        shape = {name: getattr(run.config, name) for name in names}
        return shape | {"num_classes": len(run.classes)}, True
    from vgg_jax.weights import read

    weights = read(path)
    model = weights.model
    shape = {"net": weights.net, "batch_norm": model.batch_norm, "image_size": model.image_size}
    shape |= {"fc": model.config.fc, "num_classes": model.num_classes}
    return shape | {"in_channels": model.in_channels}, weights.top


def config(run: str) -> ExitCode:
    """Prints a run's configuration and the command that started it."""
    from vgg_jax.runs.metadata import describe_run, load_run

    print(describe_run(load_run(to_path(run))))
    return ExitCode.DONE


def statistics(
    data: str, split: str, data_dir: str | None, download: bool, skip_bad: bool
) -> ExitCode:
    """Prints the mean and standard deviation of a data set's colours."""
    from vgg_jax.input_data import measure_colours, open_split

    source = open_split(data, split, data_dir=data_dir, download=download, skip_bad=skip_bad)
    colours = measure_colours(source, skip_bad=skip_bad)
    if source.skipped:
        print(f"skipped {len(source.skipped)} files, for example {source.skipped[0]!r}")
    print(f"{source.name}: {colours.count} images, RGB on the 0-255 scale")
    for label, values in (
        ("mean over all pixels", colours.pixel_mean),
        ("std over all pixels", colours.pixel_std),
        ("mean of the images' means", colours.image_mean),
        ("mean of the images' stds", colours.image_std),
    ):
        print(f"{label:<26}" + "".join(f"{value:>10.3f}" for value in values))
    return ExitCode.DONE


def verify_data(data: str, data_dir: str | None, download: bool, out: str) -> ExitCode:
    """Reads every image once, and writes a list of the unreadable ones."""
    if is_npz(data):
        raise InputError(
            f"{data!r} is an .npz file, which is read as a whole: expected an image folder, a list "
            "of files or a name of TensorFlow Datasets"
        )
    from vgg_jax.data import check_exclude_list_path, verify_images, write_exclude_list

    check_exclude_list_path(out)
    all_bad = []
    try:
        with interrupt_on_sigterm():
            for split, count, bad in verify_images(data, data_dir=data_dir, download=download):
                print(f"{data} {split}: {len(bad)} of {count} images cannot be read", flush=True)
                for image in bad:
                    print(f"  {image.file!r}: {image.reason}", flush=True)
                all_bad += bad
    except BaseException:
        # An interrupted pass leaves what it found. It does not replace a list by an empty one.
        if all_bad:
            write_exclude_list(out, all_bad)
        raise
    write_exclude_list(out, all_bad)
    if not all_bad:
        return ExitCode.DONE
    print(f"wrote the list to {out}; exclude them with `vgg-jax train {data} --exclude {out}`")
    return ExitCode.BAD_IMAGE


def import_(
    file: str, out: str, net: str | None, check: str | None, overwrite: bool, **source: Any
) -> ExitCode:
    """Converts another library's weights, and compares them with PyTorch if asked to."""
    options = source_options(source)
    from vgg_jax.runs.files import check_free

    check_free(require_local(out, is_output=True), overwrite)
    from vgg_jax.weights import read, save
    from vgg_jax.weights.weights import channels_name

    weights = read(file, net, **options)
    save(out, weights)
    mean = ", ".join(f"{value:.3f}" for value in weights.preprocessing.mean_rgb)
    channels = channels_name(weights.model.in_channels)
    print(f"wrote {out}; its images are {channels}, 0-255, minus ({mean})")
    if check is None:
        return ExitCode.DONE
    from vgg_jax.weights.compare_torch import TOLERANCE, compare_with_torch

    differences = compare_with_torch(weights)
    for layer, difference in differences.items():
        print(f"{layer:<10}{difference:>10.1e}")
    worst = max(differences, key=lambda layer: differences[layer])
    print(
        f"largest difference from PyTorch: {differences[worst]:.1e} of the largest value, "
        f"in {worst}; bound {TOLERANCE:.0e}"
    )
    return ExitCode.DONE if differences[worst] < TOLERANCE else ExitCode.CHECK_FAILED


def export(
    path: str,
    out: str,
    layout: str,
    output: str,
    uint8: bool,
    fold_batch_norm: bool,
    bfloat16: bool,
    onnx_float16: bool,
    overwrite: bool,
    net: str | None,
    **source: Any,
) -> ExitCode:
    """Writes a net as a file for another program."""
    options = source_options(source)
    from vgg_jax.export import ExportSpec, write
    from vgg_jax.export import fold_batch_norm as fold
    from vgg_jax.weights import read

    weights = read(path, net, **options)
    if fold_batch_norm:
        weights = fold(weights)
    write(out, ExportSpec(weights, output, uint8, bfloat16, onnx_float16), layout, overwrite)
    print(f"wrote {out}; check it with `vgg-jax verify {out}`")
    return ExitCode.DONE


def source_options(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the flags that describe another library's file to arguments of `vgg_jax.load`.

    Args:
        flags: "preprocessing", "mean", "std", "range", "channels", "image_size" and "classes", or
            None.

    Returns:
        "preprocessing", "image_size" and "classes".

    Raises:
        InputError: Flags exclude each other, or the file with the classes cannot be read.
    """
    names = ("mean", "std", "range", "channels")
    fields = {name: flags[name] for name in names if flags[name] is not None}
    if flags["preprocessing"] is not None and fields:
        raise InputError(
            f"--preprocessing {flags['preprocessing']} with "
            f"{', '.join('--' + name for name in fields)}: expected a name or a description; leave "
            "one of them out"
        )
    classes = None if flags["classes"] is None else _read_classes(flags["classes"])
    preprocessing = fields or flags["preprocessing"]
    return {
        "preprocessing": preprocessing,
        "image_size": flags["image_size"],
        "classes": classes,
    }


def _read_classes(path: str) -> tuple[str, ...]:
    """Reads one name per line. Blank lines at the end do not count."""
    try:
        text = to_path(path).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read as a list of classes ({error}): "
            "expected a text file in UTF-8 with one name per line"
        ) from error
    lines = text.rstrip().split("\n")
    return () if lines == [""] else tuple(line.strip() for line in lines)


def verify(file: str) -> ExitCode:
    """Runs an exported file, and compares its output with the one stored at export."""
    from vgg_jax.export.verify import verify as verify_file

    summary, difference, tolerance, distance = verify_file(file)
    print(
        f"{file}: {summary}; largest difference from the answer at export: "
        f"{difference:.1e} of the largest value; bound {tolerance:.0e}"
    )
    if distance is not None:
        print(f"its weights are rounded: difference from the float32 net: {distance:.1e}")
    return ExitCode.DONE if difference < tolerance else ExitCode.CHECK_FAILED


def selfcheck() -> ExitCode:
    """Compares a tiny net on the local devices with NumPy."""
    from vgg_jax.selfcheck import describe_bfloat16, known_fault, report, run_checks

    results = run_checks()
    print(report(results))
    if way := describe_bfloat16():
        print(way)
    is_right = all(result.ok for result in results) and not known_fault()
    return ExitCode.DONE if is_right else ExitCode.CHECK_FAILED


def predict(
    path: str,
    images: list[str],
    top: int,
    as_json: bool,
    protocol: str,
    scales: list[int],
    **source: Any,
) -> ExitCode:
    """Prints the most probable classes of images. An unreadable image gets an error instead."""
    configure_malloc()
    options = source_options(source)
    from vgg_jax.evaluation.predict import predict as iter_predictions

    code = ExitCode.DONE
    for file, best, error in iter_predictions(
        path, images, protocol=EvalProtocol(protocol), scales=scales, top=top, **options
    ):
        if error is not None:
            code = ExitCode.BAD_IMAGE
        if as_json and error is not None:
            print(json.dumps({"file": file, "error": error}), flush=True)
        elif as_json:
            top_classes = [{"class": name, "probability": value} for name, value in best]
            print(json.dumps({"file": file, "top": top_classes}), flush=True)
        elif error is not None:
            print(f"vgg-jax: {error}; expected {FORMATS}", file=sys.stderr)
        else:
            text = "; ".join(f"{name} {probability:.1%}" for name, probability in best)
            print(f"{file}: {text}", flush=True)
    return code


def evaluate(
    path: str,
    data: str | None,
    split: str,
    scales: list[int],
    protocol: str,
    flip: bool | None,
    softmax_first: bool,
    ceil: bool,
    out: str | None,
    data_dir: str | None,
    download: bool,
    skip_bad: bool,
    pixels: int,
    match: str,
    **source: Any,
) -> ExitCode:
    """Evaluates a net on a split, prints the errors, and writes them with the posteriors."""
    configure_malloc()
    options = source_options(source)
    from vgg_jax.evaluation.dense import resolve_protocol
    from vgg_jax.evaluation.evaluate import evaluate as evaluate_net
    from vgg_jax.evaluation.evaluate import format_errors
    from vgg_jax.weights import load

    model, variables, metadata = load(path, **options)
    settings = EvalProtocol(protocol, flip, softmax_first, ceil)
    settings, test_scales = resolve_protocol(settings, scales, model, metadata, path)
    flags = {"mirrored": settings.use_flip, "softmax-first": softmax_first, "ceil": ceil}
    flag_names = [name for name, is_on in flags.items() if is_on]
    scale_names = [str(scale) for scale in test_scales]
    data_names = [slugify(data)] if data else []
    name = "-".join([*data_names, split, protocol, *scale_names, *flag_names])
    parent = path
    if not to_path(path).is_dir():
        # The file of a name lies in a cache. So its results go to the current folder.
        parent = (path if to_path(path).exists() else slugify(path)) + "-evaluated"
    folder, target = out or os.path.join(parent, name), to_path(out or parent)
    is_new = not target.is_dir()
    with _new_folder(target) if is_new else contextlib.nullcontext():
        results = evaluate_net(
            model,
            variables,
            metadata,
            data,
            split,
            protocol=settings,
            scales=test_scales,
            out=folder,
            data_dir=data_dir,
            download=download,
            skip_bad=skip_bad,
            pixels=pixels,
            match=match,
        )
    heading = ", ".join([protocol, f"Q = {', '.join(scale_names)}", *flag_names])
    print(f"{heading}: {format_errors(results, model.num_classes)}")
    print(
        f"{results['seconds']:.1f} s, {results['images_per_second']:.1f} images/s; "
        f"{folder}/evaluation.json, {folder}/posteriors.npz"
    )
    return ExitCode.DONE


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[None]:
    """Creates a folder before the work begins, and removes it if the work leaves it empty.

    A folder that cannot be created is then reported at once, not after hours.
    """
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"cannot create {path} ({error.strerror}): expected the name of a new folder; pass "
            "another --out"
        ) from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # a full disk may leave the first of the files
            path.rmdir()
        raise


def weights(as_json: bool) -> ExitCode:
    """Lists the published weights that can be loaded by name."""
    from vgg_jax.weights.pretrained import as_rows, format_table

    print("\n".join(map(json.dumps, as_rows())) if as_json else format_table())
    return ExitCode.DONE


def fetch(names: list[str]) -> ExitCode:
    """Downloads published weights, unless a cache has them."""
    from vgg_jax.weights.fetch import fetch as fetch_file
    from vgg_jax.weights.pretrained import lookup

    for entry in [lookup(name) for name in names]:
        fetch_file(entry)
    return ExitCode.DONE


def fuse(posteriors: list[str], out: str | None) -> ExitCode:
    """Averages the posteriors of several evaluations (§4.4)."""
    from vgg_jax.evaluation.evaluate import find_posteriors, format_errors, save_evaluation
    from vgg_jax.evaluation.evaluate import fuse as fuse_files

    posteriors = [find_posteriors(path) for path in posteriors]
    evaluation = fuse_files(posteriors)
    results = {"fused": posteriors} | evaluation.errors()
    if out is not None:
        save_evaluation(out, evaluation, results)
    errors = format_errors(results, evaluation.posteriors.shape[1])
    print(f"mean of {len(posteriors)} posteriors: {errors}")
    return ExitCode.DONE


def report(
    runs: list[str],
    out: str,
    overwrite: bool,
    figures: str | None,
    data: str | None,
    data_dir: str | None,
) -> ExitCode:
    """Writes an HTML page about one run or several. What is missing gets a sentence."""
    configure_malloc()
    from vgg_jax.reporting.html import report as write_report

    out = os.path.expanduser(out)
    result = write_report(
        runs, out, figures=figures, data=data, data_dir=data_dir, overwrite=overwrite
    )
    for note in result.notes:
        print(f"vgg-jax: {note}", file=sys.stderr)
    size = os.path.getsize(out) / 1e6
    print(f"wrote {out} ({size:.1f} MB){f' and {figures}' if result.has_figures else ''}")
    return ExitCode.DONE if figures is None or result.has_figures else ExitCode.BAD_INPUT


def explain(
    path: str,
    photo: str,
    out: str | None,
    class_name: str | None,
    scale: int | None,
    layer: str | None,
    overwrite: bool,
    **source: Any,
) -> ExitCode:
    """Writes where a net looks in a photo, as a PNG and as arrays."""
    configure_malloc()
    options = source_options(source)
    from vgg_jax.reporting.explain_photo import explain_photo

    stem = os.path.splitext(os.path.basename(photo))[0]
    out = out or f"{stem}-explained.png"
    name, posterior, files = explain_photo(
        path,
        photo,
        out,
        class_name=class_name,
        scale=scale,
        layer=layer,
        overwrite=overwrite,
        **options,
    )
    print(f"{photo}: {name} {posterior:.1%}; wrote {' and '.join(files)}")
    return ExitCode.DONE


COMMANDS: dict[str, Callable[..., ExitCode]] = {
    "train": train,
    "preview": preview,
    "evaluate": evaluate,
    "fuse": fuse,
    "predict": predict,
    "import": import_,
    "export": export,
    "weights": weights,
    "fetch": fetch,
    "verify": verify,
    "summary": summary,
    "report": report,
    "explain": explain,
    "config": config,
    "statistics": statistics,
    "verify-data": verify_data,
    "selfcheck": selfcheck,
}
