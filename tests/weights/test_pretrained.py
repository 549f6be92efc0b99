"""Published weights by name: the table, the caches, and what commands do with a name."""

import hashlib
import importlib.util
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

import vgg_jax
from tests.helpers.caches import CONTENT, small_entry, use_caches
from tests.helpers.export_files import random_weights
from tests.helpers.tiny import narrow
from tests.helpers.weights_files import (
    FC,
    IMAGE_SIZE,
    NUM_CLASSES,
    random_tensors,
    reorder_kernel,
)
from vgg_jax import CONFIGS, InputError, VGGConfig, cli
from vgg_jax.summary import summarize, totals
from vgg_jax.weights import save
from vgg_jax.weights.fetch import resolve
from vgg_jax.weights.layouts import LAYOUTS, tensor_table
from vgg_jax.weights.pretrained import (
    WEIGHTS,
    Digest,
    caches,
    find_cached,
    lookup,
    own_file,
    similar_names,
)

# No digest and no size of it is known, so a small file can stand for it.
UNCHECKED = "timm/vgg11_bn.tv_in1k"
# torchvision's documentation.
PARAMS = {
    "torchvision/vgg11": 132_863_336,
    "torchvision/vgg11_bn": 132_868_840,
    "torchvision/vgg13": 133_047_848,
    "torchvision/vgg13_bn": 133_053_736,
    "torchvision/vgg16": 138_357_544,
    "torchvision/vgg16_features": 138_357_544,
    "torchvision/vgg16_bn": 138_365_992,
    "torchvision/vgg19": 143_667_240,
    "torchvision/vgg19_bn": 143_678_248,
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    use_caches(monkeypatch, tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture
def weight_file(tmp_path, monkeypatch):
    """Net A with batch normalisation in timm's names. It has few channels."""
    monkeypatch.setitem(CONFIGS, "A", narrow("A"))
    save(tmp_path / "net.safetensors", random_weights("A", batch_norm=True), "timm")
    return tmp_path / "net.safetensors"


def snapshot(home, entry, commit, content=CONTENT):
    """A file in the cache of Hugging Face, as its client lays it out."""
    folder = home / "HF_HOME" / "hub" / f"models--{entry.repository.replace('/', '--')}"
    blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
    link = folder / "snapshots" / commit / entry.file
    for path in (blob, link):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return link


def in_cache(path, content=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_table_is_whole():
    assert len(WEIGHTS) == 9 + 8 + 2 + 4 + 4
    for name, entry in WEIGHTS.items():
        assert entry.name == name
        assert entry.net in CONFIGS
        assert entry.url.startswith(("https://", "http://www.robots.ox.ac.uk/"))
        params = totals(summarize(CONFIGS[entry.net], batch_norm=entry.batch_norm))["params"]
        if name in PARAMS:
            assert params == PARAMS[name]
        if entry.top and entry.megabytes:
            # The buffers of batch normalisation and the container come on top.
            assert abs(entry.megabytes - 4 * params / 1e6) < 1.1
        if entry.size:
            assert round(entry.size / 1e6) == entry.megabytes
        if entry.digest:
            digits = entry.digest.digits
            assert re.fullmatch("[0-9a-f]+", digits)
            length = 2 * hashlib.new(entry.digest.algorithm).digest_size
            assert len(digits) in (8, length)
        if entry.url.startswith("http:"):
            assert entry.digest.is_strong
        if name.startswith("torchvision/"):
            assert entry.digest.digits[:8] == re.search(r"-(\w{8})\.pth", entry.url)[1]


def library_source(library, file):
    """A file of an installed library, which is not imported."""
    spec = importlib.util.find_spec(library)
    if spec is None:
        pytest.skip(f"needs {library}")
    return (Path(spec.origin).parent / file).read_text()


def test_table_matches_torchvision():
    source = library_source("torchvision", "models/vgg.py")
    for name, params in PARAMS.items():
        entry = WEIGHTS[name]
        theirs = source.partition(f'url="{entry.url}"')[2].partition("url=")[0]
        size = float(re.search(r'"_file_size": ([\d.]+)', theirs)[1])
        assert entry.megabytes == round(size * 2**20 / 1e6)
        if entry.top:
            assert int(re.search(r'"num_params": (\w+)', theirs)[1]) == params
            assert f'"acc@1": {entry.top1:.3f},' in theirs
            assert f'"acc@5": {entry.top5:.3f},' in theirs
        else:
            assert theirs.count('float("nan")') == 2


@pytest.mark.parametrize("depth", [16, 19])
def test_table_matches_keras(depth):
    """Its functions pass URL and MD5 to `get_file`, whose file lies in models/."""
    source = library_source("keras", f"src/applications/vgg{depth}.py")
    text = re.sub(r'"\s*\n\s*"', "", source)
    for name in (f"keras/vgg{depth}", f"keras/vgg{depth}_notop"):
        entry = WEIGHTS[name]
        assert f'"{entry.url}"' in text
        call = text[text.index(f'"{entry.file}"') :].partition(")")[0]
        assert 'cache_subdir="models"' in call
        assert f'file_hash="{entry.digest.digits}"' in call


def test_caches_are_where_the_libraries_have_them(home, monkeypatch):
    for name in ("VGG_JAX_CACHE", "TORCH_HOME", "HF_HOME", "KERAS_HOME"):
        monkeypatch.delenv(name)
    xdg, user = home / "XDG_CACHE_HOME", Path.home()
    assert caches() == {
        "vgg_jax": xdg / "vgg_jax" / "weights",
        "torch": xdg / "torch" / "hub" / "checkpoints",
        "Hugging Face": xdg / "huggingface" / "hub",
        "Keras": user / ".keras" / "models",
    }
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert caches()["torch"] == user / ".cache" / "torch" / "hub" / "checkpoints"
    monkeypatch.setenv("TORCH_HOME", "~/elsewhere")
    assert caches()["torch"] == user / "elsewhere" / "hub" / "checkpoints"
    monkeypatch.setenv("HF_HUB_CACHE", "/hub")
    assert caches()["Hugging Face"] == Path("/hub")


@pytest.mark.parametrize("cache", ["VGG_JAX_CACHE", "torch", "Keras"])
def test_finds_file_in_each_cache(cache, home):
    entry = small_entry()
    path = own_file(entry) if cache == "VGG_JAX_CACHE" else caches()[cache] / entry.file
    assert find_cached(entry) == (None, [])
    in_cache(path)
    assert find_cached(entry) == (path, [])


def test_finds_snapshot_of_hugging_face(home):
    entry = small_entry(f"https://huggingface.co/timm/net/resolve/{'c' * 40}/model.safetensors")
    newer = snapshot(home, entry, "a" * 40, CONTENT[::-1])
    cached = find_cached(entry)
    assert cached.path is None
    assert f"{newer} has sha256" in cached.rejected[0]
    path = snapshot(home, entry, "c" * 40)
    assert find_cached(entry) == (path, [])


def test_newest_snapshot_counts_without_a_commit(home):
    entry = small_entry(
        "https://huggingface.co/timm/net/resolve/main/model.safetensors", size=None, digest=None
    )
    snapshot(home, entry, "a" * 40)
    path = snapshot(home, entry, "b" * 40, CONTENT[::-1])
    refs = path.parents[2] / "refs"
    refs.mkdir()
    (refs / "main").write_text("b" * 40)
    assert find_cached(entry).path == path


def test_rejects_wrong_file_and_takes_the_next(home):
    entry = small_entry()
    path = in_cache(own_file(entry), CONTENT[:-1])
    assert find_cached(entry) == (None, [f"{path} has 1,279,999 bytes, not 1,280,000"])
    in_cache(path, CONTENT[::-1])
    cached = find_cached(entry)
    assert cached.path is None
    digests = [hashlib.sha256(content).hexdigest() for content in (CONTENT[::-1], CONTENT)]
    assert cached.rejected == [f"{path} has sha256 {digests[0][:16]}…, not {digests[1][:16]}…"]
    torch = in_cache(caches()["torch"] / entry.file)
    assert find_cached(entry) == (torch, cached.rejected)


@pytest.mark.parametrize("digits", [8, 64])
def test_digest_may_be_cut(digits):
    digest = Digest("sha256", hashlib.sha256(CONTENT).hexdigest()[:digits])
    entry = small_entry(digest=digest)
    path = in_cache(own_file(entry))
    assert find_cached(entry).path == path
    assert str(digest) == ("sha256" if digits == 64 else "first 8 digits of sha256")
    changed = bytearray(CONTENT)
    changed[0] += 1
    in_cache(path, bytes(changed))
    assert find_cached(entry).path is None


def test_file_is_hashed_once():
    """Until its size or its time changes. A change that keeps both shows that nothing was read."""
    entry = small_entry()
    path = in_cache(own_file(entry))
    assert find_cached(entry).path == path
    time = path.stat().st_mtime_ns
    path.write_bytes(CONTENT[::-1])
    os.utime(path, ns=(time, time))
    assert find_cached(entry).path == path
    os.utime(path, ns=(time, time + 1))
    assert find_cached(entry).path is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"/": 3}', b"\xff", b"[" * 100_000])
def test_damaged_memory_of_digests_is_ignored(content, home):
    entry = small_entry()
    path = in_cache(own_file(entry))
    memory = in_cache(home / "VGG_JAX_CACHE" / "weights" / "digests.json", content)
    assert find_cached(entry).path == path
    assert str(path) in json.loads(memory.read_text())


def test_cache_that_cannot_be_written_to(home, monkeypatch):
    entry = small_entry()
    path = in_cache(caches()["torch"] / entry.file)
    in_cache(home / "file")
    monkeypatch.setenv("VGG_JAX_CACHE", str(home / "file"))
    assert find_cached(entry).path == path


def test_real_file_that_is_not_the_published_one(shared_data, home):
    """The authors' convolutions in Keras' layout, but another file than Keras'."""
    entry = WEIGHTS["keras/vgg16_notop"]
    path = home / "KERAS_HOME" / "models" / entry.file
    path.parent.mkdir(parents=True)
    path.symlink_to(shared_data / "vgg16-oxford" / entry.file)
    with pytest.raises(InputError, match=r"md5 6e9fcfaace808dff…, not 6d6bbae143d83200…"):
        vgg_jax.load(entry.name)


def test_message_without_a_file():
    with pytest.raises(InputError) as error:
        vgg_jax.load("torchvision/vgg16")
    message = str(error.value)
    assert "`vgg-jax fetch torchvision/vgg16`" in message
    assert "gets 553 MB from https://download.pytorch.org/models/vgg16-397923af.pth" in message
    assert len(message) <= 300
    for name in WEIGHTS:
        with pytest.raises(InputError) as error:
            resolve(name)
        assert len(str(error.value)) <= 360, name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("torchvision/vgg17", "torchvision/vgg11, torchvision/vgg11_bn"),
        ("timm/vgg16", "timm/vgg16.tv_in1k"),
        ("Torchvision/VGG16", "torchvision/vgg16"),
        ("keras/vgg16.h5", "keras/vgg16, keras/vgg16_notop"),
        ("vgg16", "torchvision/vgg16, torchvision/vgg16_bn"),
        ("torchvison/vgg16", "torchvision/vgg16"),
    ],
)
def test_similar_name(name, expected):
    with pytest.raises(InputError, match=f"there is no file '{name}', and no .*{expected}"):
        vgg_jax.load(name)
    with pytest.raises(InputError, match=f"no weights are named '{name}': expected .*{expected}"):
        lookup(name)


