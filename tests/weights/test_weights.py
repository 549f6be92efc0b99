"""Files as the other libraries write them, in and out again: by those libraries where they are installed, else to the published layout."""

import functools
import itertools
import json
import re
import struct
import sys
import time

import h5py
import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.conftest import DATA
from vgg_jax import CONFIGS, IMAGENET, InputError, cli, compiler_options, load
from vgg_jax.weights import imagenet, matconvnet, read, save
from vgg_jax.weights.layouts import LAYOUTS, tensor_table

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # torchvision's, times 255
FC, CLASSES, SIZE = (
    (24, 16),
    10,
    64,
)  # fc6 reads 2x2 positions: more than one, so that their order counts
TORCHVISION = {
    "A": [0, 3, 6, 8, 11, 13, 16, 18],
    "D": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28],
}  # of the published files
BATCH_NORM = {"A": [0, 4, 8, 11, 15, 18, 22, 25]}


def by_hand(net, batch_norm=False, seed=0):
    """{name of ours: an array in PyTorch's order}, small enough numbers that logits are of the order of 1."""
    rng = np.random.default_rng(seed)
    tensors, inputs = {}, 3
    for i, stage in enumerate(CONFIGS[net].stages, 1):
        for j, (width, kernel) in enumerate(stage, 1):
            shape = (width, inputs, kernel, kernel)
            tensors[f"conv{i}_{j}"] = (
                rng.normal(0, (2 / (inputs * kernel**2)) ** 0.5, shape),
                rng.normal(0, 0.1, width),
            )
            if batch_norm:
                tensors[f"bn{i}_{j}"] = [
                    rng.uniform(0.5, 1.5, width),
                    *rng.normal(0, 0.1, (2, width)),
                    rng.uniform(0.5, 1.5, width),
                ]
            inputs = width
    for name, shape in (
        ("fc6", (FC[0], 512 * 4)),
        ("fc7", (FC[1], FC[0])),
        ("fc8", (CLASSES, FC[1])),
    ):
        tensors[name] = rng.normal(0, (2 / shape[1]) ** 0.5, shape), rng.normal(0, 0.1, shape[0])
    return {name: [np.float32(array) for array in arrays] for name, arrays in tensors.items()}


def torchs(tensors, convolutions, linear, normalisations=()):
    """A state_dict with the modules' numbers."""
    found = {}
    for names, prefixes in (
        ([name for name in tensors if name.startswith("conv")], convolutions),
        (["fc6", "fc7", "fc8"], linear),
        ([name for name in tensors if name.startswith("bn")], normalisations),
    ):
        for name, prefix in zip(names, prefixes, strict=True):
            leaves = (
                ("weight", "bias")
                if len(tensors[name]) == 2
                else ("weight", "bias", "running_mean", "running_var")
            )
            found |= {
                f"{prefix}.{leaf}": array for leaf, array in zip(leaves, tensors[name], strict=True)
            }
    return found


def torchvision_file(tensors, net, batch_norm=False):
    convolutions = BATCH_NORM[net] if batch_norm else TORCHVISION[net]
    normalisations = [f"features.{i + 1}" for i in convolutions] if batch_norm else []
    return torchs(
        tensors,
        [f"features.{i}" for i in convolutions],
        [f"classifier.{i}" for i in (0, 3, 6)],
        normalisations,
    )


def images(count=2, size=SIZE):
    """Photos, or where there are none, random colours."""
    files = sorted((DATA / "imagenet-sample").glob("*/*"))[:count]
    if not files:
        return np.random.default_rng(1).integers(0, 256, (count, size, size, 3)).astype(np.float32)
    return np.stack(
        [
            np.asarray(Image.open(file).convert("RGB").resize((size, size)), np.float32)
            for file in files
        ]
    )


def logits(path, net=None):
    model, variables, metadata = load(path) if net is None else load(path, net)
    assert (model.num_classes, model.image_size) == (CLASSES, SIZE)
    return np.asarray(
        forward(model, variables, images() - np.float32(metadata["preprocessing"]["mean_rgb"]))
    )


@functools.partial(jax.jit, static_argnums=0, compiler_options=compiler_options())
def forward(model, variables, x):
    """Compiled once for all the files that hold the same net."""
    return model.apply(variables, x)


