"""The claims of the paper: their figures, the test that decides them, and a run in miniature."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.paper import claims
from experiments.paper.claims import NETS, load_variables, main, needed_parts, thin
from experiments.paper.claims_table import (
    CLAIMS,
    Claim,
    Part,
    at_256,
    claim_row,
    decide,
    top1_error,
)
from experiments.paper.imagenet_recipe import scaled
from experiments.paper.scan_training import Result
from vgg_jax import CONFIGS
from vgg_jax.configs.models import VGGConfig
from vgg_jax.model import PAPER_INIT_LAYERS
from vgg_jax.runs.files import workdir_lock

# Top-1 errors of Tables 3 to 6, by net, training scale, protocols and number of test scales.
TABLES = {
    ("A", 256, "dense", 1): 29.6,
    ("A-LRN", 256, "dense", 1): 29.7,
    ("B", 256, "dense", 1): 28.7,
    ("C", 256, "dense", 1): 28.1,
    ("D", 256, "dense", 1): 27.0,
    ("D", 384, "dense", 1): 26.8,
    ("D", "jitter", "dense", 1): 25.6,
    ("E", 256, "dense", 1): 27.3,
    ("D", 256, "dense", 3): 26.6,
    ("D", 384, "dense", 3): 26.5,
    ("D", "jitter", "dense", 3): 24.8,
    ("D", "jitter", "multi-crop", 3): 24.6,
    ("D", "jitter", "dense, multi-crop", 3): 24.4,
    ("D+E", "jitter", "dense", 3): 24.0,
    ("D+E", "jitter", "dense, multi-crop", 3): 23.7,
}


def key_of(measure):
    """The key of `TABLES` for a measure."""
    nets = {part.net for part in measure}
    scales = {"jitter" if "jitter" in net else 384 if "384" in net else 256 for net in nets}
    protocols = sorted({part.protocol for part in measure})
    names = "+".join(sorted(net.split(",")[0] for net in nets))
    (scale,) = scales
    return names, scale, ", ".join(protocols), len({part.scale for part in measure})


def test_claims_have_the_figures_of_the_tables():
    used = set()
    for claim in CLAIMS:
        if isinstance(claim.paper, tuple):
            keys = key_of(claim.before), key_of(claim.after)
            assert claim.paper == tuple(TABLES[key] for key in keys), claim
            used |= set(keys)
    assert used == set(TABLES)


def test_nets_are_those_of_the_claims():
    named = {part.net for claim in CLAIMS for part in (*claim.before, *claim.after)}
    starts = {net.start for net in NETS.values()} - {None}
    assert named | starts == set(NETS)


def test_scales_have_the_ratio_of_the_paper():
    assert [scaled(scale, 32) for scale in (224, 256, 288, 352, 384, 416, 512)] == [
        32,
        37,
        41,
        50,
        55,
        59,
        73,
    ]
    assert scaled(384, 224) == 384


@pytest.mark.parametrize(
    "gains, kind, outcome",
    [
        # t = 0.02 / (0.01 / sqrt(3)) = 3.46, and 4.30 is the limit for three seeds.
        ((0.01, 0.02, 0.03), "lower", "undecided"),
        ((0.019, 0.02, 0.021), "lower", "holds"),
        ((-0.019, -0.02, -0.021), "lower", "fails"),
        ((0.01, -0.01, 0.0), "lower", "undecided"),
        ((0.02, 0.02, 0.02), "lower", "holds"),
        ((0.0, 0.0, 0.0), "lower", "undecided"),
        ((0.02, 0.02), "lower", "undecided"),
        ((0.019, 0.02, 0.021), "not lower", "fails"),
        ((0.0019, 0.002, 0.0021), "not lower", "holds"),  # significant, but less than a point
        ((-0.019, -0.02, -0.021), "not lower", "holds"),
        ((0.001, 0.002, 0.003), "not lower", "holds"),  # the interval ends at 0.0045
        ((0.0, 0.01, 0.0), "not lower", "undecided"),  # at 0.0177
    ],
)
def test_decide(gains, kind, outcome):
    after = np.array([0.3, 0.31, 0.32])[: len(gains)]
    verdict = decide(after + gains, after, kind)
    assert verdict.outcome == outcome
    assert verdict.gain == pytest.approx(np.mean(gains))


def test_decide_computes_students_interval():
    """Mean ± 4.3027 · sd / sqrt(3), where 4.3027 is from the table of Student's t."""
    verdict = decide([0.31, 0.33, 0.35], [0.30, 0.31, 0.32], "lower")
    half = 4.3027 * 0.01 / 3**0.5
    np.testing.assert_allclose(verdict.interval, (0.02 - half, 0.02 + half), rtol=1e-4)


