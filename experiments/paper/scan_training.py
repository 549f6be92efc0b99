"""Training on images in memory, with all steps of an epoch in one program.

`vgg_jax.fit` dispatches each step from Python, which a GPU waits for if the net is small. Here the
images lie on the device, and `lax.scan` runs the steps: each one gathers, crops and trains. The
steps are those of `fit` on the same arrays: the same order, crops, dropout and learning rates.
TensorFlow is not used.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.paper.training_state import load_state, save_state
from vgg_jax.array_batches import crop_function, epoch_order, measure_colours, resample
from vgg_jax.arrays import Arrays, ArraySource, read_npz, train_val_sources, whole_source
from vgg_jax.configs.colours import ColourStatistics
from vgg_jax.configs.models import VGGConfig
from vgg_jax.configs.train import TrainConfig
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.errors import InputError
from vgg_jax.evaluation.dense import crop_offsets
from vgg_jax.metrics import MetricSums
from vgg_jax.model import VGG, build_model
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.runtime.compiler import compiler_options
from vgg_jax.training.optimizer import make_optimizer, next_epoch_lr, set_learning_rate
from vgg_jax.training.step import TrainState, eval_step, init_state, train_step

EVAL_BATCH = 250


class Data(NamedTuple):
    """The images of an experiment, and their colours."""

    train: ArraySource
    validation: ArraySource  # held out from the training images, for the curves
    test: ArraySource
    colours: ColourStatistics  # of the training images


def load_data(path: str | Path, num_train: int | None = None, num_test: int | None = None) -> Data:
    """Reads an .npz file with training and test images.

    Args:
        path: The file, as `experiments.paper.cifar10_arrays` writes it.
        num_train: Number of training images to use, before a tenth is held out. None: all.
        num_test: Number of test images to use. None: all.

    Returns:
        The images. The same numbers give the same images.

    Raises:
        InputError: The file cannot be read, lacks a split, or has fewer images.
    """
    splits = read_npz(path, ("train", "test"))
    missing = [kind for kind in ("train", "test") if kind not in splits]
    if missing:
        raise InputError(f"{path} has no images for {missing[0]}: expected train and test images")
    for kind, number in (("train", num_train), ("test", num_test)):
        splits[kind] = take_first(splits[kind], number, kind, path)
    train, validation = train_val_sources(splits["train"], None, Path(path).stem)
    return Data(
        train, validation, whole_source(splits["test"], "test"), measure_colours(train).statistics
    )


def take_first(arrays: Arrays, number: int | None, kind: str, name: str | Path) -> Arrays:
    """The first images of a split, or all of them for None."""
    if number is not None and not 0 < number <= len(arrays.labels):
        raise InputError(
            f"{number} {kind} images are asked for: expected 1 to {len(arrays.labels)}, "
            f"the number in {name}"
        )
    return arrays._replace(images=arrays.images[:number], labels=arrays.labels[:number])


def divide_widths(config: VGGConfig, divisor: int) -> VGGConfig:
    """A column of Table 1 with all widths divided: of the convolutions, fc6 and fc7."""
    stages = tuple(
        tuple(conv._replace(features=conv.features // divisor) for conv in stage)
        for stage in config.stages
    )
    return dataclasses.replace(
        config, stages=stages, fc=tuple(width // divisor for width in config.fc)
    )


def build_small_model(config: TrainConfig, divisor: int, num_classes: int) -> VGG:
    """The net of a run, with all widths divided."""
    model = build_model(config, num_classes)
    return model.clone(config=divide_widths(config.vgg, divisor))


def keep_gains(model: VGG, full: VGG, variables: dict[str, Any]) -> dict[str, Any]:
    """Scales the kernels of the initialiser "paper" to the fewer inputs of a small net.

    A layer multiplies the size of its signal by the root of its number of inputs, times the
    deviation of its kernel. This product becomes that of the full net in each layer.

    Args:
        model: The small net.
        full: The full net, with the same layers.
        variables: Initial variables of the small net.

    Returns:
        The variables with other kernels.
    """
    shapes = jax.eval_shape(full.lazy_init, jax.random.key(0), full.one_image())["params"]
    params = {}
    for name, layer in variables["params"].items():
        if "kernel" in layer:
            inputs, full_inputs = (
                math.prod(each["kernel"].shape[:-1]) for each in (layer, shapes[name])
            )
            layer = layer | {"kernel": layer["kernel"] * (full_inputs / inputs) ** 0.5}
        params[name] = layer
    return variables | {"params": params}


def padded_order(source: ArraySource, config: TrainConfig, epoch: int) -> np.ndarray:
    """Positions of the images of each step of an epoch, int32 (steps, batch), padded with -1."""
    order = source.indices[epoch_order(source.size, config.seed, epoch)].astype(np.int32)
    steps = -(-source.size // config.batch_size)
    padding = steps * config.batch_size - source.size
    return np.pad(order, (0, padding), constant_values=-1).reshape(steps, config.batch_size)


def in_batches(positions: np.ndarray) -> np.ndarray:
    """Positions of images to evaluate, int32 (steps, `EVAL_BATCH`), padded with -1."""
    padding = -len(positions) % EVAL_BATCH
    padded = np.pad(positions.astype(np.int32), (0, padding), constant_values=-1)
    return padded.reshape(-1, EVAL_BATCH)


def gather(pixels: Array, labels: Array, indices: Array) -> dict[str, Array]:
    """The examples at some positions, as `crop_function` takes them. -1 is padding, and black."""
    mask = indices >= 0
    rows = jnp.maximum(indices, 0)
    return {
        "pixels": jnp.where(mask[:, None, None, None], pixels[rows], jnp.uint8(0)),
        "label": jnp.where(mask, labels[rows], 0),
        "mask": mask,
        "position": indices,
    }


class Programs(NamedTuple):
    """The programs of a run."""

    start: Callable[[], TrainState]
    run_epoch: Callable[..., tuple[TrainState, MetricSums]]
    validate: Callable[..., tuple[None, MetricSums]]


def make_programs(
    config: TrainConfig,
    model: VGG,
    data: Data,
    std_rgb: tuple[float, float, float] | None = None,
) -> Programs:
    """Makes the programs of a run. Nothing is compiled yet.

    Args:
        config: Settings of the run, with a learning rate.
        model: The net.
        data: The images.
        std_rgb: Deviation of each channel on the 0-255 scale, by which the crops are divided once
            the mean is subtracted. None: they are not divided, as in the paper.

    Returns:
        `start()`, `run_epoch(state, order, pixels, labels, epoch)` and
        `validate(None, order, variables, pixels, labels)`, where the order is that of
        `padded_order`. Both return the sums of each step.
    """
    mesh = make_mesh(config.batch_size, jax.local_devices()[:1])
    optimizer = make_optimizer(config, -(-data.train.size // config.batch_size))
    crop, mean_rgb = crop_function(config, data.colours), data.colours.mean_rgb
    if std_rgb is not None:
        crop, mean_rgb = partial(_normalised, crop, mean_rgb, std_rgb), (0.0, 0.0, 0.0)
    options: dict[str, Any] = {"model": model, "mean_rgb": mean_rgb, "mesh": mesh}

    def train_on(
        state: TrainState, indices: Array, pixels: Array, labels: Array, epoch: Array
    ) -> tuple[TrainState, MetricSums]:
        examples = gather(pixels, labels, indices)
        # The seed comes with the state, so one compiled program trains with all seeds.
        batch = crop(examples | {"epoch": jnp.full(len(indices), epoch), "key": state.key})
        return train_step(
            state, batch, optimizer=optimizer, label_smoothing=config.label_smoothing, **options
        )

    def evaluate_on(
        _: None, indices: Array, variables: dict[str, Any], pixels: Array, labels: Array
    ) -> tuple[None, MetricSums]:
        return None, eval_step(variables, crop(gather(pixels, labels, indices)), **options)

    return Programs(
        partial(init_state, model, optimizer, config.seed, mesh),
        jit_scan(train_on, model.dtype),
        jit_scan(evaluate_on, model.dtype),
    )


def jit_scan(step: Callable[..., tuple[Any, Any]], dtype: Any = jnp.float32) -> Callable[..., Any]:
    """Makes one program that runs a step for each element.

    Args:
        step: Maps (carry, element, *constants) to the next carry and an output.
        dtype: Type of the computation.

    Returns:
        Maps (carry, elements, *constants) to the last carry and the outputs, stacked. The memory
        of the carry is reused.
    """

    @partial(jax.jit, donate_argnums=0, compiler_options=compiler_options(dtype=dtype))
    def scan(carry: Any, elements: Any, *constants: Any) -> tuple[Any, Any]:
        return jax.lax.scan(lambda carry, x: step(carry, x, *constants), carry, elements)

    return scan


def _normalised(
    crop: Callable[[dict[str, Array]], dict[str, Array]],
    mean_rgb: tuple[float, ...],
    std_rgb: tuple[float, ...],
    examples: dict[str, Array],
) -> dict[str, Array]:
    """Crops, minus the mean and divided by the deviation."""
    batch = crop(examples)
    std = jnp.array(std_rgb, jnp.float32)[None, None, None]
    return batch | {"image": subtract_mean(batch["image"], mean_rgb) / std}


class Result(NamedTuple):
    """A trained net.

    Attributes:
        variables: "params" and "batch_stats".
        epochs: The "loss" and "accuracy" of each epoch, of training ("train") and on the held-out
            images ("validation").
        losses: The loss of each step.
        diverged: True if a loss is not finite. The run ended with its epoch.
    """

    variables: dict[str, Any]
    epochs: list[dict[str, Any]]
    losses: list[float]

    @property
    def diverged(self) -> bool:
        return not np.isfinite(self.losses).all()


def train(
    config: TrainConfig,
    model: VGG,
    data: Data,
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda variables: variables,
    log: Callable[[str], None] = lambda line: None,
    std_rgb: tuple[float, float, float] | None = None,
    on_epoch: Callable[[dict[str, Any]], None] = lambda epoch: None,
    checkpoint: Path | None = None,
) -> Result:
    """Trains a net.

    Args:
        config: Settings of the run, with a learning rate.
        model: The net.
        data: The images.
        change: Maps the initial variables to those that training starts from.
        log: Receives a line for each epoch.
        std_rgb: As for `make_programs`.
        on_epoch: Receives the entry of `Result.epochs` for each epoch, when it ends.
        checkpoint: A file to which the state is written after each epoch. If it exists, training
            goes on from it, and the result is that of an uninterrupted run. None: nothing is kept.

    Returns:
        The state after the last epoch, and the curves.

    Raises:
        InputError: The checkpoint cannot be read.
    """
    programs = make_programs(config, model, data, std_rgb)
    state = programs.start()
    variables = change({"params": state.params, "batch_stats": state.batch_stats})
    state = dataclasses.replace(state, **variables)
    pixels, labels = jnp.asarray(data.train.images), jnp.asarray(data.train.all_labels)
    held_out = in_batches(data.validation.indices)
    epochs: list[dict[str, Any]] = []
    losses: list[float] = []
    if checkpoint is not None and checkpoint.exists():
        state, epochs, losses = load_state(checkpoint, state)
        log(f"goes on after epoch {len(epochs)}")
    accuracies = [epoch["validation"]["accuracy"] for epoch in epochs]
    while (rate := next_epoch_lr(config, accuracies)) is not None:
        state = dataclasses.replace(state, opt_state=set_learning_rate(state.opt_state, rate))
        order = padded_order(data.train, config, len(epochs))
        state, sums = programs.run_epoch(state, order, pixels, labels, jnp.int32(len(epochs)))
        sums = jax.device_get(sums)
        losses += (sums.loss / sums.count).tolist()
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        _, validation = programs.validate(None, held_out, variables, pixels, labels)
        epochs.append(
            {
                "train": _means(jax.tree.map(np.sum, sums)),
                "validation": _means(jax.tree.map(np.sum, jax.device_get(validation))),
            }
        )
        accuracies.append(epochs[-1]["validation"]["accuracy"])
        log(_format(len(epochs), epochs[-1]))
        on_epoch(epochs[-1])
        if not np.isfinite(losses).all():
            break
        if checkpoint is not None:
            save_state(checkpoint, state, epochs, losses)
    return Result({"params": state.params, "batch_stats": state.batch_stats}, epochs, losses)


def _means(sums: MetricSums) -> dict[str, float]:
    return {
        "loss": float(sums.loss / sums.count),
        "accuracy": float(sums.top1 / sums.count),
    }


def _format(number: int, epoch: dict[str, Any]) -> str:
    parts = (f"{name} {means['loss']:.3f} {means['accuracy']:.1%}" for name, means in epoch.items())
    return f"epoch {number}: " + ", ".join(parts)


def posteriors(
    model: VGG, variables: dict[str, Any], data: Data, protocol: str, scale: int
) -> np.ndarray:
    """Evaluates the square test images at one test scale (§3.2), in one program.

    `vgg_jax.evaluate` gives the same, an image at a time.

    Args:
        model: The net.
        variables: Its variables.
        data: The images.
        protocol: "dense" or "multi-crop". Dense evaluation sees the centre of the image, with
            sides that the stride divides. Of a small image, each window is a large part, so rounded
            maps would lose its right and lower edge, or have windows of a strip of it.
        scale: The test scale Q.

    Returns:
        Posteriors (N, K), the mean with those of the mirror images.
    """
    pixels = data.test.images[data.test.indices]
    mean_rgb, size = data.colours.mean_rgb, model.image_size
    stride = 2 ** len(model.config.stages)
    centre = slice(scale % stride // 2, scale % stride // 2 + scale // stride * stride)
    offsets = crop_offsets(scale, size, 5)

    def logits(variables: dict[str, Any], images: Array) -> Array:
        """Logits (windows, N, K), or the means of score maps (1, N, K)."""
        scores: Any
        if protocol not in ("dense", "multi-crop"):
            raise ValueError(f"protocol is {protocol!r}: expected 'dense' or 'multi-crop'")
        if protocol == "dense":
            scores = model.apply(variables, images, method="score_map")
            return scores.mean((1, 2))[None]
        crops = [images[:, y : y + size, x : x + size] for y in offsets for x in offsets]
        scores = model.apply(variables, jnp.concatenate(crops))
        return scores.reshape(len(crops), len(images), -1)

    def batch_posteriors(_: None, pixels: Array, variables: dict[str, Any]) -> tuple[None, Array]:
        zoom = jnp.full(2, scale / pixels.shape[1])
        resize = partial(resample, sides=(scale, scale), zoom=zoom, translation=jnp.zeros(2))
        images = subtract_mean(jax.vmap(resize)(pixels), mean_rgb)
        if protocol == "dense":
            images = images[:, centre, centre]
        both = jnp.concatenate([logits(variables, x) for x in (images, images[:, :, ::-1])])
        return None, jax.nn.softmax(both, -1).mean(0)

    batches = in_batches(np.arange(len(pixels)))
    _, scores = jit_scan(batch_posteriors)(None, pixels[np.maximum(batches, 0)], variables)
    return np.asarray(scores).reshape(-1, model.num_classes)[: len(pixels)]
