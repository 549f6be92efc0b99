"""The recipe of `experiments/paper/imagenet.py`: its tables, and all its stages in miniature."""

import dataclasses
import json
import os
import signal
from functools import partial

import jax
import numpy as np
import pytest

import vgg_jax
from experiments.benchmarks.scaling_model import MACHINES
from experiments.paper import imagenet
from experiments.paper.imagenet_plan import evaluation_operations, expected_rate, plan
from experiments.paper.imagenet_recipe import (
    NETS,
    ROWS,
    STAGES,
    Part,
    scaled,
    select_rows,
    select_stages,
    train_config,
)
from tests.helpers.tiny import init, narrow
from tools.soak import result
from vgg_jax import CONFIGS, IMAGENET, TrainConfig
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.evaluation.evaluate import fuse, load_evaluation
from vgg_jax.model import build_model
from vgg_jax.training.init_from import Pretrained, init_from_pretrained
from vgg_jax.training.loop import fit
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import init_state
from vgg_jax.training.trainer import Trainer

# The paper's tables, copied by hand: net, S, Q, top-1 and top-5 errors on the validation split.
TABLE_3 = """
    A      256      256  29.6  10.4
    A-LRN  256      256  29.7  10.5
    B      256      256  28.7   9.9
    C      256      256  28.1   9.4
    C      384      384  28.1   9.3
    C      256-512  384  27.3   8.8
    D      256      256  27.0   8.8
    D      384      384  26.8   8.7
    D      256-512  384  25.6   8.1
    E      256      256  27.3   9.0
    E      384      384  26.9   8.7
    E      256-512  384  25.5   8.0
"""
TABLE_4 = """
    B  256      224,256,288  28.2  9.6
    C  256      224,256,288  27.7  9.2
    C  384      352,384,416  27.8  9.2
    C  256-512  256,384,512  26.3  8.2
    D  256      224,256,288  26.6  8.6
    D  384      352,384,416  26.5  8.6
    D  256-512  256,384,512  24.8  7.5
    E  256      224,256,288  26.9  8.7
    E  384      352,384,416  26.7  8.6
    E  256-512  256,384,512  24.8  7.5
"""
# Both at S in [256; 512] and Q = 256, 384, 512.
TABLE_5 = """
    D  dense             24.8  7.5
    D  multi-crop        24.6  7.5
    D  dense,multi-crop  24.4  7.2
    E  dense             24.8  7.5
    E  multi-crop        24.6  7.4
    E  dense,multi-crop  24.4  7.1
"""
TABLE_6 = """
    D/256/224,256,288 D/384/352,384,416 D/256-512/256,384,512 C/256/224,256,288 \
C/384/352,384,416 E/256/224,256,288 E/384/352,384,416 | dense | 24.7 7.5
    D/256-512/256,384,512 E/256-512/256,384,512 | dense | 24.0 7.1
    D/256-512/256,384,512 E/256-512/256,384,512 | multi-crop | 23.9 7.2
    D/256-512/256,384,512 E/256-512/256,384,512 | dense,multi-crop | 23.7 6.8
"""
MINIATURE = (
    *("--image-size", "32", "--fc", "12", "8", "--batch-size", "6"),
    *("--epochs", "2", "--fine-tune-epochs", "1"),
    # In nets this small, the paper's initialisation gives the same posteriors for all images.
    *("--initializer", "glorot", "--learning-rate", "1e-3"),
)


def lines(table):
    return [line.split() for line in table.strip().splitlines()]


def as_printed(number, member):
    """Net, S and Q of a member of a row, as the tables print them."""
    stage, scales = STAGES[member[0]], member[1]
    return [stage.net, "-".join(map(str, stage.scale)), ",".join(map(str, scales))]


def parse(*flags):
    return imagenet.parser().parse_args(["DATA", *flags])


@pytest.mark.parametrize(("number", "table"), [(3, TABLE_3), (4, TABLE_4)])
def test_rows_of_tables_3_and_4(number, table):
    rows = [row for row in ROWS if row.table == number]
    assert {row.protocols for row in rows} == {("dense",)}
    actual = [[*as_printed(number, *row.members), str(row.top1), str(row.top5)] for row in rows]
    assert actual == lines(table)