def test_top1_error_averages_posteriors():
    first = np.array([[0.6, 0.4], [0.9, 0.1], [0.2, 0.8]])
    second = np.array([[0.1, 0.9], [0.4, 0.6]])  # only of the first two images
    labels = np.array([1, 0, 0])
    assert top1_error([first], labels) == pytest.approx(2 / 3)
    assert top1_error([second], labels) == pytest.approx(1 / 2)
    assert top1_error([first, second], labels) == 0


def test_claim_row_uses_the_seeds_and_images_that_all_parts_have():
    labels = np.zeros(4, int)
    right, wrong = np.array([[0.9, 0.1]]), np.array([[0.1, 0.9]])
    stored = {
        ("A", 0): np.concatenate([right, wrong, wrong, wrong]),
        ("B", 0): np.concatenate([right, right]),
        ("A", 1): np.concatenate([right] * 4),
    }
    claim = Claim("B over A", "4.1", at_256("A"), at_256("B"))
    row = claim_row(claim, (0, 1), lambda part, seed: stored.get((part.net, seed)), labels)
    assert row["seeds"] == [0] and row["images"] == 2
    assert row["before"] == [0.5] and row["after"] == [0.0]
    assert row["outcome"] == "undecided"
    assert claim_row(claim, (2,), lambda part, seed: None, labels)["outcome"] == "not run"


def test_needed_parts_have_no_repetition():
    parts = needed_parts("D, jitter")
    assert len(parts) == len(set(parts)) == 6  # dense and multi-crop at three scales
    assert Part("D, jitter", "multi-crop", 512) in parts


