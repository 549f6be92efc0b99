"""Digests of what training, evaluation and export compute, to show that a change leaves them equal.

    python -m tools.fingerprint before.json                        # four minutes on two cores
    python -m tools.fingerprint after.json --expect before.json

Run it before and after the change, on one machine with one release of jax. It exits with 1 if a
digest differs. The photos are the files $VGG_JAX_DATA/imagenet-sample/*/*; if there are too few,
the photos are noise.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vgg_jax import CONFIGS, IMAGENET, VGG, TrainConfig
from vgg_jax.configs.evaluation import EvalProtocol
from vgg_jax.distributed.sharding import make_mesh, shard_batch
from vgg_jax.evaluation.dense import class_posteriors
from vgg_jax.export import ExportSpec, write
from vgg_jax.model import build_model
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import init_state, jit_steps
from vgg_jax.weights import Weights
from vgg_jax.weights.layouts import Preprocessing

NUM_CLASSES = 10
# The nets that are trained, by the name of their entries.
NETS: dict[str, dict[str, Any]] = {
    "A": {"net": "A", "batch_norm": False, "size": 40},
    "A-LRN": {"net": "A-LRN", "batch_norm": False, "size": 36},
    "C with batch norm": {"net": "C", "batch_norm": True, "size": 32},
    "D with batch norm": {"net": "D", "batch_norm": True, "size": 32},
}
# The ways in which each of them is trained.
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "micro-batches": {"micro": 4},
    "two devices": {"devices": 2},
}
PROTOCOLS = {
    "dense": EvalProtocol(),
    "ceil": EvalProtocol(ceil=True),
    "multi-crop": EvalProtocol("multi-crop"),
}


def compute(
    nets: Mapping[str, dict[str, Any]], eval_net: str, *, steps: int, size: int, fc: int, count: int
) -> Iterator[tuple[str, Any]]:
    """Trains, evaluates and exports.

    Args:
        nets: Nets to train, as in `NETS`.
        eval_net: Name of the net to evaluate and export.
        steps: Training steps.
        size: Image size of the evaluated net.
        fc: Features of fc6 and fc7.
        count: Number of photos.

    Yields:
        (name, tree of arrays), one result after the other.
    """
    for net, settings in nets.items():
        for variant, changes in VARIANTS.items():
            yield f"train {net} {variant}", train(steps=steps, fc=fc, **settings, **changes)
    model, variables = random_net(eval_net, size, fc)
    photos = load_photos(count, size + size // 4)
    for name, protocol in PROTOCOLS.items():
        posteriors = class_posteriors(model, variables, photos, protocol=protocol)
        yield f"evaluate {eval_net} {name}", posteriors
    for name, outputs in export_and_run(eval_net, model, variables):
        yield f"export {eval_net} {name}", outputs


def digest(tree: Any) -> str:
    """SHA-256 of the names, types, shapes and bytes of a tree's arrays."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def train(
    net: str,
    batch_norm: bool,
    size: int,
    fc: int,
    steps: int,
    micro: int | None = None,
    devices: int = 1,
    dtype: str = "float32",
) -> Any:
    """Parameters, statistics and momentum after some steps, and the sums of the last step."""
    config = TrainConfig(
        net=net,
        batch_norm=batch_norm,
        fc=(fc, fc),
        image_size=size,
        scale=(size,),
        batch_size=8,
        microbatch=micro,
        learning_rate=1e-3,
        dtype=dtype,
    )
    mesh = make_mesh(micro or config.batch_size, jax.devices()[:devices])
    model = build_model(config, NUM_CLASSES)
    train_step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh)
    state = init_state(model, make_optimizer(config), 0, mesh)
    sums = None
    for batch in random_batches(config, steps):
        state, sums = train_step(state, shard_batch(batch, mesh))
    return jax.device_get((state.params, state.batch_stats, state.opt_state.inner_state, sums))