@pytest.mark.parametrize("path", ["vgg16.safetensors", "runs/digits-A", "A", "models/vgg16.pth"])
def test_path_is_not_similar_to_a_name(path):
    assert similar_names(path) == []
    with pytest.raises(InputError, match=r"no such file|No such file|no file"):
        vgg_jax.load(path)


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_path_goes_before_name(kind, weight_file, home):
    """Also a folder that is no run, and a link that leads nowhere."""
    path = home / "work" / UNCHECKED
    path.parent.mkdir()
    in_cache(own_file(WEIGHTS[UNCHECKED]), weight_file.read_bytes())
    if kind == "file":
        save(home / "plain.safetensors", random_weights("A"), "timm")
        (home / "plain.safetensors").rename(path)
        assert not vgg_jax.load(UNCHECKED)[0].batch_norm
        return
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")
    with pytest.raises(InputError, match=r"no run in|No such file"):
        vgg_jax.load(UNCHECKED, download=True)


def test_load_by_name(weight_file, home):
    snapshot(home, WEIGHTS[UNCHECKED], "a" * 40, weight_file.read_bytes())
    model, variables, metadata = vgg_jax.load(UNCHECKED)
    expected = vgg_jax.load(weight_file)[1]
    assert model.batch_norm and model.config.stages == CONFIGS["A"].stages
    assert metadata["path"] == UNCHECKED
    for layer, params in expected["params"].items():
        for name, array in params.items():
            np.testing.assert_array_equal(variables["params"][layer][name], array)
    assert vgg_jax.weights.read(UNCHECKED).net == "A"