def test_thin_averages_all_steps():
    points = thin([float(i) for i in range(10)], points=4)
    assert points == [[3, 1.0], [6, 4.0], [8, 6.5], [10, 8.5]]
    assert thin([2.0], points=4) == [[1, 2.0]]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Runs the program on 40 images, with nets of five narrow stages."""
    rng = np.random.default_rng(0)
    arrays = {
        f"{name}_{split}": values
        for split, n in (("train", 40), ("test", 10))
        for name, values in (
            ("x", rng.integers(0, 256, (n, 32, 32, 3), np.uint8)),
            ("y", np.arange(n) % 2),
        )
    }
    np.savez(tmp_path / "tiny.npz", **arrays)
    for name in ("A", "D"):
        stages = tuple((conv,) * (1 if name == "A" else 2) for conv in WIDE)
        monkeypatch.setitem(CONFIGS, name, VGGConfig(stages, fc=(4096, 4096)))

    def start(*options):
        argv = f"claims {tmp_path}/tiny.npz --out {tmp_path}/out --width-divisor 64 --epochs 1"
        argv += " --batch-size 16 --train-images 40 --test-images 10 --crop-images 4"
        argv = [*argv.split(), "--device", "a test", *options]
        monkeypatch.setattr("sys.argv", argv)
        monkeypatch.setattr(claims, "enable_compilation_cache", lambda: None)
        main()
        return tmp_path / "out"

    return start


WIDE = tuple(CONFIGS["A"].stages[3][0]._replace(features=128) for _ in range(5))


@pytest.mark.slow
def test_program_resumes_and_refuses_other_settings(tiny, capsys, monkeypatch):
    nets = ("--nets", "A, normal", "D, from A")
    out = tiny("--seeds", "0", *nets)
    first = json.loads(capsys.readouterr().out)
    assert set(first["nets"]["D, from A"]) == {"0"}
    assert {claim["outcome"] for claim in first["claims"]} == {"not run"}

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npz")}
    tiny("--seeds", "0", "1", *nets)
    after = json.loads(capsys.readouterr().out)
    assert set(after["nets"]["D, from A"]) == {"0", "1"}
    assert after["nets"]["A, normal"]["0"] == first["nets"]["A, normal"]["0"]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert not list(out.rglob("state.npz"))

    with pytest.raises(claims.InputError, match="epochs is 2, and 1 in"):
        tiny("--epochs", "2")


@pytest.fixture
def untrained(tiny, monkeypatch):
    """The program without training and evaluation. Returns it, and the posteriors by net.

    Net A ends with ones, and D starts with zeros.
    """
    posteriors = {}

    def train(config, model, data, change, log, checkpoint):
        value = jnp.ones if config.net == "A" else jnp.zeros
        shapes = jax.eval_shape(model.lazy_init, jax.random.key(0), model.one_image())
        variables = jax.tree.map(lambda leaf: value(leaf.shape), shapes)
        return Result(change({"batch_stats": {}, **variables}), [], [0.0])

    def evaluate(model, variables, data, protocol, scale):
        rng = np.random.default_rng(len(posteriors))
        posteriors[len(posteriors)] = rng.dirichlet((1, 1), data.test.size)
        return posteriors[len(posteriors) - 1]

    monkeypatch.setattr(claims, "train", train)
    monkeypatch.setattr(claims, "posteriors", evaluate)
    return tiny, posteriors


def test_net_from_a_starts_with_its_layers(untrained):
    out = untrained[0]("--seeds", "0", "--nets", "A, normal", "D, from A")
    params = load_variables(out / "D-from A-0")["params"]
    ones = {name for name, layer in params.items() if layer["bias"].all()}
    # conv3_2 is not in the tiny net A.
    assert ones == set(PAPER_INIT_LAYERS) - {"conv3_2"}


def test_table_has_the_errors_of_the_test_images(untrained, capsys):
    start, posteriors = untrained
    start("--seeds", "0", "1", "2", "2", "--nets", "A", "E")
    document = json.loads(capsys.readouterr().out)
    row = next(row for row in document["claims"] if row["claim"].endswith("E (19) over A (11)"))
    labels = np.arange(10) % 2
    errors = [(posteriors[i].argmax(1) != labels).mean() for i in range(6)]
    # The parts of a seed: A, then E.
    assert row["seeds"] == [0, 1, 2] and row["images"] == 10
    np.testing.assert_allclose(row["before"], errors[::2], atol=1e-5)
    np.testing.assert_allclose(row["after"], errors[1::2], atol=1e-5)
    assert row["outcome"] == decide(errors[::2], errors[1::2], "lower").outcome


def test_diverged_net_is_in_no_claim(untrained, monkeypatch, capsys):
    start, _ = untrained
    train = claims.train
    monkeypatch.setattr(
        claims,
        "train",
        lambda *args, **options: train(*args, **options)._replace(losses=[1.0, float("nan")]),
    )
    start("--seeds", "0", "--nets", "A", "E")
    document = json.loads(capsys.readouterr().out)
    assert document["nets"]["A"]["0"]["diverged"]
    assert {row["outcome"] for row in document["claims"]} == {"not run"}


def test_another_machine_goes_on(untrained, capsys):
    start, _ = untrained
    start("--seeds", "0", "--nets", "A", "E")
    start("--seeds", "0", "1", "--nets", "A", "E", "--device", "another machine")
    document = json.loads(capsys.readouterr().out.split("\n}\n")[1] + "}")
    devices = [document["nets"]["A"][seed]["device"] for seed in ("0", "1")]
    assert devices == ["a test", "another machine"]
    assert document["device"] == "a test; another machine"


def test_net_of_another_process_is_skipped(untrained, tmp_path, capsys):
    with workdir_lock(tmp_path / "out" / "A-0"):
        untrained[0]("--seeds", "0", "--nets", "A")
    captured = capsys.readouterr()
    assert "A, 0: skipped, since another process trains it" in captured.err
    assert json.loads(captured.out)["nets"]["A"] == {}


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--width-divisor", "0"), "--width-divisor is 0: expected 1 to 64"),
        (("--train-images", "9"), "--train-images is 9: expected at least 10"),
        (("--crop-images", "11"), "--crop-images is 11: expected 1 to 10"),
        (("--collect",), r"no settings.json in .*: expected the folder of an earlier call"),
    ],
)
def test_wrong_values_are_refused_before_training(flags, message, untrained, tmp_path):
    with pytest.raises(claims.InputError, match=message):
        untrained[0](*flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["curves.json", "posteriors.npz"])
def test_damaged_net_is_named(name, untrained):
    out = untrained[0]("--seeds", "0", "--nets", "A", "E")
    (out / "A-0" / name).write_text("{")
    with pytest.raises(claims.InputError, match=f"A-0/{name} is missing or damaged: expected"):
        untrained[0]("--seeds", "0", "--nets", "A", "E")


def test_out_must_be_a_folder(untrained, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(claims.InputError, match=r"--out .*out cannot be made \(File exists\)"):
        untrained[0]("--seeds", "0", "--nets", "A")
