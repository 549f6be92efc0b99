"""Compares float32 with float16, bfloat16 and int8 exports of a net in ONNX Runtime.

    python -m experiments.benchmarks.quantize RUN PHOTOS

RUN is the folder of a run, or a weight file. PHOTOS has the folders train/CLASS and val/CLASS of
its classes. int8 is that of docs/export.md. Each photo of val is one centre crop, on one core. All
files take it in turn. Needs onnx and onnxruntime. Prints one JSON document. With net D and 153
photos it takes six minutes.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
from PIL import Image, UnidentifiedImageError

import vgg_jax
from experiments.script import HelpFormatter, run
from vgg_jax.export import export

CALIBRATION_STEP = 2  # every second training photo, so that all classes are among them


def read_split(folder: Path, metadata: dict, step: int = 1) -> tuple[np.ndarray, list]:
    """Reads the centre crops of a split, float32 (n, H, W, 3), and their labels."""
    files = [file for file in sorted(folder.glob("*/*")) if is_photo(file)][::step]
    labels = [metadata["classes"].index(file.parent.name) for file in files]
    return np.asarray(vgg_jax.preprocess(files, metadata)), labels


def is_photo(path: Path) -> bool:
    try:
        Image.open(path).close()
    except UnidentifiedImageError:
        return False
    return True


class Calibration(CalibrationDataReader):
    """Photos one by one."""

    def __init__(self, images: np.ndarray):
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"images": image[None]}


def export_all(folder: Path, path: str, photos: Path) -> dict[str, Path]:
    """Writes the files, by the name of their numbers."""
    net = vgg_jax.load(path)
    files = {
        name: folder / f"{name}.onnx"
        for name in ("float32", "bfloat16", "float16", "int8 dynamic", "int8 static")
    }
    export(files["float32"], *net, uint8=False)
    export(files["bfloat16"], *net, uint8=False, bfloat16=True)
    export(files["float16"], *net, uint8=False, onnx_float16=True)
    quantize_dynamic(files["float32"], files["int8 dynamic"], op_types_to_quantize=["MatMul"])
    images, _ = read_split(photos / "train", net[2], CALIBRATION_STEP)
    quantize_static(files["float32"], files["int8 static"], Calibration(images))
    return files


def compare(files: dict[str, Path], images: np.ndarray, labels: list[int]) -> list[dict]:
    """Accuracy, size and time of each file. The time is relative to the first file's."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {
        name: onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        for name, file in files.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in files}
    num_correct = dict.fromkeys(files, 0)
    for image, label in zip(images, labels, strict=True):
        for name, session in sessions.items():
            started = time.perf_counter()
            (logits,) = session.run(None, {"images": image[None]})
            seconds[name].append(time.perf_counter() - started)
            num_correct[name] += int(logits[0].argmax() == label)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "numbers": name,
            "accuracy": round(num_correct[name] / len(labels), 4),
            "bytes": files[name].stat().st_size,
            "seconds_a_photo": round(medians[name], 4),
            "relative_time": round(medians[name] / medians["float32"], 3),
        }
        for name in files
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("photos", metavar="PHOTOS", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = export_all(Path(folder), args.run, args.photos)
        images, labels = read_split(args.photos / "val", vgg_jax.load(args.run)[2])
        rows = compare(files, images, labels)
    document = {
        "command": " ".join(sys.argv),
        "onnxruntime": onnxruntime.__version__,
        "photos": len(labels),
        "rows": rows,
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    run(main)
