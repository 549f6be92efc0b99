"""Exports a net to a file that other programs run.

The formats are safetensors, ONNX, StableHLO and TensorFlow's SavedModel.
"""

from vgg_jax.export.spec import ExportSpec, fold_batch_norm
from vgg_jax.export.writer import export, write

__all__ = ["ExportSpec", "export", "fold_batch_norm", "write"]