def test_rows_of_table_5():
    rows = [row for row in ROWS if row.table == 5]
    actual = []
    for row in rows:
        net, *scales = as_printed(5, *row.members)
        assert scales == ["256-512", "256,384,512"]
        actual.append([net, ",".join(row.protocols), str(row.top1), str(row.top5)])
    assert actual == lines(TABLE_5)


def test_rows_of_table_6():
    rows = [row for row in ROWS if row.table == 6]
    for row, line in zip(rows, TABLE_6.strip().splitlines(), strict=True):
        members, protocols, errors = map(str.split, line.split("|"))
        assert ["/".join(as_printed(6, member)) for member in row.members] == members
        assert [",".join(row.protocols)] == protocols
        assert [str(row.top1), str(row.top5)] == errors
    assert len(ROWS) == 12 + 10 + 6 + 4


def test_average_of_parts_is_that_of_members():
    """Each member of a row has as many test scales, so the mean of its parts weighs it equally."""
    for row in ROWS:
        assert len({len(scales) for _, scales in row.members}) == 1
        assert len(row.parts) == len(set(row.parts))


def test_stages_follow_the_paper():
    chain = ["D-jitter", "D-384", "D-256", "A-256"]
    assert [STAGES[name].init_from for name in chain] == [*chain[1:], None]
    deeper = [STAGES[f"{net}-256"] for net in "BCDE"]
    assert {stage.init_from for stage in deeper} == {"A-256"}
    frozen = [stage.name for stage in STAGES.values() if stage.freeze]
    assert frozen == ["D-jitter-fc"]
    submission = next(row for row in ROWS if row.table == 6)
    assert [name for name, _ in submission.members if "jitter" in name] == frozen


def test_nets_select_rows_and_stages():
    def names(*nets):
        return [stage.name for stage in select_stages(select_rows(nets))]

    assert names("A") == ["A-256"]
    assert names("D") == ["A-256", "D-256", "D-384", "D-jitter"]
    assert names(*NETS) == list(STAGES)  # each stage after that which it starts from
    assert len(select_rows(["D"])) == 3 + 3 + 3
    assert len(select_rows(["D", "E"])) == 2 * 9 + 3
    assert select_rows(NETS) == list(ROWS)


def test_configuration_of_stages():
    """Without flags, a stage is `vgg-jax train` with the flags that §3.1 asks for."""
    paper = {"data": "DATA", "initializer": "paper"}
    expected = {
        "A-256": TrainConfig(**paper, net="A", learning_rate=1e-2),
        "E-256": TrainConfig(**paper, net="E", learning_rate=1e-2, init_from="OUT/A-256"),
        "E-384": TrainConfig(
            **paper, net="E", learning_rate=1e-3, init_from="OUT/E-256", scale=(384,), drops=2
        ),
        "E-jitter": TrainConfig(
            **paper, net="E", learning_rate=1e-3, init_from="OUT/E-384", scale=(256, 512), drops=2
        ),
    }
    for name, config in expected.items():
        assert train_config(STAGES[name], parse("--out", "OUT")) == config
    frozen = train_config(STAGES["D-jitter-fc"], parse("--jitter-rate", "1e-4"))
    assert (frozen.freeze, frozen.learning_rate) == (("conv",), 1e-4)


def test_sides_keep_their_ratio():
    assert [scaled(side, 224) for side in (224, 256, 352, 512)] == [224, 256, 352, 512]
    assert [scaled(side, 32) for side in (224, 256, 384, 512)] == [32, 37, 55, 73]


@pytest.mark.slow
@pytest.mark.parametrize("net", ["B", "C", "D", "E"])
def test_seven_layers_come_from_a(net, monkeypatch):
    for name in ("A", net):
        monkeypatch.setitem(CONFIGS, name, narrow(name))
    args = parse("--image-size", "32", "--fc", "12", "8", "--batch-size", "2")
    source = build_model(train_config(STAGES["A-256"], args), 3)
    variables = jax.tree.map(lambda array: array + 100, init(source))
    metadata = {"preprocessing": {"mean_rgb": IMAGENET.mean_rgb}}
    config = train_config(STAGES[f"{net}-256"], args)
    state = init_state(build_model(config, 3), make_optimizer(config), 0, make_mesh(2))
    state = init_from_pretrained(
        Pretrained(source, variables, metadata), config, state, IMAGENET.mean_rgb
    )
    copied = {name for name, layer in state.params.items() if np.mean(layer["kernel"]) > 50}
    assert copied == {"conv1_1", "conv2_1", "conv3_1", "conv3_2", "fc6", "fc7", "fc8"}
    for name in copied:
        np.testing.assert_array_equal(
            state.params[name]["kernel"], variables["params"][name]["kernel"]
        )