def expected(tensors, mean, std=(1, 1, 1), bgr=False):
    """The logits in PyTorch's operations, in float64, from the numbers as the other library has them."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    from torch.nn import functional

    x = torch.from_numpy(((images() - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2).copy())
    x = x.flip(1) if bgr else x
    stage = 1
    for name, arrays in tensors.items():
        kernel, bias, *rest = [torch.from_numpy(np.float64(array)) for array in arrays]
        if name[:2] in ("co", "fc") and (name[:2] == "fc" or int(name[4]) > stage):
            x, stage = (functional.max_pool2d(x, 2) if x.ndim == 4 else x), stage + 1
        if name.startswith("conv"):
            x = functional.conv2d(x, kernel, bias, padding=kernel.shape[-1] // 2)
            if name.replace("conv", "bn") in tensors:
                continue
        elif name.startswith("bn"):
            x = functional.batch_norm(x, rest[0], rest[1], kernel, bias)
        else:
            x = functional.linear(x.flatten(1), kernel, bias)
        x = x if name == "fc8" else x.relu()
    return x.numpy()


def same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max(), rtol=0)


@pytest.mark.parametrize(
    ("net", "batch_norm"), [("A", False), ("D", False), ("A", True)], ids=["A", "D", "A-batch-norm"]
)
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_torchvisions_layout(net, batch_norm, kind, tmp_path):
    tensors = by_hand(net, batch_norm)
    state = torchvision_file(tensors, net, batch_norm)
    path = tmp_path / f"vgg.{kind}"
    if kind == "pth":
        torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
        counters = {
            name.replace("running_mean", "num_batches_tracked"): torch.tensor(7)
            for name in state
            if "running_mean" in name
        }
        torch.save(
            {name: torch.from_numpy(array) for name, array in state.items()} | counters, path
        )
    else:
        save_file(state, path)
    found = read(path)
    assert (found.layout, found.net, found.model.batch_norm, found.model.config.fc) == (
        "torchvision",
        net,
        batch_norm,
        FC,
    )
    same(logits(path), expected(tensors, MEAN, STD))
    back_and_bit_equal(path, state, "torchvision", tmp_path)


def back_and_bit_equal(path, state, layout, tmp_path):
    """Through our own file, and out of that in the layout it came in."""
    save(tmp_path / "ours.safetensors", read(path))
    save(tmp_path / "back.safetensors", read(tmp_path / "ours.safetensors"), layout)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys()
    for name, array in state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def rows_back(path, layout, written):
    """Every tensor of a file out of our order into its own, bit-equal."""
    weights, there = read(path), next(each for each in LAYOUTS if each.name == layout)
    assert weights.layout == layout
    found = tensor_table(there, weights.model.config, CLASSES, False, SIZE)
    assert len(found) == 2 * len(written)
    for row in found:
        _, layer, leaf = row.path
        array = written[layer][("kernel", "bias").index(leaf)]
        np.testing.assert_array_equal(
            row.to_foreign(weights.params[layer][leaf]),
            array.reshape(row.shape),
            err_msg=row.foreign_name,
        )


def test_timms_layout(tmp_path):
    tensors = by_hand("A")
    state = torchs(
        tensors,
        [f"features.{i}" for i in TORCHVISION["A"]],
        ["pre_logits.fc1", "pre_logits.fc2", "head.fc"],
    )
    state["pre_logits.fc1.weight"] = state["pre_logits.fc1.weight"].reshape(FC[0], 512, 2, 2)
    state["pre_logits.fc2.weight"] = state["pre_logits.fc2.weight"].reshape(FC[1], FC[0], 1, 1)
    save_file(state, tmp_path / "vgg.safetensors")
    assert read(tmp_path / "vgg.safetensors").layout == "timm"
    same(logits(tmp_path / "vgg.safetensors"), expected(tensors, MEAN, STD))
    back_and_bit_equal(tmp_path / "vgg.safetensors", state, "timm", tmp_path)


def in_rows(array, order):
    """A kernel in another order than PyTorch's: "HWIO", or "HWI O" and "IHW O" with fc6's positions in one axis."""
    if array.ndim == 2 and array.shape[1] != 512 * 4:
        return array.T
    array = array.reshape(len(array), -1, 2, 2) if array.ndim == 2 else array
    words = order.split()
    array = array.transpose(["OIHW".index(letter) for letter in "".join(words)])
    return array if len(words) == 1 else array.reshape(-1, array.shape[-1])


@pytest.mark.parametrize(
    ("style", "net"),
    [
        ("2016", "D"),
        pytest.param("2016", "E", marks=pytest.mark.slow),
        ("tf.keras", "D"),
        ("nested", "D"),
    ],
)
def test_kerass_layouts(style, net, tmp_path):
    """`vgg16_weights_tf_dim_ordering_tf_kernels.h5`, `vgg19…`, and what later Keras made of it, with what an optimizer keeps."""
    tensors, path = by_hand(net), tmp_path / "vgg.h5"
    names = {name: re.sub(r"conv(\d)_(\d)", r"block\1_conv\2", name) for name in tensors} | {
        "fc6": "fc1",
        "fc7": "fc2",
        "fc8": "predictions",
    }
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in names.values()]
        for name, (kernel, bias) in tensors.items():
            layer = names[name]
            paths = {
                "2016": [f"{layer}/{layer}_W_1:0", f"{layer}/{layer}_b_1:0"],
                "tf.keras": [f"{layer}/{layer}/kernel:0", f"{layer}/{layer}/bias:0"],
                "nested": [
                    f"model_weights/{layer}/vgg16/{layer}/kernel",
                    f"model_weights/{layer}/vgg16/{layer}/bias",
                ],
            }[style]
            file[paths[0]] = in_rows(kernel, "HWIO" if kernel.ndim == 4 else "HWI O")
            file[paths[1]] = bias
        if style == "nested":
            file["optimizer_weights/SGD/m/fc1/kernel"] = np.zeros(3, np.float32)
    rows_back(
        path,
        "keras",
        {
            name: (in_rows(k, "HWIO" if k.ndim == 4 else "HWI O"), b)
            for name, (k, b) in tensors.items()
        },
    )
    assert read(path).net == net
    same(logits(path), expected(tensors, IMAGENET.mean_rgb, bgr=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # of Keras' own arrays
def test_keras_itself(tmp_path):
    """Its own VGG16 and its own file, with the top and without."""
    keras = pytest.importorskip("keras", reason="needs keras, which comes with TensorFlow")
    from keras.src.legacy.saving import legacy_h5_format

    pixels = images(1)[:, :32, :32]
    for top in (True, False):
        theirs = keras.applications.VGG16(
            weights=None,
            include_top=top,
            input_shape=(32, 32, 3),
            classes=10,
            classifier_activation=None,
        )
        path, legacy = tmp_path / f"{top}.weights.h5", tmp_path / f"{top}.h5"
        theirs.save_weights(path)
        with h5py.File(legacy, "w") as file:
            legacy_h5_format.save_weights_to_hdf5_group(file, theirs)
        jax.tree.map(np.testing.assert_array_equal, read(path).params, read(legacy).params)
        assert (read(path).layout, read(legacy).layout) == ("keras 3", "keras")
        wanted = np.asarray(
            theirs(keras.applications.vgg16.preprocess_input(pixels.copy()), training=False)
        )
        model, variables, metadata = load(path)
        x = pixels - np.float32(metadata["preprocessing"]["mean_rgb"])
        if top:
            ours = forward(model, variables, x)
        else:
            ours = model.apply(variables, x, layers=("pool5",), method="features")["pool5"]
            assert "without fully connected layers" in metadata["source"]
        same(ours, wanted)


def test_flaxmodels_layout(tmp_path):
    tensors, path = by_hand("D"), tmp_path / "vgg16_weights.h5"
    with h5py.File(path, "w") as file:
        for name, (kernel, bias) in tensors.items():
            file[f"{name}/weight"] = in_rows(kernel, "HWIO" if kernel.ndim == 4 else "IHW O")
            file[f"{name}/bias"] = bias
    rows_back(
        path,
        "flaxmodels",
        {
            name: (in_rows(k, "HWIO" if k.ndim == 4 else "IHW O"), b)
            for name, (k, b) in tensors.items()
        },
    )
    same(logits(path), expected(tensors, MEAN, STD))


def caffe_messages():
    """NetParameter and its two kinds of layers, built from caffe.proto's field numbers by protobuf itself."""
    descriptor_pb2 = pytest.importorskip(
        "google.protobuf.descriptor_pb2", reason="needs protobuf, which comes with TensorFlow"
    )
    from google.protobuf import descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    one, many = kinds.LABEL_OPTIONAL, kinds.LABEL_REPEATED

    def message(name, *fields):
        added = file.message_type.add(name=name)
        for field, number, label, kind, packed in fields:
            new = added.field.add(name=field, number=number, label=label)
            if isinstance(kind, str):
                new.type, new.type_name = kinds.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                new.type = kind
            if packed:
                new.options.packed = True

    message("BlobShape", ("dim", 1, many, kinds.TYPE_INT64, True))
    sides = [
        (name, i, one, kinds.TYPE_INT32, False)
        for i, name in enumerate(("num", "channels", "height", "width"), 1)
    ]
    message(
        "BlobProto",
        *sides,
        ("data", 5, many, kinds.TYPE_FLOAT, True),
        ("shape", 7, one, "BlobShape", False),
    )
    text, number = kinds.TYPE_STRING, kinds.TYPE_INT32
    message(
        "V1LayerParameter",
        ("name", 4, one, text, False),
        ("type", 5, one, number, False),
        ("blobs", 6, many, "BlobProto", False),
    )
    message(
        "LayerParameter",
        ("name", 1, one, text, False),
        ("type", 2, one, text, False),
        ("blobs", 7, many, "BlobProto", False),
    )
    layers = (
        ("layers", 2, many, "V1LayerParameter", False),
        ("layer", 100, many, "LayerParameter", False),
    )
    message("NetParameter", ("name", 1, one, text, False), *layers)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("caffe.NetParameter"))