def test_keras_hub_needs_no_preprocessing_by_name(home, tmp_path):
    """Its file by itself does not tell, even if its JSON files are absent."""
    h5py = pytest.importorskip("h5py", reason="needs h5py")
    tensors = random_tensors("A")
    config = VGGConfig(CONFIGS["A"].stages, FC)
    table = tensor_table(LAYOUTS["keras 3"], config, NUM_CLASSES, False, IMAGE_SIZE)
    arrays = [array for layer in tensors.values() for array in layer]
    path = own_file(WEIGHTS["keras/vgg_11_imagenet"])
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        for mapping, array in zip(table, arrays, strict=True):
            if array.ndim > 1:
                array = reorder_kernel(array, "HWIO", "HWI O")
            file[mapping.foreign_name] = array
    with pytest.raises(InputError, match="KerasHub"):
        vgg_jax.load(path)
    metadata = vgg_jax.load("keras/vgg_11_imagenet")[2]
    np.testing.assert_allclose(metadata["preprocessing"]["mean_rgb"], (123.675, 116.28, 103.53))


def test_commands_take_a_name(weight_file, home, capsys):
    in_cache(own_file(WEIGHTS[UNCHECKED]), weight_file.read_bytes())
    assert cli.main(["summary", UNCHECKED]) == 0
    assert "bn1_1" in capsys.readouterr().out
    assert cli.main(["import", UNCHECKED, "imported.safetensors"]) == 0
    assert capsys.readouterr().out.startswith("wrote imported.safetensors")
    assert cli.main(["export", UNCHECKED, "exported.safetensors"]) == 0
    for name in ("imported", "exported"):
        assert vgg_jax.load(f"{name}.safetensors")[0].batch_norm
    for command, *others in (
        ("summary",),
        ("evaluate", "PHOTOS"),
        ("predict", "photo.jpg"),
        ("export", "x.safetensors"),
        ("import", "x.safetensors"),
    ):
        assert cli.main([command, "torchvision/vgg16", *others]) == 2
        error = capsys.readouterr().err
        assert error.startswith("vgg-jax: torchvision/vgg16 is not here"), command
        assert error.count("\n") == 1
    assert sorted(os.listdir()) == ["exported.safetensors", "imported.safetensors"]


