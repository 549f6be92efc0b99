"""The net as an ONNX graph, written operation by operation."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from vgg_jax.export import ExportSpec
from vgg_jax.layers import BatchNorm
from vgg_jax.weights.layouts import LAYOUTS, tensor_table

OPSET, IR = 17, 8  # what runtimes of 2022 and later read


def write(path: Path, artefact: ExportSpec) -> None:
    model = graph(artefact)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def graph(artefact: ExportSpec) -> Any:
    """onnx.ModelProto with inputs "images" (N, H, W, 3) and one output of the name of what it is."""
    net, dense = artefact.weights.model, artefact.output != "logits"
    # ONNX has PyTorch's order of axes; timm has fully connected layers as convolutions, torchvision as matrices.
    layout = next(each for each in LAYOUTS if each.name == ("timm" if dense else "torchvision"))
    trees = artefact.weights.variables
    tensors: dict[str, np.ndarray] = {"mean_rgb": np.array(artefact.mean_rgb, np.float32)}
    for row in tensor_table(layout, net.config, net.num_classes, net.batch_norm, net.image_size):
        group, layer, leaf = row.path
        array = row.to_foreign(np.asarray(trees[group][layer][leaf], np.float32))
        tensors[f"{layer}/{leaf}"] = (
            array.reshape(*array.shape, 1, 1)
            if dense and layer == "fc8" and leaf == "kernel"
            else array
        )

    nodes: list[Any] = []
    initializers = []
    for name, array in tensors.items():
        if artefact.bfloat16 and name != "mean_rgb":
            initializers.append(_bfloat16(f"{name}/bfloat16", array.astype(artefact.dtype)))
            nodes.append(
                helper.make_node("Cast", [f"{name}/bfloat16"], [name], to=TensorProto.FLOAT)
            )
        else:
            initializers.append(numpy_helper.from_array(array, name))

    x = "images"

    def add(operation: str, output: str, *weights: str, **attributes: Any) -> None:
        nonlocal x
        nodes.append(
            helper.make_node(operation, [x, *weights], [output], name=output, **attributes)
        )
        x = output

    if artefact.uint8:
        add("Cast", "float", to=TensorProto.FLOAT)
        add("Sub", "centred", "mean_rgb")
    add("Transpose", "channels_first", perm=[0, 3, 1, 2])
    for name, kind, _, kernel in artefact.table:
        if kind == "conv" or (kind == "fc" and dense):
            pads = [kernel // 2] * 4 if kind == "conv" else [0] * 4
            add(
                "Conv",
                name,
                f"{name}/kernel",
                f"{name}/bias",
                kernel_shape=[kernel, kernel],
                pads=pads,
            )
        elif kind == "bn":
            leaves = (f"{name}/{leaf}" for leaf in ("scale", "bias", "mean", "var"))
            add("BatchNormalization", name, *leaves, epsilon=BatchNorm.epsilon)
        elif kind == "relu":
            add("Relu", name)
        elif kind == "lrn":
            add(
                "LRN", name, size=5, alpha=5e-4, beta=0.75, bias=2.0
            )  # ONNX divides alpha by the size
        elif kind == "pool":
            add("MaxPool", name, kernel_shape=[2, 2], strides=[2, 2])
        else:
            if name == "fc6":
                add("Flatten", "flat")
            add("Gemm", name, f"{name}/kernel", f"{name}/bias", transB=1)
    if artefact.output == "posteriors":
        add("ReduceMean", "mean_score", axes=[2, 3], keepdims=0)
        add("Softmax", "posteriors", axis=1)
    elif artefact.output == "score_map":
        add("Transpose", "score_map", perm=[0, 2, 3, 1])
    else:
        add("Identity", "logits")

    sides: list[Any] = ["H", "W"] if dense else [net.image_size] * 2
    images = helper.make_tensor_value_info(
        "images", TensorProto.UINT8 if artefact.uint8 else TensorProto.FLOAT, ["N", *sides, 3]
    )
    shape: list[Any] = (
        ["N", "h", "w", net.num_classes]
        if artefact.output == "score_map"
        else ["N", net.num_classes]
    )
    output = helper.make_tensor_value_info(artefact.output, TensorProto.FLOAT, shape)
    if not artefact.uint8:
        initializers = [each for each in initializers if each.name != "mean_rgb"]
    made = helper.make_graph(nodes, f"VGG {artefact.weights.net}", [images], [output], initializers)
    model = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR, producer_name="vgg_jax"
    )
    helper.set_model_props(model, {"vgg_jax": json.dumps(artefact.metadata())})
    return model


def _bfloat16(name: str, array: np.ndarray) -> Any:
    return helper.make_tensor(name, TensorProto.BFLOAT16, array.shape, array.tobytes(), raw=True)