@pytest.mark.parametrize(
    ("encoding", "net"),
    [("V1", "D"), pytest.param("V1", "E", marks=pytest.mark.slow), ("new", "D")],
)
def test_caffes_layout(encoding, net, tmp_path):
    tensors, path = by_hand(net), tmp_path / "VGG_ILSVRC_layers.caffemodel"
    message = caffe_messages()(name="VGG_ILSVRC_layers")
    for name, arrays in tensors.items():
        layer = (
            message.layers.add(name=name, type=4)
            if encoding == "V1"
            else message.layer.add(name=name, type="Convolution")
        )
        for array in arrays:
            blob = layer.blobs.add(data=array.ravel())
            if encoding == "V1":
                blob.num, blob.channels, blob.height, blob.width = (1,) * (
                    4 - array.ndim
                ) + array.shape
            else:
                blob.shape.dim.extend(array.shape)
        (message.layers if encoding == "V1" else message.layer).add(
            name=name.replace("conv", "relu")
        )
    path.write_bytes(message.SerializeToString())
    rows_back(path, "caffe", tensors)
    assert read(path).net == net
    same(logits(path), expected(tensors, IMAGENET.mean_rgb, bgr=True))


@pytest.mark.parametrize(
    ("style", "net"),
    [("weights", "D"), pytest.param("weights", "E", marks=pytest.mark.slow), ("filters", "D")],
)
def test_matconvnets_layout(style, net, tmp_path):
    io = pytest.importorskip("scipy.io", reason="needs scipy")
    tensors, path = by_hand(net), tmp_path / "imagenet-vgg-verydeep.mat"
    layers, written = [], {}
    for name, (kernel, bias) in tensors.items():
        window = {"fc6": 2, "fc7": 1, "fc8": 1}.get(name)
        filters = (
            kernel if window is None else kernel.reshape(len(kernel), -1, window, window)
        ).transpose(2, 3, 1, 0)
        written[name] = filters, bias
        pair = np.empty((1, 2), object)
        pair[0, 0], pair[0, 1] = filters, bias[None]
        held = (
            {"weights": pair} if style == "weights" else {"filters": filters, "biases": bias[None]}
        )
        layers += [
            {"name": name, "type": "conv", **held},
            {"name": name.replace("conv", "relu"), "type": "relu"},
        ]
    cells = np.empty((1, len(layers)), object)
    for i, layer in enumerate(layers):
        cells[0, i] = layer
    normalization = {"normalization": {"averageImage": np.array([[[100.0, 110.0, 120.0]]])}}
    io.savemat(
        path,
        {"layers": cells, **({"meta": normalization} if style == "weights" else normalization)},
    )
    rows_back(path, "matconvnet", written)
    assert read(path).net == net
    assert read(path).preprocessing.mean_rgb == (100, 110, 120)
    same(logits(path), expected(tensors, (100, 110, 120)))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_there_and_back_is_bit_equal(layout):
    """Every row of every table, each number at its place: an index goes in, is moved, and comes back."""
    for row in tensor_table(layout, CONFIGS["C"], CLASSES, False, SIZE):
        array = np.arange(np.prod(row.shape)).reshape(row.shape)
        ours = row.from_foreign(array)
        assert ours.shape == row.our_shape
        np.testing.assert_array_equal(row.to_foreign(ours), array)