def test_plan_agrees_with_the_paper():
    """The work of D is that of 370,000 iterations: 8.8e18 operations (3 times the forward pass)."""
    args = parse()
    work = {line["stage"]: line for line in plan(list(STAGES.values()), args)}
    assert work["D-256"]["images"] == 370_000 * 256
    assert work["D-256"]["operations"] == pytest.approx(8.8e18, rel=0.005)
    # The measured step of 256 images takes 43.4 ms.
    assert work["D-256"]["hours"]["1 H200"] == pytest.approx(370_000 * 0.0434 / 3600, rel=0.01)
    for name in NETS:
        rates = [expected_rate(name, "h200", devices, 256) for devices in (1, 8)]
        assert rates[0] < rates[1] <= min(8 * rates[0], MACHINES["h200"].images)


def test_work_of_dense_evaluation():
    """Multiply-adds of D on square images of 256, 384 and 512 pixels, computed elsewhere."""
    for side, macs in ((256, 20.54e9), (384, 49.55e9), (512, 92.54e9)):
        operations = evaluation_operations("D", Part("D-256", "dense", side), 1)
        assert operations == pytest.approx(2 * 2 * macs, rel=1e-3)
    crops = evaluation_operations("D", Part("D-256", "multi-crop", 256), 10)
    assert crops == 10 * 50 * 2 * 15_470_264_320


def test_program_prints_plan(capsys):
    assert imagenet.main(["--plan", "--nets", "C", "--epochs", "2"]) == 0
    text = capsys.readouterr().out
    assert "| C-384 | C-256 | 0.001 | 74 |" in text and "| C-256 | A-256 | 0.01 | 2 |" in text


def test_program_asks_for_data(capsys):
    assert imagenet.main([]) == 2
    assert "no data is given: expected the folder of ImageNet" in capsys.readouterr().err


@pytest.fixture(scope="module")
def short_nets():
    """Nets of the second and third stage of each net, with few channels. All are different."""
    with pytest.MonkeyPatch.context() as patch:
        for name in NETS:
            net = narrow(name)
            patch.setitem(CONFIGS, name, dataclasses.replace(net, stages=net.stages[1:3]))
        yield


@pytest.fixture(scope="module")
def photos(shared_data, tmp_path_factory):
    """Links to 18 photos of ImageNet, as two of train and one of val for each of six classes."""
    folders = sorted((shared_data / "imagenet-sample").iterdir())
    root = tmp_path_factory.mktemp("photos")
    for i, folder in enumerate(folders[:18]):
        target = root / ("val" if i % 3 == 2 else "train") / f"class{i // 3}"
        target.mkdir(parents=True, exist_ok=True)
        [photo] = folder.iterdir()
        (target / photo.name).symlink_to(photo)
    return str(root)


