"""Exit codes and output of the commands."""

import dataclasses
import json
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import vgg_jax
from tests.helpers.weights_files import random_tensors, torchvision_state
from vgg_jax import cli
from vgg_jax.cli.commands import default_workdir, slugify
from vgg_jax.evaluation.evaluate import Evaluation, format_errors
from vgg_jax.runtime.compilation_cache import enable_compilation_cache

REFERENCE = Path(__file__).parents[1] / "reference"


def run_cli(capsys, *argv):
    """Returns the exit code, and the text printed to stdout and stderr."""
    try:
        code = cli.main(argv)
    except SystemExit as error:  # argparse raises it
        code = error.code
    return code, *capsys.readouterr()


def test_summary_matches_torchsummary(capsys):
    code, out, _ = run_cli(capsys, "summary", "D", "--batch-norm")
    assert code == 0
    assert "Total params: 138,365,992" in out
    for size in ("0.57", "321.95", "527.82", "850.35"):
        assert f"(MB): {size}" in out


@pytest.mark.slow
def test_summary_predicts_step_memory(capsys):
    sizes = ("--image-size", "32", "--num-classes", "10", "--batch-size", "4")
    code, out, _ = run_cli(capsys, "summary", "A", *sizes)
    assert code == 0
    assert "A training step of 4 images takes 0." in out
    assert "0.23 GB for parameters and momentum" in out  # 28.1 million, twice, 4 bytes each
    _, out, _ = run_cli(capsys, "summary", "A", *sizes, "--optimizer", "adamw")
    assert "0.34 GB for parameters and the moments of AdamW" in out
    code, out, err = run_cli(capsys, "summary", "A", "--batch-size", "4", "--microbatch", "3")
    assert code == 2
    assert "microbatch is 3: expected a divisor of the batch size, 4" in err


def test_summary_rejects_microbatch_without_batch(capsys):
    code, _, err = run_cli(capsys, "summary", "A", "--microbatch", "3")
    assert code == 2
    assert "microbatch is 3: expected --batch-size" in err


def test_summary_of_custom_fc(capsys):
    code, out, _ = run_cli(capsys, "summary", "A", "--fc", "10", "20", "--num-classes", "3")
    assert code == 0
    fc = 7 * 7 * 512 * 10 + 10 + 10 * 20 + 20 + 20 * 3 + 3
    assert f"Total params: {9_220_480 + fc:,}\n" in out  # the convolutions' by the paper's Table 2


@pytest.mark.usefixtures("small_nets")
def test_summary_of_run_and_weights(capsys, tmp_path):
    with zipfile.ZipFile(REFERENCE / "run-0.1.0.zip") as file:
        file.extractall(tmp_path)
    for path in (tmp_path / "run", REFERENCE / "weights-0.1.0.safetensors"):
        code, out, _ = run_cli(capsys, "summary", str(path))
        assert code == 0
        arrays = jax.tree.leaves(vgg_jax.load(path)[1]["params"])
        assert f"Total params: {sum(array.size for array in arrays):,}\n" in out
    code, _, err = run_cli(capsys, "summary", str(path), "--num-classes", "3")
    assert code == 2
    assert "--num-classes" in err and "weights-0.1.0.safetensors" in err


def test_summary_of_weights_without_fc(capsys, tmp_path):
    state = torchvision_state(random_tensors("A"), "A")
    convolutions = {name: array for name, array in state.items() if "features" in name}
    save_file(convolutions, tmp_path / "convolutions.safetensors")
    code, out, err = run_cli(capsys, "summary", str(tmp_path / "convolutions.safetensors"))
    assert code == 0, err
    assert "Total params: 9,220,480\n" in out  # of the paper's convolutions
    assert "pool5" in out and "fc6" not in out


@pytest.mark.slow
def test_commands_on_weights_of_grey_images(capsys, tmp_path):
    """`summary` and `export` know them; `predict` reads RGB photos and says so."""
    save_file(torchvision_state(random_tensors("A"), "A"), tmp_path / "rgb.safetensors")
    model, variables, metadata = vgg_jax.load(tmp_path / "rgb.safetensors")
    grey, exported = tmp_path / "grey.safetensors", tmp_path / "exported.safetensors"
    vgg_jax.save(grey, *vgg_jax.with_in_channels(model, variables, 1), metadata)
    code, out, err = run_cli(capsys, "summary", str(grey))
    assert code == 0, err
    params = sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) - 2 * 9 * 64
    assert f"Total params: {params:,}\n" in out
    code, _, err = run_cli(capsys, "summary", str(grey), "--batch-size", "2")
    assert code == 2
    assert "in_channels is 1: expected no --batch-size with it" in err
    for command in (("export", str(grey), str(exported)), ("verify", str(exported))):
        code, _, err = run_cli(capsys, *command)
        assert code == 0, err
    Image.fromarray(np.zeros((80, 90, 3), np.uint8)).save(tmp_path / "photo.png")
    code, _, err = run_cli(capsys, "predict", str(grey), str(tmp_path / "photo.png"))
    assert code == 2
    assert "the images have 3 channels and the net's mean 1" in err


