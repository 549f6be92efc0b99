"""Digests of what training, evaluation and export compute, to show that a change leaves results bit-equal.

    python -m tools.fingerprint before.json                 # about ten minutes on two cores
    python -m tools.fingerprint after.json --expect before.json

Run it before and after the change, on one machine with one release of jax. Exits with 1 if a digest differs.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
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
from vgg_jax.training.optimizer import sgd
from vgg_jax.training.step import init_state, jit_steps
from vgg_jax.weights import Weights
from vgg_jax.weights.layouts import Preprocessing

CLASSES = 10
# One training run each: what differs from a float32 run on one device.
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "micro-batches": {"micro": 4},
    "two devices": {"devices": 2},
}


def digest(tree: Any) -> str:
    """SHA-256 of the names, types, shapes and bytes of a tree's arrays."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def batches(config: TrainConfig, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Random batches; the last example of each is masked, as in the last batch of an epoch."""
    rng, n, size = np.random.default_rng(1), config.batch_size, config.image_size
    for _ in range(count):
        yield {
            "image": rng.integers(0, 256, (n, size, size, 3)).astype(np.uint8),
            "colour_shift": rng.normal(size=(n, 3)).astype(np.float32),
            "label": rng.integers(CLASSES, size=n).astype(np.int32),
            "mask": np.arange(n) < n - 1,
        }


def trained(
    net: str,
    batch_norm: bool,
    size: int,
    fc: int,
    steps: int,
    micro: int | None = None,
    devices: int = 1,
    **changes: Any,
) -> Any:
    """Parameters, statistics, momentum and the sums of the last step, after some steps."""
    config = TrainConfig(
        net=net,
        batch_norm=batch_norm,
        fc=(fc, fc),
        image_size=size,
        scale=(size,),
        batch_size=8,
        microbatch=micro,
        learning_rate=1e-3,
        **changes,
    )
    mesh = make_mesh(micro or config.batch_size, jax.devices()[:devices])
    model = build_model(config, CLASSES)
    train_step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh)
    state = init_state(model, sgd(config), 0, mesh)
    sums = None
    for batch in batches(config, steps):
        state, sums = train_step(state, shard_batch(batch, mesh))
    return jax.device_get((state.params, state.batch_stats, state.opt_state.inner_state, sums))


def photos(count: int, size: int) -> list[np.ndarray]:
    """The first photos of the real data, rescaled, of their own sizes; noise where there are none."""
    rng = np.random.default_rng(2)
    files = sorted(Path(os.environ.get("VGG_JAX_DATA", "/nowhere"), "imagenet-sample").glob("*/*"))[
        :count
    ]
    if len(files) < count:
        return [
            rng.integers(0, 256, (size + 3 * i, size + 40 - 5 * i, 3)).astype(np.uint8)
            for i in range(count)
        ]
    from vgg_jax.data import load_resized

    return [load_resized(str(file), [size], True)[0] for file in files]


def random_net(net: str, size: int, fc: int) -> tuple[VGG, dict[str, Any]]:
    """A net with random weights that keep activations at a useful size."""
    import dataclasses

    model, rng = (
        VGG(dataclasses.replace(CONFIGS[net], fc=(fc, fc)), CLASSES, image_size=size),
        np.random.default_rng(3),
    )
    shapes = jax.eval_shape(
        model.lazy_init, jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    )

    def draw(leaf: Any) -> Any:
        fan_in = max(1, leaf.size // leaf.shape[-1])
        if leaf.shape[:3] == (3, 3, 3):  # images are 0-255; posteriors of large logits are 0 or 1
            fan_in *= 200**2
        return rng.normal(
            0, np.sqrt(2 / fan_in) if len(leaf.shape) > 1 else 0.01, leaf.shape
        ).astype(np.float32)

    return model, jax.tree.map(draw, dict(shapes))


def evaluated(net: str, size: int, fc: int, count: int) -> Iterator[tuple[str, Any]]:
    """Posteriors of photos: dense, dense with Caffe's poolings, and multi-crop."""
    model, variables = random_net(net, size, fc)
    images = photos(count, size + size // 4)
    for name, protocol in (
        ("dense", EvalProtocol()),
        ("ceil", EvalProtocol(ceil=True)),
        ("multi-crop", EvalProtocol("multi-crop")),
    ):
        yield name, class_posteriors(model, variables, images, protocol=protocol)


def exported(net: str, size: int, fc: int, folder: Path) -> Iterator[tuple[str, Any]]:
    """What the runtimes of exported files answer."""
    import zipfile

    import onnxruntime
    from jax import export
    from safetensors.numpy import load

    model, variables = random_net(net, size, fc)
    names = tuple(map(str, range(CLASSES)))
    weights = Weights(
        net,
        "vgg_jax",
        model,
        variables["params"],
        {},
        True,
        Preprocessing(IMAGENET.mean_rgb),
        names,
    )
    images = np.random.default_rng(4).integers(0, 256, (2, size, size, 3)).astype(np.uint8)
    for output in ("logits", "posteriors"):
        write(folder / "net.onnx", ExportSpec(weights, output))
        yield (
            f"onnx {output}",
            onnxruntime.InferenceSession(folder / "net.onnx").run(None, {"images": images})[0],
        )
        write(folder / "net.stablehlo", ExportSpec(weights, output))
        with zipfile.ZipFile(folder / "net.stablehlo") as file:
            program = export.deserialize(bytearray(file.read("program")))
            yield (
                f"stablehlo {output}",
                np.asarray(program.call(load(file.read("weights.safetensors")), images)),
            )


def fingerprints(
    nets: dict[str, dict[str, Any]], steps: int, size: int, fc: int, count: int
) -> Iterator[tuple[str, str]]:
    """(name, digest) of everything, one after the other. `nets` are for training, by name."""
    for net, settings in nets.items():
        for variant, changes in VARIANTS.items():
            yield (
                f"train {net} {variant}",
                digest(trained(steps=steps, fc=fc, **settings, **changes)),
            )
    for name, found in evaluated("A", size, fc, count):
        yield f"evaluate A {name}", digest(found)
    with tempfile.TemporaryDirectory() as folder:
        for name, found in exported("A", size, fc, Path(folder)):
            yield f"export A {name}", digest(found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", help="JSON file to write")
    parser.add_argument("--expect", help="JSON file to compare with")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 2)
    nets = {
        "A": {"net": "A", "batch_norm": False, "size": 40},
        "A-LRN": {"net": "A-LRN", "batch_norm": False, "size": 36},
        "C with batch norm": {"net": "C", "batch_norm": True, "size": 32},
        "D with batch norm": {"net": "D", "batch_norm": True, "size": 32},
    }
    found = {}
    for name, value in fingerprints(nets, steps=20, size=64, fc=64, count=20):
        found[name] = value
        print(name, value[:16], flush=True)
    Path(args.out).write_text(json.dumps({"jax": jax.__version__} | found, indent=1) + "\n")
    if args.expect is None:
        return 0
    expected = json.loads(Path(args.expect).read_text())
    different = [name for name in expected if found.get(name, jax.__version__) != expected[name]]
    print(f"differ: {', '.join(different)}" if different else "all are equal")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