@pytest.mark.parametrize("name", ["timm/vgg13.tv_in1k", "keras/vgg_16_imagenet"])
def test_rounded_size(name, home):
    """No digest of these is known. A file of some bytes is not taken for one of many megabytes."""
    entry = WEIGHTS[name]
    assert entry.size is None and entry.digest is None
    path = own_file(entry)
    in_cache(path)
    with pytest.raises(InputError, match=rf"has [\d,]+ bytes, not about {entry.megabytes} MB"):
        resolve(name)
    convolutions = {"timm/vgg13.tv_in1k": 133_047_848, "keras/vgg_16_imagenet": 14_714_688}
    os.truncate(path, 4 * convolutions[name] + 40_000)  # float32, and their names
    assert resolve(name) == (path, entry)
    os.truncate(path, 4 * convolutions[name] - 2_000_000)
    with pytest.raises(InputError, match=rf"not about {entry.megabytes} MB"):
        resolve(name)


def test_weights_command(home, capsys):
    for name in ("vgg11", "vgg13", "vgg16"):
        in_cache(caches()["torch"] / WEIGHTS[f"torchvision/{name}"].file)
    # The size of the first is known in megabytes. The two others keep another size.
    os.truncate(caches()["torch"] / WEIGHTS["torchvision/vgg11"].file, 531_456_000)
    snapshot(home, WEIGHTS[UNCHECKED], "a" * 40)
    assert cli.main(["weights"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines[: len(WEIGHTS) + 1])) <= 110
    table = {line.split()[0]: line for line in lines[1 : len(WEIGHTS) + 1]}
    assert table.keys() == WEIGHTS.keys()
    starts = {name: lines[0].index(name) for name in ("net", "source", "licence", "cached")}
    for name, line in table.items():
        for start in starts.values():
            assert line[start - 1] == " " and line[start] != " ", name
    assert re.search(r"  69\.02  88\.63  531  BSD-3 +torch$", table["torchvision/vgg11"])
    assert re.search(r"  69\.93  89\.25  532  BSD-3 +-$", table["torchvision/vgg13"])
    assert re.search(r"  71\.59  90\.38  553  BSD-3 +-$", table["torchvision/vgg16"])
    assert table[UNCHECKED].endswith("  Hugging Face")
    assert cli.main(["weights", "--json"]) == 0
    rows = {row["name"]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert rows["torchvision/vgg11"]["cached"] == [
        str(home / "TORCH_HOME" / "hub" / "checkpoints" / "vgg11-8a719046.pth")
    ]
    assert rows["oxford/vgg16"]["digest"]["algorithm"] == "sha256"
    assert rows["timm/vgg13.tv_in1k"]["digest"] is None
