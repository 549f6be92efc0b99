"""Times an inference step of an exported .onnx file in ONNX Runtime or OpenVINO.

    python -m experiments.benchmarks.runtime_step --runtime openvino \\
        --net D --image-size 224 --batch 8 --hidden 4096 [--dtype bfloat16]

It is a peer for `bench_step.py --mode infer --peer`. Needs onnx, and onnxruntime or openvino.
Prints one JSON line with "seconds", the median of --runs, warm. Only OpenVINO has bfloat16.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.script import HelpFormatter, run
from vgg_jax import CONFIGS, IMAGENET, VGG, compiler_options
from vgg_jax.export import ExportSpec, write
from vgg_jax.weights import Weights
from vgg_jax.weights.layouts import Preprocessing


def load_session(runtime: str, file: Path, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function from images (N, H, W, 3) to logits."""
    if runtime == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda images: session.run(None, {"images": images})[0]
    import openvino

    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
    }
    compiled = openvino.Core().compile_model(file, "CPU", options)
    return lambda images: compiled([images])[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--runtime", choices=("onnxruntime", "openvino"), required=True)
    parser.add_argument("--net", default="A", choices=CONFIGS)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--mode", default="infer", choices=("infer",))
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    if args.runtime == "onnxruntime" and args.dtype == "bfloat16":
        parser.error("ONNX Runtime has no bfloat16 on a CPU")
    size = args.image_size
    config = dataclasses.replace(CONFIGS[args.net], fc=(args.hidden, args.hidden))
    model = VGG(config, 10, image_size=size)
    init = jax.jit(model.lazy_init, compiler_options=compiler_options())
    params = init(jax.random.key(0), jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))[
        "params"
    ]
    weights = Weights(
        net=args.net,
        layout="vgg_jax",
        model=model,
        params=params,
        batch_stats={},
        top=True,
        preprocessing=Preprocessing(IMAGENET.mean_rgb),
        classes=tuple(map(str, range(10))),
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.onnx"
        write(file, ExportSpec(weights, uint8=False))
        step = load_session(args.runtime, file, args.dtype)
    rng = np.random.default_rng(0)
    images = rng.normal(size=(args.batch, size, size, 3)).astype(np.float32) * 50
    step(images)
    seconds = []
    for _ in range(args.runs):
        start = time.perf_counter()
        step(images)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    result = {"seconds": median, "images_per_second": args.batch / median}
    print(json.dumps(vars(args) | result))


if __name__ == "__main__":
    run(main)
