"""Random weights in the names and orders of other libraries, and their logits in PyTorch."""

import functools
import struct

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from vgg_jax import CONFIGS, compiler_options, load
from vgg_jax.weights import read, save
from vgg_jax.weights.layouts import LAYOUTS, tensor_table

# torchvision's mean and std, times 255.
TORCHVISION_MEAN, TORCHVISION_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# fc6 reads 2x2 positions: with more than one, their order counts.
FC, NUM_CLASSES, IMAGE_SIZE = (24, 16), 10, 64
# Indices of the convolutions in torchvision's published files.
TORCHVISION_CONVS = {
    "A": [0, 3, 6, 8, 11, 13, 16, 18],
    "D": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
}
TORCHVISION_CONVS_BATCH_NORM = {"A": [0, 4, 8, 11, 15, 18, 22, 25]}


def random_tensors(net, batch_norm=False, seed=0):
    """{layer name: [arrays in PyTorch's order]}, scaled so that logits are of the order of 1."""
    tensors = draw_tensors(net, batch_norm, seed)
    return {name: [array.copy() for array in arrays] for name, arrays in tensors.items()}


@functools.cache
def draw_tensors(net, batch_norm, seed):
    rng = np.random.default_rng(seed)
    tensors, in_features = {}, 3
    for i, stage in enumerate(CONFIGS[net].stages, 1):
        for j, (features, kernel_size) in enumerate(stage, 1):
            shape = (features, in_features, kernel_size, kernel_size)
            std = (2 / (in_features * kernel_size**2)) ** 0.5
            tensors[f"conv{i}_{j}"] = rng.normal(0, std, shape), rng.normal(0, 0.1, features)
            if batch_norm:
                tensors[f"bn{i}_{j}"] = [
                    rng.uniform(0.5, 1.5, features),
                    *rng.normal(0, 0.1, (2, features)),
                    rng.uniform(0.5, 1.5, features),
                ]
            in_features = features
    for name, shape in (
        ("fc6", (FC[0], 512 * 4)),
        ("fc7", (FC[1], FC[0])),
        ("fc8", (NUM_CLASSES, FC[1])),
    ):
        tensors[name] = rng.normal(0, (2 / shape[1]) ** 0.5, shape), rng.normal(0, 0.1, shape[0])
    return {name: [np.float32(array) for array in arrays] for name, arrays in tensors.items()}


def pytorch_state(tensors, convs, linears, norms=()):
    """A state_dict with the tensors, in modules of these names."""
    state = {}
    for names, modules in (
        ([name for name in tensors if name.startswith("conv")], convs),
        (["fc6", "fc7", "fc8"], linears),
        ([name for name in tensors if name.startswith("bn")], norms),
    ):
        for name, module in zip(names, modules, strict=True):
            params = ["weight", "bias", "running_mean", "running_var"][: len(tensors[name])]
            for param, array in zip(params, tensors[name], strict=True):
                state[f"{module}.{param}"] = array
    return state


def torchvision_state(tensors, net, batch_norm=False):
    """A state_dict in torchvision's layout."""
    indices = (TORCHVISION_CONVS_BATCH_NORM if batch_norm else TORCHVISION_CONVS)[net]
    return pytorch_state(
        tensors,
        [f"features.{i}" for i in indices],
        [f"classifier.{i}" for i in (0, 3, 6)],
        [f"features.{i + 1}" for i in indices] if batch_norm else [],
    )


def reorder_kernel(array, conv_pattern, fc_pattern):
    """A kernel in another order than PyTorch's.

    The pattern "HWIO" is of four axes; "HWI O" has the positions of fc6 in one axis.
    """
    if array.ndim == 2 and array.shape[1] != 512 * 4:  # fc7 and fc8
        return array.T
    words = (conv_pattern if array.ndim == 4 else fc_pattern).split()
    array = array.reshape(len(array), -1, 2, 2) if array.ndim == 2 else array
    array = array.transpose(["OIHW".index(letter) for letter in "".join(words)])
    return array if len(words) == 1 else array.reshape(-1, array.shape[-1])