@pytest.mark.parametrize("count", [2, 5, 6])
def test_top5_error_of_few_classes_is_not_printed(count):
    errors = Evaluation(np.eye(count, dtype=np.float32), np.arange(count), *[np.arange(count)] * 2)
    text = format_errors(errors.errors(), count)
    assert text.startswith("top-1 error 0.00% (")
    assert ("top-5" in text) == (count > 5)


def test_evaluate_removes_its_folder_after_error(capsys, tmp_path):
    """A folder that existed before stays."""
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"no weights")
    out, existing = tmp_path / "out" / "one", tmp_path / "existing"
    existing.mkdir()
    for flags in ([], ["--out", str(out)], ["--out", str(existing)]):
        code, _, err = run_cli(capsys, "evaluate", str(path), "digits", *flags)
        assert code == 2
        assert "net.safetensors" in err
    assert not out.exists()
    assert not path.with_name("net.safetensors-evaluated").exists()
    assert existing.is_dir()


@pytest.mark.parametrize(
    ("data", "slug"),
    [
        ("digits", "digits"),
        ("cifar10:3.0.2", "cifar10-3.0.2"),
        ("/data/photos/", "data-photos"),
        ("../photos", "photos"),
        ("gs://bucket/photos", "gs---bucket-photos"),
        ("/", "data"),
        ("..", "data"),
    ],
)
def test_slugify(data, slug):
    assert slugify(data) == slug