def random_batches(config: TrainConfig, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Random batches. The last example of each is masked, as in the last batch of an epoch."""
    rng, n, size = np.random.default_rng(1), config.batch_size, config.image_size
    for _ in range(count):
        yield {
            "image": rng.integers(0, 256, (n, size, size, 3)).astype(np.uint8),
            "colour_shift": rng.normal(size=(n, 3)).astype(np.float32),
            "label": rng.integers(NUM_CLASSES, size=n).astype(np.int32),
            "mask": np.arange(n) < n - 1,
        }


def load_photos(count: int, size: int) -> list[np.ndarray]:
    """The first photos of imagenet-sample, with the shorter side `size`; or noise of many sizes."""
    rng = np.random.default_rng(2)
    folder = Path(os.environ.get("VGG_JAX_DATA", os.devnull), "imagenet-sample")
    files = sorted(folder.glob("*/*"))[:count]
    if len(files) < count:
        shapes = [(size + 3 * i, size + 40 - 5 * (i % 8), 3) for i in range(count)]
        return [rng.integers(0, 256, shape).astype(np.uint8) for shape in shapes]
    from vgg_jax.preprocessing import load_resized

    return [load_resized(str(file), [size], True)[0] for file in files]


def random_net(net: str, size: int, fc: int) -> tuple[VGG, dict[str, Any]]:
    """A net with random weights, small enough that no posterior is 0 or 1."""
    rng = np.random.default_rng(3)
    model = VGG(dataclasses.replace(CONFIGS[net], fc=(fc, fc)), NUM_CLASSES, image_size=size)
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    shapes = jax.eval_shape(model.lazy_init, jax.random.key(0), images)

    def draw(leaf: Any) -> Any:
        fan_in = max(1, leaf.size // leaf.shape[-1])
        if leaf.shape[:3] == (3, 3, 3):  # conv1_1 reads values up to 255
            fan_in *= 200**2
        std = np.sqrt(2 / fan_in) if len(leaf.shape) > 1 else 0.01
        return rng.normal(0, std, leaf.shape).astype(np.float32)

    return model, jax.tree.map(draw, dict(shapes))


def export_and_run(net: str, model: VGG, variables: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The outputs of exported ONNX and StableHLO files, from the runtimes that read them."""
    import onnxruntime
    from jax import export
    from safetensors.numpy import load

    classes = tuple(map(str, range(NUM_CLASSES)))
    preprocessing = Preprocessing(IMAGENET.mean_rgb)
    params = variables["params"]
    weights = Weights(net, "vgg_jax", model, params, {}, True, preprocessing, classes)
    shape = (2, model.image_size, model.image_size, 3)
    images = np.random.default_rng(4).integers(0, 256, shape).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        onnx, stablehlo = Path(folder, "net.onnx"), Path(folder, "net.stablehlo")
        for output in ("logits", "posteriors"):
            write(onnx, ExportSpec(weights, output), overwrite=True)
            session = onnxruntime.InferenceSession(onnx)
            yield f"onnx {output}", session.run(None, {"images": images})[0]
            write(stablehlo, ExportSpec(weights, output), overwrite=True)
            with zipfile.ZipFile(stablehlo) as file:
                program = export.deserialize(bytearray(file.read("program")))
                tensors = load(file.read("weights.safetensors"))
            yield f"stablehlo {output}", np.asarray(program.call(tensors, images))


def main() -> int:
    """Writes the digests; compares them with others if asked to. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", help="JSON file to write")
    parser.add_argument("--expect", help="JSON file to compare with")
    args = parser.parse_args()
    expected = json.loads(Path(args.expect).read_text()) if args.expect else {}
    jax.config.update("jax_num_cpu_devices", 2)
    digests = {"jax": jax.__version__}
    for name, tree in compute(NETS, "A", steps=20, size=64, fc=64, count=20):
        digests[name] = digest(tree)
        print(name, digests[name][:16], flush=True)
    Path(args.out).write_text(json.dumps(digests, indent=1) + "\n")
    different = [name for name in expected if digests.get(name) != expected[name]]
    if args.expect:
        print(f"different: {', '.join(different)}" if different else "all are equal")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