@pytest.fixture(scope="module")
def finished(short_nets, photos, tmp_path_factory):
    """The folder of the whole program in miniature, never stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert imagenet.main([photos, "--out", str(out), *MINIATURE]) == 0
    return out


def load_tables(out):
    return json.loads((out / "tables.json").read_text())["rows"]


@pytest.mark.slow
def test_all_stages_and_tables_in_miniature(finished):
    for stage in STAGES.values():
        records = (finished / stage.name / "metrics.jsonl").read_text().splitlines()
        assert len(records) == (1 if stage.is_fine_tuned else 2), stage.name
    results = load_tables(finished)
    assert [result["table"] for result in results] == [row.table for row in ROWS]
    assert {result["count"] for result in results} == {6}
    # The last row: two nets, three test scales and two protocols, averaged without `fuse`.
    parts = [
        load_evaluation(finished / "evaluations" / f"{net}-jitter-{protocol}-{scale}")
        for net in "DE"
        for protocol in ("dense", "multi-crop")
        for scale in (256, 384, 512)
    ]
    posteriors = np.array([part.posteriors for part in parts])
    assert posteriors.std(0).mean() > 1e-3  # the parts differ
    labels, order = parts[0].labels[:, None], np.argsort(-posteriors.mean(0), 1)
    errors = [(order[:, :k] != labels).all(1).mean() for k in (1, 5)]
    assert [results[-1][name] for name in ("top1_error", "top5_error")] == pytest.approx(errors)


@pytest.mark.slow
def test_frozen_stage_changes_fc_layers_only(finished):
    (_, source, _), (_, tuned, _), (_, whole, _) = (
        vgg_jax.load(finished / name) for name in ("D-384", "D-jitter-fc", "D-jitter")
    )
    for name, layer in source["params"].items():
        for variables, is_equal in ((tuned, name.startswith("conv")), (whole, False)):
            kernel = variables["params"][name]["kernel"]
            assert np.array_equal(kernel, layer["kernel"]) == is_equal, name


@pytest.mark.slow
def test_parts_are_those_of_one_evaluation(finished, photos, tmp_path):
    """Their mean is what `vgg-jax evaluate --protocol both --scales 37 55 73` computes."""
    net = vgg_jax.load(finished / "D-jitter")
    vgg_jax.evaluate(*net, photos, protocol="both", scales=(37, 55, 73), out=tmp_path)
    row = next(row for row in ROWS if row.table == 5 and row.protocols == ("dense", "multi-crop"))
    args = parse("--out", str(finished))
    actual = fuse([imagenet.evaluation_folder(part, args) for part in row.parts])
    expected = load_evaluation(tmp_path).posteriors
    assert expected.std(0).mean() > 1e-3  # the images differ
    np.testing.assert_allclose(actual.posteriors, expected, atol=1e-5)


def stop_once(monkeypatch):
    """Sends SIGTERM in a step of B, and later in the evaluation of B. Returns what was sent."""
    sent = []

    def send_once(place):
        if place not in sent:
            sent.append(place)
            os.kill(os.getpid(), signal.SIGTERM)

    class StoppingTrainer(Trainer):
        def train_step(self, state, batch):
            if self.setup.config.net == "B":
                send_once("step")
            return super().train_step(state, batch)

    def evaluate(*net, out, **options):
        if out.endswith("B-256-dense-256"):
            send_once("evaluation")
        return vgg_jax.evaluate(*net, out=out, **options)

    monkeypatch.setattr(imagenet, "fit", partial(fit, trainer_class=StoppingTrainer))
    monkeypatch.setattr(imagenet, "evaluate", evaluate)
    return sent


@pytest.mark.slow
def test_stopped_program_goes_on(finished, photos, tmp_path, monkeypatch, capsys):
    sent = stop_once(monkeypatch)
    command = [photos, "--out", str(tmp_path), *MINIATURE, "--nets", "A", "B"]
    codes = [imagenet.main(command) for _ in range(3)]
    assert (codes, sent) == ([75, 75, 0], ["step", "evaluation"])
    for stage in ("A-256", "B-256"):
        arrays, records = result(tmp_path / stage)
        expected_arrays, expected_records = result(finished / stage)
        assert records == expected_records
        jax.tree.map(np.testing.assert_array_equal, arrays, expected_arrays)
    rows = load_tables(tmp_path)
    assert len(rows) == 3
    expected = {row["row"]: row for row in load_tables(finished)}
    assert rows == [expected[row["row"]] for row in rows]
    assert "| 3 | A-256, Q = 256: dense | 29.6 | 10.4 |" in capsys.readouterr().out
    check_nothing_is_repeated(tmp_path, command, monkeypatch)


def check_nothing_is_repeated(out, command, monkeypatch):
    """A finished program evaluates nothing, unless the evaluation is of another net."""
    evaluated = []

    def evaluate(*net, out, **options):
        evaluated.append(os.path.basename(out))

    monkeypatch.setattr(imagenet, "evaluate", evaluate)
    assert (imagenet.main(command), evaluated) == (0, [])
    (out / "evaluations" / "B-256-dense-288" / "net.sha256").write_text("0" * 64)
    assert (imagenet.main(command), evaluated) == (0, ["B-256-dense-288"])


@pytest.mark.slow
def test_program_refuses_another_rate(finished, photos, capsys):
    command = [photos, "--out", str(finished), *MINIATURE, "--learning-rate", "0.02"]
    assert imagenet.main(command) == 2
    assert (
        "holds another run: learning_rate is 0.001 in run.json and 0.02 now"
        in capsys.readouterr().err
    )
