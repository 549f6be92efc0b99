"""Damaged, hostile and unusual files in each format."""

import errno
import itertools
import json
import mmap
import re
import struct
import sys

import h5py
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.helpers.weights_files import FC, random_tensors, reorder_kernel, torchvision_state
from vgg_jax import InputError
from vgg_jax.weights import load, read
from vgg_jax.weights.formats import open_file
from vgg_jax.weights.memory import copy_for_jax


class OpensFile:
    """A pickled object that opens a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pytorch_runs_no_code(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    torch.save({"features.0.weight": OpensFile(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match=r"evil\.pth holds a Python object, io\.open, and"):
        read(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_pytorch_needs_torch(tmp_path, monkeypatch):
    (tmp_path / "vgg.pth").write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        InputError, match=r"reading .*vgg\.pth needs torch: pip install torch, or convert it"
    ):
        read(tmp_path / "vgg.pth")


def test_pytorch_needs_new_torch(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="needs torch")
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.pth")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(
        InputError, match=r"needs torch 2\.10 or newer: torch 2\.9\.1\+cpu is installed"
    ):
        read(tmp_path / "x.pth")


def test_pytorch_legacy_file(tmp_path):
    """It is read, but not if it names more numbers than it has."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    arrays = torchvision_state(random_tensors("A"), "A")
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert read(path).net == "A"
    size = struct.pack("<cH", b"M", 3 * 64 * 9)
    content = path.read_bytes()
    assert size in content
    path.write_bytes(content.replace(size, struct.pack("<ci", b"J", 2**31 - 1), 1))
    with pytest.raises(InputError, match=r"claims 2,147,483,647 values in [\d,]+ bytes"):
        read(path)


def test_pytorch_parameters_and_meta_tensors(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    state = torchvision_state(random_tensors("A"), "A")
    torch.save(
        {name: torch.nn.Parameter(torch.from_numpy(array)) for name, array in state.items()},
        tmp_path / "vgg.pth",
    )
    assert read(tmp_path / "vgg.pth").net == "A"
    torch.save(
        {name: torch.empty(array.shape, device="meta") for name, array in state.items()},
        tmp_path / "meta.pth",
    )
    with pytest.raises(InputError, match="is not a plain tensor"):
        read(tmp_path / "meta.pth")


def test_hdf5_rejects_other_files(tmp_path):
    """Links, external storage and virtual datasets."""
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
    for name, words in (
        ("link", "is a link"),
        ("soft", "is a link"),
        ("external", "is stored in another file"),
        ("virtual", "is stored in another file"),
    ):
        with pytest.raises(
            InputError, match=rf"conv1_1 {words}: expected the weights in the file itself"
        ):
            read(tmp_path / f"{name}.h5")


def test_hdf5_rejects_repeated_groups(tmp_path):
    """Seven groups, each with 30 links to the next."""
    with h5py.File(tmp_path / "loops.h5", "w") as file:
        groups = [file.create_group(f"g{i}") for i in range(7)]
        for group, linked in itertools.pairwise(groups):
            for i in range(30):
                group[f"l{i}"] = linked
    with pytest.raises(InputError, match="more groups than a VGG"):
        read(tmp_path / "loops.h5")


def test_hdf5_rejects_absent_numbers(tmp_path):
    """Chunked datasets of which no chunk is in the file."""
    with h5py.File(tmp_path / "hollow.h5", "w") as file:
        for name, (kernel, bias) in random_tensors("A").items():
            kernel_shape = reorder_kernel(kernel, "HWIO", "HWI O").shape
            bias_shape = bias.shape
            if name == "fc6":
                kernel_shape, bias_shape = (25088, 4096), (4096,)
            elif name == "fc7":
                kernel_shape = (4096, FC[1])
            file.create_dataset(f"{name}/weight", kernel_shape, "f4", chunks=True)
            file.create_dataset(f"{name}/bias", bias_shape, "f4", chunks=True)
    with pytest.raises(InputError, match=r"claims 112,\d{3},\d{3} values in"):
        read(tmp_path / "hollow.h5")


def test_safetensors_with_header_of_any_length(tmp_path):
    """The low byte of a header's length is a multiple of 8, for one file in 32 a pickle's 0x80."""
    low_bytes = set()
    for padding in range(0, 256, 8):
        path = tmp_path / f"{padding}.safetensors"
        save_file({"weight": np.ones(3, np.float32)}, path, {"padding": padding * "x"})
        low_bytes.add(path.read_bytes()[0])
        assert open_file(path).tensors["weight"].read().tolist() == [1, 1, 1]
    assert low_bytes == set(range(0, 256, 8))


def test_safetensors_equal_the_library(tmp_path):
    """Float32 values are read without the library."""
    path = tmp_path / "net.safetensors"
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 5), "b": (), "c": (0, 4), "d": (257,)}
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    save_file(arrays | {"e": np.ones((2, 3), np.float16)}, path)
    expected = load_file(path)
    for name, tensor in open_file(path).tensors.items():
        np.testing.assert_array_equal(tensor.read(), expected[name], strict=True)


