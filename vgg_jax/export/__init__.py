"""A net as a file that others run: safetensors, ONNX, StableHLO or a TensorFlow SavedModel."""

from vgg_jax.export.spec import ExportSpec, fold_batch_norm
from vgg_jax.export.writer import write

__all__ = ["ExportSpec", "fold_batch_norm", "write"]