def caffe_messages():
    """The class NetParameter, built by protobuf from the field numbers of caffe.proto."""
    descriptor_pb2 = pytest.importorskip(
        "google.protobuf.descriptor_pb2", reason="needs protobuf, which comes with TensorFlow"
    )
    from google.protobuf import descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    field_types = descriptor_pb2.FieldDescriptorProto
    one, many = field_types.LABEL_OPTIONAL, field_types.LABEL_REPEATED

    def add_message(name, *fields):
        message = file.message_type.add(name=name)
        for field_name, number, label, field_type, packed in fields:
            field = message.field.add(name=field_name, number=number, label=label)
            if isinstance(field_type, str):
                field.type, field.type_name = field_types.TYPE_MESSAGE, f".caffe.{field_type}"
            else:
                field.type = field_type
            if packed:
                field.options.packed = True

    add_message("BlobShape", ("dim", 1, many, field_types.TYPE_INT64, True))
    sides = [
        (name, i, one, field_types.TYPE_INT32, False)
        for i, name in enumerate(("num", "channels", "height", "width"), 1)
    ]
    add_message(
        "BlobProto",
        *sides,
        ("data", 5, many, field_types.TYPE_FLOAT, True),
        ("shape", 7, one, "BlobShape", False),
    )
    text, number = field_types.TYPE_STRING, field_types.TYPE_INT32
    add_message(
        "V1LayerParameter",
        ("name", 4, one, text, False),
        ("type", 5, one, number, False),
        ("blobs", 6, many, "BlobProto", False),
    )
    add_message(
        "LayerParameter",
        ("name", 1, one, text, False),
        ("type", 2, one, text, False),
        ("blobs", 7, many, "BlobProto", False),
    )
    add_message(
        "NetParameter",
        ("name", 1, one, text, False),
        ("layers", 2, many, "V1LayerParameter", False),
        ("layer", 100, many, "LayerParameter", False),
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.NetParameter"))


def add_caffe_blob(layer, array, v1):
    """Adds an array to a layer, with the shape fields of the V1 encoding or the newer one."""
    blob = layer.blobs.add(data=array.ravel())
    if v1:
        shape = (1,) * (4 - array.ndim) + array.shape
        blob.num, blob.channels, blob.height, blob.width = shape
    else:
        blob.shape.dim.extend(array.shape)


def pack(*numbers):
    """Little-endian 32-bit numbers of a .mat file."""
    return struct.pack(f"<{len(numbers)}I", *numbers)


def mat_element(element_type, content):
    """An element of a .mat file."""
    return pack(element_type, len(content)) + content + bytes(-len(content) % 8)


def mat_array_head(array_class, shape, name=b""):
    """The elements that an array begins with: flags, shape and name."""
    return (
        mat_element(6, pack(array_class, 0)) + mat_element(5, pack(*shape)) + mat_element(1, name)
    )


def mat_file(content):
    """A .mat file with a header."""
    return b"MATLAB".ljust(124) + b"\x00\x01IM" + content


def photos(count=2, size=IMAGE_SIZE):
    """float32 (count, size, size, 3): photos, or random colours if there are none."""
    from tests.conftest import DATA  # here, because it configures jax; tools/fuzz.py is no test

    files = sorted((DATA / "imagenet-sample").glob("*/*"))[:count]
    if not files:
        return np.random.default_rng(1).integers(0, 256, (count, size, size, 3)).astype(np.float32)
    resized = [Image.open(file).convert("RGB").resize((size, size)) for file in files]
    return np.stack([np.asarray(image, np.float32) for image in resized])


def logits(path):
    """Logits of the net in a file, for `photos`."""
    model, variables, metadata = load(path)
    assert (model.num_classes, model.image_size) == (NUM_CLASSES, IMAGE_SIZE)
    mean = np.float32(metadata["preprocessing"]["mean_rgb"])
    return np.asarray(forward(model, variables, photos() - mean))


@functools.partial(jax.jit, static_argnums=0, compiler_options=compiler_options())
def forward(model, variables, x):
    """Logits. Files with the same net share one compilation."""
    return model.apply(variables, x)


def torch_logits(tensors, mean, std=(1, 1, 1), bgr=False):
    """Logits for `photos` by PyTorch's operations in float64, from the library's own numbers."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    from torch.nn import functional

    images = (photos() - np.array(mean)) / np.array(std)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    x = x.flip(1) if bgr else x
    stage = 1
    for name, arrays in tensors.items():
        kernel, bias, *stats = [torch.from_numpy(np.float64(array)) for array in arrays]
        if name.startswith("fc") or (name.startswith("conv") and int(name[4]) > stage):
            x, stage = (functional.max_pool2d(x, 2) if x.ndim == 4 else x), stage + 1
        if name.startswith("conv"):
            x = functional.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2)
            if name.replace("conv", "bn") in tensors:
                continue
        elif name.startswith("bn"):
            x = functional.batch_norm(x, stats[0], stats[1], kernel, bias)
        else:
            x = functional.linear(x.flatten(1), kernel, bias)
        x = x if name == "fc8" else x.relu()
    return x.numpy()


def assert_round_trip(path, state, layout, tmp_path):
    """Reads a file, saves it as vgg_jax's own, and saves that in its first layout: bit-equal."""
    save(tmp_path / "own.safetensors", read(path))
    save(tmp_path / "back.safetensors", read(tmp_path / "own.safetensors"), layout)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def assert_maps_back(path, layout, written):
    """Converts every tensor that was read to the layout of its file: bit-equal to `written`.

    `written` is {layer name: (kernel, bias)} as the file has them.
    """
    weights = read(path)
    assert weights.layout == layout
    table = tensor_table(LAYOUTS[layout], weights.model.config, NUM_CLASSES, False, IMAGE_SIZE)
    assert len(table) == 2 * len(written)
    for tensor in table:
        _, layer, param = tensor.path
        array = written[layer][("kernel", "bias").index(param)]
        value = weights.params[layer][param]
        if layer == "conv1_1" and param == "kernel" and weights.source_std:
            value = np.float32(value * np.array(weights.source_std)[None, None, :, None])
        np.testing.assert_array_equal(
            tensor.to_foreign(value),
            array.reshape(tensor.foreign_shape),
            err_msg=tensor.foreign_name,
        )
