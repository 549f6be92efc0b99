"""Exports a net as an ONNX graph, one node for each operation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vgg_jax.configs.models import Layer
from vgg_jax.export.spec import ExportSpec
from vgg_jax.layers import BatchNorm
from vgg_jax.weights.layouts import LAYOUTS, tensor_table

# Runtimes of 2022 and later read these versions.
OPSET, IR = 17, 8


def write(path: Path, spec: ExportSpec) -> None:
    """Writes an .onnx file.

    Args:
        path: The file.
        spec: The net, with its inputs and outputs.
    """
    model = graph(spec)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def graph(spec: ExportSpec) -> Any:
    """Builds the graph of a net.

    Args:
        spec: The net, with its inputs and outputs.

    Returns:
        An onnx.ModelProto with the input "images" (N, H, W, C). Its one output has the name
        `spec.output`. The metadata are the property "vgg_jax".
    """
    nodes: list[Any] = []
    initializers: list[Any] = []
    for name, array in _tensors(spec).items():
        if spec.bfloat16:
            stored = f"{name}/bfloat16"
            initializers.append(_bfloat16_tensor(stored, array.astype(spec.dtype)))
            nodes.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
        else:
            initializers.append(numpy_helper.from_array(array.astype(spec.dtype), name))
    if spec.uint8:
        mean = np.array(spec.mean_rgb, np.float32)
        initializers.insert(0, numpy_helper.from_array(mean, "mean_rgb"))
    if _is_dense(spec):
        size, channels = spec.weights.model.image_size, spec.weights.model.in_channels
        smallest = np.array([0, size, size, channels], np.int64)
        initializers.insert(0, numpy_helper.from_array(smallest, "smallest_shape"))
    nodes += _operations(spec)
    images, output = _value_infos(spec)
    built = helper.make_graph(nodes, f"VGG {spec.weights.net}", [images], [output], initializers)
    model = helper.make_model(
        built,
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="vgg_jax",
    )
    helper.set_model_props(model, {"vgg_jax": json.dumps(spec.metadata())})
    return model


def _is_dense(spec: ExportSpec) -> bool:
    """True if the fully connected layers run as convolutions (§3.2)."""
    return spec.output != "logits"


def _tensors(spec: ExportSpec) -> dict[str, np.ndarray]:
    """The weights in ONNX's axis order, which is PyTorch's, as "layer/parameter"."""
    model, variables = spec.weights.model, spec.weights.variables
    # timm has fully connected layers as convolutions, torchvision as matrices.
    layout = LAYOUTS["timm" if _is_dense(spec) else "torchvision"]
    tensors: dict[str, np.ndarray] = {}
    for tensor in tensor_table(
        layout,
        model.config,
        model.num_classes,
        model.batch_norm,
        model.image_size,
        in_channels=model.in_channels,
    ):
        collection, layer, param = tensor.path
        array = tensor.to_foreign(np.asarray(variables[collection][layer][param], np.float32))
        if _is_dense(spec) and (layer, param) == ("fc8", "kernel"):  # a matrix in timm, too
            array = array.reshape(*array.shape, 1, 1)
        tensors[f"{layer}/{param}"] = array
    return tensors


def _bfloat16_tensor(name: str, array: np.ndarray) -> Any:
    return helper.make_tensor(name, TensorProto.BFLOAT16, array.shape, array.tobytes(), raw=True)


def _operations(spec: ExportSpec) -> list[Any]:
    """The nodes from "images" to the output; each reads the output of the one before it."""
    nodes: list[Any] = []
    if _is_dense(spec):
        # A smaller image cannot be reshaped so. Some runtimes would compute a meaningless output.
        nodes += [
            helper.make_node("Shape", ["images"], ["image_shape"]),
            helper.make_node("Max", ["image_shape", "smallest_shape"], ["checked_shape"]),
            helper.make_node(
                "Reshape", ["images", "checked_shape"], ["checked"], "is_at_least_size_of_net"
            ),
        ]

    def add(op_type: str, output: str, *weights: str, **attributes: Any) -> None:
        source = nodes[-1].output[0] if nodes else "images"
        node = helper.make_node(op_type, [source, *weights], [output], name=output, **attributes)
        nodes.append(node)

    if spec.uint8:
        add("Cast", "float", to=TensorProto.FLOAT)
        add("Sub", "centred", "mean_rgb")
    add("Transpose", "channels_first", perm=[0, 3, 1, 2])
    if spec.float16:
        add("Cast", "float16", to=TensorProto.FLOAT16)
    for layer in spec.table:
        if layer.name == "fc6" and not _is_dense(spec):
            add("Flatten", "flat")
        op_type, params, attributes = _layer_operation(
            layer, _is_dense(spec), spec.weights.model.pool
        )
        add(op_type, layer.name, *(f"{layer.name}/{param}" for param in params), **attributes)
    if spec.float16:
        add("Cast", "float32_scores", to=TensorProto.FLOAT)
    if spec.output == "posteriors":
        add("ReduceMean", "mean_score", axes=[2, 3], keepdims=0)
        add("Softmax", "posteriors", axis=1)
    elif spec.output == "score_map":
        add("Transpose", "score_map", perm=[0, 2, 3, 1])
    else:
        add("Identity", "logits")
    return nodes


def _layer_operation(
    layer: Layer, dense: bool, pool: str
) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """The operation of a layer, the parameters that it reads, and its attributes."""
    kernel_size, kernel_and_bias = layer.kernel_size, ("kernel", "bias")
    match layer.type:
        case "conv" | "fc" if dense or layer.type == "conv":
            padding = kernel_size // 2 if layer.type == "conv" else 0
            attributes = {"kernel_shape": [kernel_size] * 2, "pads": [padding] * 4}
            return "Conv", kernel_and_bias, attributes
        case "fc":
            return "Gemm", kernel_and_bias, {"transB": 1}
        case "bn":
            params = ("scale", "bias", "mean", "var")
            return "BatchNormalization", params, {"epsilon": BatchNorm.epsilon}
        case "relu":
            return "Relu", (), {}
        case "lrn":  # ONNX divides alpha by the size
            return "LRN", (), {"size": 5, "alpha": 5e-4, "beta": 0.75, "bias": 2.0}
        case "pool":
            op_type = "AveragePool" if pool == "avg" else "MaxPool"
            return op_type, (), {"kernel_shape": [2, 2], "strides": [2, 2]}
        case _:
            raise ValueError(f"layer {layer.name} has the unknown type {layer.type!r}")


def _value_infos(spec: ExportSpec) -> tuple[Any, Any]:
    """Types and shapes of the input and the output."""
    model = spec.weights.model
    sides: list[Any] = ["H", "W"] if _is_dense(spec) else [model.image_size] * 2
    positions: list[Any] = ["h", "w"] if spec.output == "score_map" else []
    images = helper.make_tensor_value_info(
        "images",
        TensorProto.UINT8 if spec.uint8 else TensorProto.FLOAT,
        ["N", *sides, model.in_channels],
    )
    output = helper.make_tensor_value_info(
        spec.output, TensorProto.FLOAT, ["N", *positions, model.num_classes]
    )
    return images, output