@pytest.mark.parametrize(
    ("data", "workdir"),
    [
        ("digits", "runs/digits-A"),
        ("imagenette/320px", "runs/imagenette-320px-A"),
        ("data/my photos/", "runs/my photos-A"),
        ("{tmp}/data/my photos", "runs/my photos-A"),
        ("data/../data/my photos/.", "runs/my photos-A"),
        ("~/my photos", "runs/my photos-A"),
        ("gs://bucket/photos/", "runs/photos-A"),
        ("{tmp}/data/labels.csv", "runs/data-labels-A"),
        ("data/earlier", "runs/data-earlier-A"),
        ("/", "runs/data-A"),
    ],
)
def test_default_workdir(data, workdir, tmp_path, monkeypatch):
    """The last name of a path, or the folder that an earlier version named after all of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "data"))
    for folder in ("data/my photos", "data/earlier", "runs/data-earlier-A"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs" / "data-earlier-A" / "run.json").touch()
    (tmp_path / "data" / "labels.csv").touch()
    assert default_workdir(data.format(tmp=tmp_path), "A") == workdir


def test_compilation_cache_folder(monkeypatch, tmp_path):
    import jax

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    seconds = "jax_persistent_cache_min_compile_time_secs"
    seconds_before = jax.config.values[seconds]
    try:
        jax.config.update(seconds, 5.0)
        enable_compilation_cache()
        assert jax.config.values[seconds] == 5  # the user's choice stays
        jax.config.update(seconds, 1.0)  # jax's default
        enable_compilation_cache()
        assert jax.config.values[seconds] == 0.1
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == before  # the user's choice stays
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / "vgg_jax"))
    finally:
        jax.config.update(seconds, seconds_before)
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("name", ["file/cache", "/proc/cache"])
def test_compilation_cache_that_cannot_be_written(name, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.setenv("VGG_JAX_CACHE", str(tmp_path / name))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache()
        assert not jax.config.values["jax_enable_compilation_cache"]
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    [record] = caplog.records
    assert "compiled programs cannot be kept in" in record.getMessage()
    assert "VGG_JAX_CACHE" in record.getMessage()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("train", "--net", "F"), ("--net", "'F'", "B-5x5")),
        (("train", "--epoch", "x"), ("--epoch", "'x'")),
        (("train", "--no-such-flag"), ("--no-such-flag",)),
        (("summary", "D", "--image-size", "16"), ("image_size", "16", "32")),
        (("summary", "D", "--num-classes", "0"), ("num_classes", "0")),
        (("train", "--scale", "20"), ("scale", "20", "32")),
        (("train", "--scale", "40", "36"), ("scale", "40", "36")),
        (("train", "no/such/folder"), ("no/such/folder",)),
        (("train", "cifar10", "--data-dir", "nowhere"), ("cifar10", "nowhere", "--download")),
        (("train", "--batch-size", "7"), ("7", "2 devices", "--batch-size")),
        (("train", "--init-from", "no_run"), ("no_run", "run's folder")),
        (("train", "--patience", "3"), ("patience", "schedule", "step", "plateau")),
        (("train", "--optimizer", "adam"), ("--optimizer", "'adam'", "sgd", "adamw")),
        (
            ("train", "--optimizer", "adamw", "--momentum", "0.9"),
            ("momentum is 0.9", "optimizer 'adamw'", "optimizer 'sgd'"),
        ),
        (("train", "--warmup-epochs", "1"), ("warmup_epochs is 1", "'step'", "'cosine'")),
        (
            ("train", "--schedule", "cosine", "--warmup-epochs", "3", "--epochs", "3"),
            ("warmup_epochs is 3", "less than the epochs, 3"),
        ),
        (("train", "--schedule", "cosine", "--drops", "1"), ("drops is 1", "'cosine'")),
        (("train", "--label-smoothing", "1"), ("label_smoothing is 1.0", "less than 1")),
        (("summary", "D", "--optimizer", "adamw"), ("optimizer is adamw", "--batch-size")),
        (("train", "--workdir", "/dev/null/w"), ("/dev/null/w", "--workdir")),
        (("statistics", "digits", "--split", "test"), ("digits", "test", "train")),
    ],
)
def test_bad_input_exits_with_2(argv, words, capsys, tmp_path, monkeypatch):
    """The last line of stderr is the message."""
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli(capsys, *argv)
    assert code == 2
    message = err.strip().splitlines()[-1]
    assert message.startswith("vgg-jax")
    assert all(word in message for word in words), message
    assert "Traceback" not in err


@pytest.mark.usefixtures("small_nets")
def test_config_of_runs(capsys, tmp_path):
    """Of a run of 0.1.0, which has no command, and of one that has."""
    with zipfile.ZipFile(REFERENCE / "run-0.1.0.zip") as file:
        file.extractall(tmp_path)
    code, out, _ = run_cli(capsys, "config", str(tmp_path / "run"))
    assert code == 0
    lines = dict(line.split(None, 1) for line in out.splitlines())
    assert lines["command"].startswith("unknown: ")
    fields = {field.name for field in dataclasses.fields(vgg_jax.TrainConfig)}
    assert fields <= lines.keys()
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert lines["net"] == f"{content['config']['net']} *"
    assert lines["momentum"] == str(content["config"]["momentum"])
    (tmp_path / "run" / "run.json").write_text(json.dumps(content | {"command": "vgg-jax train d"}))
    assert "vgg-jax train d\n" in run_cli(capsys, "config", str(tmp_path / "run"))[1]
    code, _, err = run_cli(capsys, "config", str(tmp_path))
    assert code == 2
    assert "no run in" in err


@pytest.mark.integration
def test_verify_data_leaves_its_list_at_sigterm(tmp_path):
    from tests.helpers.tiny_data import encode, noise

    for split in ("train", "test"):
        for i in range(64 if split == "test" else 1):
            (tmp_path / split / "ants").mkdir(parents=True, exist_ok=True)
            content = encode(noise(20, 24, i))[: 100 if split == "train" else None]
            (tmp_path / split / "ants" / f"{i}.png").write_bytes(content)
    out = tmp_path / "bad.jsonl"
    program = (
        "import os, signal, sys; from vgg_jax import cli; from vgg_jax.data import verify\n"
        "def decode_each(source):\n"
        "    if 'train' in source.name: return original(source)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "original = verify._decode_each; verify._decode_each = decode_each\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", program, "verify-data", str(tmp_path), "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 143
    assert result.stderr.splitlines()[-1] == "vgg-jax: ended by SIGTERM"
    assert json.loads(out.read_text())["file"] == "train/ants/0.png"


def test_statistics_of_digits(capsys):
    from sklearn.datasets import load_digits

    code, out, _ = run_cli(capsys, "statistics", "digits")
    assert code == 0
    assert "1797 images" in out
    pixels = np.round(load_digits().images * (255 / 16))
    mean, std = (float(line.split()[-1]) for line in out.splitlines() if "pixels" in line)
    assert mean == pytest.approx(pixels.mean(), abs=1e-3)
    assert std == pytest.approx(pixels.std(), abs=1e-3)


def test_train_rejects_unreadable_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in ("", "{", "[]", '{"config": {"nett": 1}}', "\x00\xff"):
        shutil.rmtree("w", ignore_errors=True)
        (tmp_path / "w").mkdir()
        (tmp_path / "w" / "run.json").write_bytes(content.encode("latin1"))
        code, _, err = run_cli(capsys, "train", "--workdir", "w")
        assert code == 2
        assert "w/run.json" in err.strip().splitlines()[-1]


@pytest.mark.integration
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_huge_pages_restart_keeps_arguments(monkeypatch):
    command = [sys.executable, "-m", "tests.programs.huge_pages", "two words", "--flag"]
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    restarted = subprocess.run(command, capture_output=True, text=True, check=True)
    tunables = (
        "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:"
        "glibc.malloc.trim_threshold=268435456"
    )
    assert restarted.stdout == f"{tunables} ['two words', '--flag']\n"
    assert restarted.stderr == ""
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    unchanged = subprocess.run(command, capture_output=True, text=True, check=True)
    assert unchanged.stdout == "glibc.malloc.check=0 ['two words', '--flag']\n"