@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4), (2**21, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ">f4"])
def test_copy_for_jax(shape, dtype):
    """The copy has memory of its own, and on a CPU, jax takes that memory as it is."""
    array = np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype).T
    copy = copy_for_jax(array, np.float32)
    np.testing.assert_array_equal(copy, array.astype(np.float32), strict=True)
    assert copy.flags.c_contiguous and not np.shares_memory(copy, array)
    if copy.size and jax.default_backend() == "cpu":
        placed = jax.device_put(copy, jax.devices()[0])
        assert placed.unsafe_buffer_pointer() == copy.ctypes.data


def test_copy_without_memory(tmp_path, monkeypatch):
    """Too little memory is no damaged file."""

    map_memory = mmap.mmap

    def refuse(file, *args, **settings):
        if file == -1:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return map_memory(file, *args, **settings)

    path = tmp_path / "net.safetensors"
    save_file(torchvision_state(random_tensors("A"), "A"), path)
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(InputError, match="more data than fits into memory"):
        read(path)


def test_name_with_line_break(tmp_path, caplog):
    """A message is one line, whatever the names are."""
    state = torchvision_state(random_tensors("A"), "A")
    path = tmp_path / "net.safetensors"
    save_file(state | {"classifier.7\nweight": np.ones(3)}, path)
    read(path)
    save_file({f"net.{name}": array for name, array in state.items()} | {"a\nb": np.ones(3)}, path)
    read(path)
    messages = [record.getMessage() for record in caplog.records]
    assert any("classifier.7 weight" in message for message in messages)
    assert any("left out: a b" in message for message in messages)
    assert not any("\n" in message for message in messages)
    del state["features.0.weight"]
    save_file(state | {"features.30\nweight": np.ones(3)}, path)
    with pytest.raises(InputError, match=r"unexpected tensor features\.30 weight"):
        read(path)


def test_safetensors_rejects_false_size(tmp_path):
    entry = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}
    header = json.dumps({"features.0.weight": entry}).encode()
    (tmp_path / "lie.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(InputError, match=r"lie\.safetensors cannot be read as a safetensors file"):
        read(tmp_path / "lie.safetensors")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pth", b""),
        ("text.pth", b"hello, world"),
        ("cut.h5", b"\x89HDF\r\n\x1a\n"),
        ("zip.pth", b"PK\x03\x04"),
    ],
)
def test_open_file_rejects_damaged(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(name)):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "lfs.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 553432081\n",
            r"a pointer of Git LFS, .*\(git lfs pull gets them\)",
        ),
        (
            "model.safetensors.index.json",
            b'{"metadata": {}}',
            "is JSON text: expected a .safetensors",
        ),
        ("page.pth", b"<!DOCTYPE html><html>", "a web page, perhaps of a failed download"),
    ],
)
def test_open_file_names_likely_cause(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_open_file_rejects_damaged_keras(tmp_path):
    """The message does not ask for PyTorch, which reads the other archives."""
    (tmp_path / "cut.keras").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(InputError, match=r"cut\.keras cannot be read as a Keras file \(BadZipFile"):
        read(tmp_path / "cut.keras")


def test_open_file_rejects_npz(tmp_path):
    np.savez(tmp_path / "net.npz", conv1_1=np.ones(3))
    with pytest.raises(InputError, match=r"NumPy arrays \(.npz\), .*safetensors.numpy.save_file"):
        read(tmp_path / "net.npz")


def test_open_file_rejects_missing(tmp_path):
    with pytest.raises(InputError, match="expected a file of weights, or a run's folder"):
        load(tmp_path / "nothing.pth")
