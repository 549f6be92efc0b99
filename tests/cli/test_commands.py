"""Flags, exit codes and sentences."""

import dataclasses
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest

from vgg_jax import TrainConfig, cli, preset
from vgg_jax.cli.parser import parser
from vgg_jax.runtime.compilation_cache import enable_compilation_cache


def run(capsys, *argv):
    """The exit code and what was printed to stdout and stderr."""
    try:
        code = cli.main(argv)
    except SystemExit as error:  # argparse's
        code = error.code
    return code, *capsys.readouterr()


def test_summary_of_the_printout_that_pytorch_users_know(capsys):
    code, out, _ = run(capsys, "summary", "D", "--batch-norm")
    assert code == 0
    for line in (
        "Total params: 138,365,992",
        "(MB): 0.57",
        "(MB): 321.95",
        "(MB): 527.82",
        "(MB): 850.35",
    ):
        assert line in out


@pytest.mark.slow
def test_summary_foretells_the_memory_of_a_step(capsys):
    code, out, _ = run(
        capsys, "summary", "A", "--image-size", "32", "--num-classes", "10", "--batch-size", "4"
    )
    assert code == 0
    assert "A training step of 4 images takes 0." in out
    assert "0.23 GB for parameters and momentum" in out  # 28.1 million, twice, 4 bytes each
    code, out, err = run(capsys, "summary", "A", "--batch-size", "4", "--microbatch", "3")
    assert code == 2
    assert "microbatch is 3: expected a divisor of the batch size, 4" in err


def test_every_field_of_the_configuration_has_a_flag_and_the_other_way_round():
    flags = vars(parser().parse_args(["train", "d", *FLAGS.split()]))
    given = {name: flags[name] for name in flags if name not in NOT_OF_THE_RUN}
    assert given.keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    config = preset(
        **{name: value for name, value in given.items() if name not in WITHOUT_EFFECT}
        | {"exclude": ("what the list says",)}
    )
    assert config.fc == (10, 20)
    assert config.scale == (300, 400)
    assert (
        dataclasses.asdict(config).items()
        >= {"flip": False, "exif": False, "batch_norm": True, "microbatch": 4, "seed": 7}.items()
    )


FLAGS = """--net E --batch-norm --fc 10 20 --dropout-rate 0.1 --initializer paper --initializer-std 0.1 --init-from r --freeze conv fc6
--dtype bfloat16 --cache
--image-size 100 --scale 300 400 --no-flip --colour-shift 0 --colour-convention variance --no-exif --statistics measure
--validation-fraction 0.2 --skip-bad --batch-size 8 --microbatch 4 --learning-rate 0.1 --momentum 0.8 --weight-decay 0 --decay-biases
--schedule step --patience 1 --drops 1 --drop-epochs 2 3 --epochs 4 --seed 7 --exclude list"""
WITHOUT_EFFECT = {"patience", "drops"}  # beside --schedule step
NOT_OF_THE_RUN = {"command", "workdir", "data_dir", "download", "compilation_cache"}


def test_what_is_not_given_is_the_presets():
    flags = vars(parser().parse_args(["train"]))
    assert flags.keys() == {"data"} | NOT_OF_THE_RUN


def test_compiled_programs_are_kept_in_the_users_cache_folder(monkeypatch, tmp_path):
    import jax

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == before  # what the user has chosen stays
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / "vgg_jax"))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


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
        (("train", "--workdir", "/dev/null/w"), ("/dev/null/w", "--workdir")),
        (("statistics", "digits", "--split", "test"), ("digits", "test", "train")),
    ],
)
def test_a_bad_input_gets_one_sentence_and_exit_code_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *argv)
    assert code == 2
    last = err.strip().splitlines()[-1]
    assert last.startswith("vgg-jax")
    assert all(word in last for word in words), last
    assert "Traceback" not in err


def test_statistics_of_the_digits(capsys):
    from sklearn.datasets import load_digits

    code, out, _ = run(capsys, "statistics", "digits")
    assert code == 0
    assert "1797 images" in out
    pixels = np.round(load_digits().images * (255 / 16))
    pooled = [line.split()[-1] for line in out.splitlines() if "pixels" in line]
    assert float(pooled[0]) == pytest.approx(pixels.mean(), abs=1e-3)
    assert float(pooled[1]) == pytest.approx(pixels.std(), abs=1e-3)


def test_a_run_that_cannot_be_read(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for content in ("", "{", "[]", '{"config": {"nett": 1}}', "\x00\xff"):
        shutil.rmtree("w", ignore_errors=True)
        (tmp_path / "w").mkdir()
        (tmp_path / "w" / "run.json").write_bytes(content.encode("latin1"))
        code, _, err = run(capsys, "train", "--workdir", "w")
        assert code == 2
        assert "w/run.json" in err.strip().splitlines()[-1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_program_starts_again_with_huge_pages_and_its_own_arguments(monkeypatch):
    code = "import os, sys; from vgg_jax.runtime.memory import use_huge_pages; use_huge_pages(); print(os.environ['GLIBC_TUNABLES'], sys.argv[1:])"
    command = [sys.executable, "-c", code, "two words", "--flag"]
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (
        again.stdout
        == "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=268435456 ['two words', '--flag']\n"
    )
    assert again.stderr == ""
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    left = subprocess.run(command, capture_output=True, text=True, check=True)
    assert left.stdout == "glibc.malloc.check=0 ['two words', '--flag']\n"


def test_help_answers_at_once():
    """Without jax: that alone takes longer."""
    code = "import sys; from vgg_jax.cli import main\ntry: main(['--help'])\nexcept SystemExit: print('jax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.endswith("False\n")
