"""Flags of the command line."""

import argparse
import dataclasses
import re

import pytest

import vgg_jax
from tests.helpers.tiny import SHALLOW
from vgg_jax import CONFIGS, TrainConfig, preset
from vgg_jax.cli.commands import COMMANDS
from vgg_jax.cli.parser import TRAIN_GROUPS, parse_args, parse_mesh, parser

FLAGS = """--net E --batch-norm --fc 10 20 --dropout-rate 0.1 --initializer paper
--initializer-std 0.1 --init-from r --freeze conv fc6 --dtype bfloat16 --cache --image-size 100
--scale 300 --crop centre --cache-features --no-flip --colour-shift 0
--colour-convention variance --no-exif --statistics measure
--validation-fraction 0.2 --skip-bad --batch-size 8 --microbatch 4
--class-weights balanced --label-smoothing 0.1 --optimizer sgd --learning-rate 0.1 --momentum 0.8
--weight-decay 0 --decay-biases --schedule step --patience 1 --drops 1 --drop-epochs 2 3
--warmup-epochs 1 --epochs 4 --seed 7 --exclude list"""
WITHOUT_EFFECT = {"patience", "drops", "warmup_epochs"}  # with --schedule step
COMMAND_FLAGS = {"command", "workdir", "data_dir", "download", "compilation_cache", "verbose"}


def test_train_has_flag_for_each_field():
    flags = vars(parser().parse_args(["train", "d", *FLAGS.split()]))
    fields = {name: value for name, value in flags.items() if name not in COMMAND_FLAGS}
    assert fields.keys() == {field.name for field in dataclasses.fields(TrainConfig)}
    fields = {name: value for name, value in fields.items() if name not in WITHOUT_EFFECT}
    config = preset(**fields | {"exclude": ("a.jpg",)})
    assert config.fc == (10, 20)
    assert config.scale == (300,)
    expected = {"flip": False, "exif": False, "batch_norm": True, "microbatch": 4, "seed": 7}
    assert dataclasses.asdict(config).items() >= expected.items()


def test_train_leaves_out_default_flags():
    """The preset of the data set then decides."""
    flags = vars(parser().parse_args(["train"]))
    assert flags.keys() == {"data"} | COMMAND_FLAGS


def test_train_help_has_headings_and_defaults(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        parser().parse_args(["train", "--help"])
    text = capsys.readouterr().out
    assert all(f"\n{group}:\n" in text for group in TRAIN_GROUPS)
    assert "output features of fc6 and fc7 (default: 4096 4096)\n" in text
    assert "standard deviation for --initializer paper (default: 0.01)\n" in text


def test_no_arguments_list_commands_in_groups(capsys):
    with pytest.raises(SystemExit) as raised:
        parse_args([])
    assert raised.value.code == 0
    text = capsys.readouterr().out
    for example in ("train PHOTOS --net D", "predict runs/digits-A PHOTO.png", "summary D"):
        assert f", for example `vgg-jax {example}`:\n" in text
        parser().parse_args(example.split())
    listed = re.findall(r"^  ([a-z-]+) +[a-z]", text, re.MULTILINE)
    assert set(COMMANDS) <= set(listed)


def test_version(capsys):
    with pytest.raises(SystemExit) as raised:
        parse_args(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"vgg-jax {vgg_jax.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "d", "--foo"], "vgg-jax train: unrecognized arguments: --foo; see"),
        (["train", "--net", "Z"], "vgg-jax train: argument --net: invalid choice: 'Z'"),
        (["summary"], "vgg-jax summary: the following arguments are required: NET_OR_RUN; see"),
        (["fly"], "vgg-jax: argument COMMAND: invalid choice: 'fly'"),
    ],
)
def test_usage_error_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as raised:
        parse_args(argv)
    assert raised.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith(message)
    assert text.count("\n") == 1
    assert text.endswith("--help`\n")


@pytest.mark.parametrize("argv", [["train", "--net"], ["import", "f", "o", "--net"]])
def test_net_added_to_configs_is_accepted(argv, monkeypatch):
    with pytest.raises(SystemExit):
        parser().parse_args([*argv, "shallow"])
    monkeypatch.setitem(CONFIGS, "shallow", SHALLOW)
    assert parser().parse_args([*argv, "shallow"]).net == "shallow"
    assert TrainConfig(net="shallow").vgg.stages == SHALLOW.stages


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("import --mean 1 2 3 f o", {"mean": [1, 2, 3], "file": "f", "out": "o"}),
        ("import f --mean -1 2.5 3e1 --std 2 o", {"mean": [-1, 2.5, 30], "std": [2], "out": "o"}),
        ("import f --mean=1,2,3 o", {"mean": [1, 2, 3], "out": "o"}),
        ("export --std 1,2,3 run o", {"std": [1, 2, 3], "path": "run", "out": "o"}),
        ("train --scale 256 512 photos", {"scale": [256, 512], "data": "photos"}),
        ("train --scal 256 512 photos", {"scale": [256, 512], "data": "photos"}),
        ("train --scale 256 512photos", {"scale": [256], "data": "512photos"}),
        ("train --freeze conv fc6 photos", {"freeze": ["conv", "fc6"], "data": "photos"}),
        ("train --freeze conv1_1 bn", {"freeze": ["conv1_1"], "data": "bn"}),
        ("train --schedule step --drop-epochs 3 6 photos", {"drop_epochs": [3, 6]}),
        ("evaluate --scales 256 384 run photos", {"scales": [256, 384], "data": "photos"}),
        ("predict run --scales 256 a.jpg", {"scales": [256], "images": ["a.jpg"]}),
    ],
)
def test_values_of_flags_end_before_arguments(argv, expected):
    assert parse_args(argv.split()).items() >= expected.items()


def test_no_flag_takes_arguments_for_values():
    actions = [
        action
        for commands in parser()._actions
        if isinstance(commands.choices, dict)
        for command in commands.choices.values()
        for action in command._actions
    ]
    assert len(actions) > 100
    assert not [
        action for action in actions if action.option_strings and action.nargs in ("+", "*")
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train --scale x", "argument --scale: invalid int value: 'x'"),
        ("train --scale 256,x", "argument --scale: invalid int value: '256,x'"),
        ("predict --scales", "argument --scales: expected one argument"),
        ("train --scale --flip", "argument --scale: expected one argument"),
    ],
)
def test_invalid_values_of_flags(argv, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(argv.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", ["--verbose train", "train --verbose", "--verbose train --verbose"]
)
def test_verbose_before_or_after_command(argv):
    assert parse_args(argv.split())["verbose"] is True
    assert parse_args(["train"])["verbose"] is False


def test_parse_mesh():
    assert parse_mesh("data=4,model=2") == {"data": 4, "model": 2}
    assert parse_mesh("model=2") == {"model": 2}
    for text in ("", "data", "data=", "data=x", "data=-1", "rows=2", "data=2,data=3", "data=2,"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected axes such as data=8"):
            parse_mesh(text)


def test_profile_takes_a_range_of_steps(capsys):
    assert parser().parse_args(["train", "d", "--profile", "10:20"]).profile == (10, 20)
    for text in ("20:10", "a:b", "0:5", "5", "1:2:3", ":5", "-1:5"):
        with pytest.raises(SystemExit) as raised:
            parser().parse_args(["train", "d", f"--profile={text}"])
        assert raised.value.code == 2
        assert capsys.readouterr().err == (
            f"vgg-jax train: argument --profile: {text!r}: expected the first and the last step, "
            "counted from 1, such as 10:20; see `vgg-jax train --help`\n"
        )