def test_all_differences_in_one_message(tmp_path):
    state = torchvision_file(by_hand("D"), "D")
    del state["features.5.bias"]
    state["features.7.weight"] = state["features.7.weight"][:100]
    state["extra"] = np.zeros(3, np.float32)
    save_file(state, tmp_path / "vgg.safetensors")
    with pytest.raises(InputError) as error:
        read(tmp_path / "vgg.safetensors")
    for words in (
        "D as torchvision has it",
        "features.5.bias (128,) is missing",
        "features.7.weight is (100, 128, 3, 3) instead of (128, 128, 3, 3)",
        "extra is too much",
    ):
        assert words in str(error.value)
    with pytest.raises(
        InputError,
        match=r"its names \(a\) are of no known layout: expected those of vgg_jax, torchvision",
    ):
        save_file({"a": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
        read(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"net is 'F': expected one of A, A-LRN"):
        read(tmp_path / "other.safetensors", "F")


def test_a_named_net_is_taken_at_its_word(tmp_path):
    save_file(torchvision_file(by_hand("A"), "A"), tmp_path / "vgg.safetensors")
    assert read(tmp_path / "vgg.safetensors", "A").net == "A"
    with pytest.raises(
        InputError,
        match=r"of D as torchvision has it.*features.28.weight \(512, 512, 3, 3\) is missing",
    ):
        read(tmp_path / "vgg.safetensors", "D")


def test_no_code_and_no_other_file_is_read(tmp_path):
    """Pickles, links and external storage."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"features.0.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"evil\.pth cannot be read as a PyTorch file"):
        read(tmp_path / "evil.pth")
    assert not marker.exists()

    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["kernel"] = np.zeros(3, np.float32)
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["conv1_1"] = h5py.ExternalLink("secret.h5", "/kernel")
    with h5py.File(tmp_path / "soft.h5", "w") as file:
        file["conv1_1"] = h5py.SoftLink("/elsewhere")
    (tmp_path / "raw").write_bytes(bytes(12))
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("conv1_1", (3,), "f4", external=[(str(tmp_path / "raw"), 0, 12)])
    layout = h5py.VirtualLayout((3,), "f4")
    layout[:] = h5py.VirtualSource("secret.h5", "kernel", (3,))
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("conv1_1", layout)
    other = "is stored in another file"
    for name, words in (
        ("link", "is a link"),
        ("soft", "is a link"),
        ("external", other),
        ("virtual", other),
    ):
        with pytest.raises(
            InputError, match=rf"conv1_1 {words}: expected the weights in the file itself"
        ):
            read(tmp_path / f"{name}.h5")


def test_a_pickle_is_refused_where_torch_is_not(tmp_path, monkeypatch):
    (tmp_path / "vgg.pth").write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        InputError, match=r"reading .*vgg\.pth needs torch: pip install torch, or convert it"
    ):
        read(tmp_path / "vgg.pth")


def test_a_pickle_is_refused_where_torch_is_old(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="needs torch")
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(
        InputError, match=r"needs torch 2\.10 or newer, and 2\.9\.1\+cpu is installed"
    ):
        read(tmp_path / "x.pth")


def test_imagenets_names_are_in_the_order_of_the_released_models():
    numbers = [name.split()[0] for name in imagenet.CLASSES]
    assert len(set(numbers)) == 1000
    assert numbers == sorted(numbers)
    assert [imagenet.CLASSES[i] for i in (0, 207, 999)] == [
        "n01440764 tench, Tinca tinca",
        "n02099601 golden retriever",
        "n15075141 toilet tissue, toilet paper, bathroom tissue",
    ]


def test_a_file_that_lies_about_itself(tmp_path):
    header = json.dumps(
        {"features.0.weight": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}
    ).encode()
    (tmp_path / "lie.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(InputError, match=r"lie\.safetensors cannot be read as a safetensors file"):
        read(tmp_path / "lie.safetensors")
    net = caffe_messages()()
    blob = net.layer.add(name="conv1_1").blobs.add(data=[1.0])
    blob.shape.dim.extend([2**20, 2**20])
    (tmp_path / "lie.caffemodel").write_bytes(net.SerializeToString())
    with pytest.raises(InputError, match=r"conv1_1 has the shape .* and 1 numbers"):
        read(tmp_path / "lie.caffemodel")
    for name, content in (
        ("empty.pth", b""),
        ("text.pth", b"hello, world"),
        ("cut.h5", b"\x89HDF\r\n\x1a\n"),
        ("zip.pth", b"PK\x03\x04"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=re.escape(name)):
            read(tmp_path / name)
    with pytest.raises(InputError, match="expected a file of weights, or a run's folder"):
        load(tmp_path / "nothing.pth")


def test_files_that_would_take_for_ever(tmp_path):
    """Groups that hold each other many times over, cells within cells, numbers that are nowhere, axes without end."""
    with h5py.File(tmp_path / "loops.h5", "w") as file:
        groups = [file.create_group(f"g{i}") for i in range(7)]
        for one, other in itertools.pairwise(groups):
            for i in range(30):
                one[f"l{i}"] = other
    with pytest.raises(InputError, match="more groups than a VGG"):
        read(tmp_path / "loops.h5")
    with h5py.File(tmp_path / "hollow.h5", "w") as file:
        for name, (kernel, bias) in by_hand("A").items():
            shape = (
                (25088, 4096)
                if name == "fc6"
                else (4096, FC[1])
                if name == "fc7"
                else in_rows(kernel, "HWIO").shape
            )
            file.create_dataset(f"{name}/weight", shape, "f4", chunks=True)
            file.create_dataset(
                f"{name}/bias", (4096,) if name == "fc6" else bias.shape, "f4", chunks=True
            )
    with pytest.raises(InputError, match=r"says that it holds 112,\d{3},\d{3} numbers in"):
        read(tmp_path / "hollow.h5")
    cells = b""
    for _ in range(20):  # a cell array of one cell, which holds the one before
        cells = element(14, array_head(CELL, (1, 1), b"layers") + cells)
    (tmp_path / "deep.mat").write_bytes(b"MATLAB".ljust(124) + b"\x00\x01IM" + cells)
    with pytest.raises(InputError, match="nested more than 12 deep"):
        read(tmp_path / "deep.mat")
    net = caffe_messages()()
    net.layer.add(name="conv1_1").blobs.add(data=[1.0]).shape.dim.extend([2] * 100_000)
    (tmp_path / "axes.caffemodel").write_bytes(net.SerializeToString())
    with pytest.raises(InputError, match="conv1_1 has 9 or more axes"):
        read(tmp_path / "axes.caffemodel")


def test_torchvisions_features_for_others(tmp_path):
    """IMAGENET1K_FEATURES: the authors' convolutions for the authors' images, and a classifier that is not a number."""
    state = torchvision_file(by_hand("D"), "D")
    state |= {
        name: np.full_like(array, np.nan)
        for name, array in state.items()
        if name.startswith("classifier")
    }
    save_file(state, tmp_path / "features.safetensors")
    weights = read(tmp_path / "features.safetensors")
    assert not weights.top
    assert weights.params.keys() == {name for name in by_hand("D") if name.startswith("conv")}
    np.testing.assert_allclose(weights.preprocessing.mean_rgb, (123, 117, 104), atol=0.01)
    np.testing.assert_array_equal(
        weights.variables["params"]["conv1_1"]["kernel"],
        state["features.0.weight"].transpose(2, 3, 1, 0),
    )


def test_matlab_values_are_those_that_scipy_reads(tmp_path):
    """Of every type, whole numbers that MATLAB would store as smaller ones, text, cells in columns, structures; packed and not."""
    io = pytest.importorskip("scipy.io", reason="needs scipy")
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 100, (3, 4, 2)).astype(kind) for kind in matconvnet.DTYPES.values()
    ] + [
        rng.normal(size=(1, 5)),
        np.zeros((0, 3)),
    ]
    cells = np.empty((2, 3), object)
    for i in range(6):
        cells[i % 2, i // 2] = np.float32(i)
    values = {f"x{i}": array for i, array in enumerate(arrays)} | {
        "text": "conv1_1",
        "cells": cells,
        "known": {"a": 1.5, "b": "two"},
    }
    values["of_another_kind"] = np.array([[1 + 2j]])
    for compressed in (False, True):
        io.savemat(tmp_path / "x.mat", values, do_compression=compressed)
        data = memoryview((tmp_path / "x.mat").read_bytes())[128:]
        ours, theirs = (
            dict(
                matconvnet._array(part, 1, iter(range(1000)))
                for part in matconvnet._unpacked(data, 10**6)
            ),
            io.loadmat(tmp_path / "x.mat"),
        )
        for name in (f"x{i}" for i in range(len(arrays))):
            assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape)
            np.testing.assert_array_equal(ours[name], theirs[name])
        assert ours["text"] == theirs["text"].item() == "conv1_1"
        assert (
            [value.item() for value in ours["cells"]]
            == [value.item() for value in theirs["cells"].ravel("F")]
            == [0, 1, 2, 3, 4, 5]
        )
        assert (ours["known"][0]["a"].item(), ours["known"][0]["b"], ours["of_another_kind"]) == (
            1.5,
            "two",
            None,
        )


CELL, STRUCT, TEXT, OPAQUE = 1, 2, 4, 17


def pack(*numbers):
    return struct.pack(f"<{len(numbers)}I", *numbers)


def element(kind, content):
    return pack(kind, len(content)) + content + bytes(-len(content) % 8)


def array_head(kind, sides, name=b""):
    return element(6, pack(kind, 0)) + element(5, pack(*sides)) + element(1, name)


def test_matlab_files_that_would_fill_the_memory(tmp_path):
    """Many compressed elements, each small enough by itself; and the other byte order, whose sizes are read wrongly."""
    io = pytest.importorskip("scipy.io", reason="needs scipy")
    io.savemat(
        tmp_path / "bomb.mat", {f"x{i}": np.zeros(10**5) for i in range(20)}, do_compression=True
    )
    with pytest.raises(InputError, match="unpacks to more than"):
        read(tmp_path / "bomb.mat")
    empty = element(14, array_head(CELL, (0, 0)))
    for what, array in {
        "an array of the sides": array_head(CELL, [2**30] * 250_000, b"meta"),
        "names, each of 1": array_head(STRUCT, (2000, 1), b"meta")
        + element(5, pack(1))
        + element(1, b""),
        "9,000 bytes of 1 letters": array_head(TEXT, (1, 1), b"meta") + element(1, bytes(9000)),
        "has more arrays than": array_head(CELL, (11, 1), b"meta")
        + 11 * element(14, array_head(CELL, (2000, 1)) + 2000 * element(14, b"")),
        "more arrays than a": array_head(6, (16_000, 1500), b"meta")
        + element(1, bytes(16_000 * 1500)),
        "more arrays than a VGG": array_head(CELL, (11, 1), b"meta")
        + 11 * element(14, array_head(CELL, (2000, 1)) + 2000 * empty),
    }.items():
        (tmp_path / "x.mat").write_bytes(b"MATLAB".ljust(124) + b"\x00\x01IM" + element(14, array))
        started = time.monotonic()
        with pytest.raises(InputError, match=what):
            read(tmp_path / "x.mat")
        assert time.monotonic() - started < 2
    assert matconvnet._array(
        memoryview(element(6, pack(OPAQUE, 0)) + element(1, b"string")), 1, iter(range(9))
    ) == ("", None)
    (tmp_path / "big.mat").write_bytes(b"MATLAB".ljust(124) + b"\x01\x00MI" + bytes(64))
    with pytest.raises(InputError, match="is big-endian"):
        read(tmp_path / "big.mat")


def test_a_file_of_an_old_pytorch(tmp_path):
    """It is read; one that names more numbers than it has is refused before there is memory for them."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    state = {
        name: torch.from_numpy(array) for name, array in torchvision_file(by_hand("A"), "A").items()
    }
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert read(path).net == "A"
    numbers = struct.pack("<cH", b"M", 3 * 64 * 9)
    content = path.read_bytes()
    assert numbers in content
    path.write_bytes(content.replace(numbers, struct.pack("<ci", b"J", 2**31 - 1), 1))
    with pytest.raises(InputError, match=r"names 2,147,483,647 numbers in [\d,]+ bytes"):
        read(path)


def test_tensors_that_want_a_gradient_and_such_without_numbers(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    state = torchvision_file(by_hand("A"), "A")
    torch.save(
        {name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in state.items()},
        tmp_path / "vgg.pth",
    )
    assert read(tmp_path / "vgg.pth").net == "A"
    torch.save(
        {name: torch.empty(array.shape, device="meta") for name, array in state.items()},
        tmp_path / "meta.pth",
    )
    with pytest.raises(InputError, match="is no plain tensor"):
        read(tmp_path / "meta.pth")


def test_a_run_keeps_its_way_of_being_tested(tmp_path, monkeypatch):
    """Q, mirror images and EXIF, and float32 whatever it was trained in, as a file."""
    save_file(torchvision_file(by_hand("A"), "A"), tmp_path / "vgg.safetensors")
    model, variables, metadata = load(tmp_path / "vgg.safetensors")
    assert (
        metadata["preprocessing"]["scale"],
        metadata["flip"],
        metadata["preprocessing"]["exif"],
    ) == (73, True, True)
    metadata["preprocessing"] |= {"scale": 70, "exif": False}
    run = model.clone(dtype=jax.numpy.bfloat16), variables, metadata | {"flip": False}
    monkeypatch.setattr("vgg_jax.runs.checkpoint.load_best", lambda _: run)
    weights = read(tmp_path)
    assert weights.model.dtype == np.float32
    save(tmp_path / "run.safetensors", weights)
    _, _, found = load(tmp_path / "run.safetensors")
    assert (found["preprocessing"]["scale"], found["flip"], found["preprocessing"]["exif"]) == (
        70,
        False,
        False,
    )


def test_the_command_imports_and_checks(tmp_path, capsys):
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    state = torchvision_file(by_hand("A", batch_norm=True), "A", batch_norm=True)
    save_file(state, tmp_path / "vgg.safetensors")
    assert (
        cli.main(
            [
                "import",
                str(tmp_path / "vgg.safetensors"),
                str(tmp_path / "ours.safetensors"),
                "--check",
                "torch",
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "A with batch normalisation in torchvision's layout, deviation (58.395, 57.120, 57.375) to be divided into conv1_1"
        in out
    )
    assert "bn5_2" in out
    assert "largest difference from PyTorch" in out
    state["features.0.weight"][0, 0, 0, 0] = np.nan
    save_file(state, tmp_path / "nan.safetensors")
    assert (
        cli.main(
            [
                "import",
                str(tmp_path / "nan.safetensors"),
                str(tmp_path / "ours.safetensors"),
                "--check",
                "torch",
            ]
        )
        == 1
    )


@pytest.mark.parametrize(
    "name", ["vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"]
)
def test_torchvision_itself(name, tmp_path):
    """All eight of its nets, with a head for 64 pixels."""
    torchvision = pytest.importorskip(
        "torchvision", reason="needs torchvision", exc_type=(ImportError, RuntimeError)
    )
    from torch import nn

    theirs = getattr(torchvision.models, name)(weights=None, num_classes=CLASSES)
    theirs.avgpool = nn.Identity()
    theirs.classifier[0], theirs.classifier[3] = nn.Linear(512 * 4, 64), nn.Linear(64, 32)
    theirs.classifier[6] = nn.Linear(32, CLASSES)
    goes_in_and_back("torchvision", theirs, images(), tmp_path)


@pytest.mark.parametrize("name", ["vgg11_bn", "vgg16"])
def test_timm_itself(name, tmp_path):
    timm = pytest.importorskip("timm", reason="needs timm", exc_type=(ImportError, RuntimeError))
    goes_in_and_back(
        "timm",
        timm.create_model(name, pretrained=False, num_classes=CLASSES),
        images(1, 224),
        tmp_path,
    )


def goes_in_and_back(library, theirs, pixels, tmp_path):
    """Its file gives its logits here, and its own loader takes ours back, bit-equal."""
    import torch

    theirs.eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(theirs.state_dict(), tmp_path / "vgg.pth")
    model, variables, metadata = load(tmp_path / "vgg.pth")
    ours = forward(model, variables, pixels - np.float32(metadata["preprocessing"]["mean_rgb"]))
    with torch.inference_mode():
        wanted = theirs(
            torch.from_numpy(
                ((pixels - np.float32(MEAN)) / np.float32(STD)).transpose(0, 3, 1, 2).copy()
            )
        ).numpy()
    same(ours, wanted)
    save(tmp_path / "back.safetensors", read(tmp_path / "vgg.pth"), library)
    back = {
        key: torch.from_numpy(array)
        for key, array in load_file(tmp_path / "back.safetensors").items()
    }
    for key, value in theirs.state_dict().items():
        assert "num_batches_tracked" in key or torch.equal(back[key], value)
    theirs.load_state_dict(back, strict=True)
