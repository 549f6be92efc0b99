"""Runs with AdamW, a cosine schedule with a warm-up, and label smoothing.

An epoch has 3 steps of training and 1 batch of validation, and a run has 3 epochs.
"""

import dataclasses
import json

import numpy as np
import pytest

from tests.helpers.events import read_scalars
from tests.helpers.runs import load_last_arrays, make_config
from tests.training.test_divergence import diverging_trainer
from tests.training.test_loop import InterruptedTrainer, assert_equal_runs
from vgg_jax import InputError
from vgg_jax.training.loop import fit
from vgg_jax.training.optimizer import set_learning_rate
from vgg_jax.training.trainer import DivergedError, Trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_nets")]

SETTINGS = {"optimizer": "adamw", "label_smoothing": 0.1, "learning_rate": 1e-3, "drop_epochs": ()}
COSINE = SETTINGS | {"schedule": "cosine", "warmup_epochs": 1}
# Three steps of the warm-up, and half a cosine in the six others.
FACTORS = (0, 1 / 3, 2 / 3, 1, (2 + 3**0.5) / 4, 0.75, 0.5, 0.25, (2 - 3**0.5) / 4)


@pytest.fixture(scope="module")
def cosine_run(photos, small_nets, tmp_path_factory):
    """The workdir of a run with events, and its history."""
    workdir = tmp_path_factory.mktemp("cosine_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vgg_jax.reporting.events.POINT_SECONDS", 0)
        return workdir, fit(make_config(photos, **COSINE), workdir, tensorboard=True).history


def test_records_have_the_rate_of_the_last_step(cosine_run):
    """And a point of TensorBoard's has the rate of its step."""
    workdir, history = cosine_run
    rates = [record["learning_rate"] for record in history]
    assert rates == pytest.approx([1e-3 * factor for factor in FACTORS[2::3]], rel=1e-5)
    points = read_scalars(workdir / "tensorboard")["learning_rate"]
    expected = {step: 1e-3 * factor for step, factor in enumerate(FACTORS, 1)}
    assert points == pytest.approx(expected, rel=1e-5)


def test_steps_have_the_rates_of_the_schedule(cosine_run, photos, tmp_path):
    """The run equals one whose rates are set by hand, up to the rounding of the rates."""

    class ByHandTrainer(Trainer):
        def train_step(self, state, batch):
            opt_state = set_learning_rate(state.opt_state, 1e-3 * FACTORS[int(state.step)])
            return super().train_step(dataclasses.replace(state, opt_state=opt_state), batch)

    config = make_config(photos, **SETTINGS, schedule="constant")
    history = fit(config, tmp_path, trainer_class=ByHandTrainer).history
    for record, expected in zip(cosine_run[1], history, strict=True):
        assert record["train"]["loss"] == pytest.approx(expected["train"]["loss"], rel=1e-5)
    arrays, expected = (load_last_arrays(run)["params"] for run in (cosine_run[0], tmp_path))
    for name in ("conv1_1", "conv2_1", "fc6", "fc7", "fc8"):
        # The bias before a batch normalisation has no gradient but rounding, which AdamW scales up.
        kernel = arrays[name]["kernel"]
        np.testing.assert_allclose(kernel, expected[name]["kernel"], atol=2e-5, err_msg=name)


def test_fit_resumes_to_the_bit(cosine_run, photos, tmp_path):
    """Stopped in the warm-up, in its validation, and in the cosine."""

    class StoppedTrainer(InterruptedTrainer):
        stop_at = (2, 4, 7)

    config = make_config(photos, **COSINE)
    for _ in range(3):
        assert fit(config, tmp_path, trainer_class=StoppedTrainer).stopped
    result = fit(config, tmp_path, trainer_class=StoppedTrainer)
    assert not result.stopped
    assert_equal_runs(tmp_path, result.history, cosine_run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 4}, "epochs is 3 in run.json and 4 now, and may not change with schedule"),
        ({"optimizer": "sgd"}, "optimizer is 'adamw' in run.json and 'sgd' now"),
        ({"label_smoothing": 0.2}, "label_smoothing is 0.1 in run.json and 0.2 now"),
    ],
)
def test_fit_refuses_other_settings(changes, message, cosine_run, photos):
    with pytest.raises(InputError, match=message):
        fit(make_config(photos, **COSINE | changes), cosine_run[0])


def test_run_of_an_earlier_version_is_finished(finished_run, photos, tmp_path):
    """Its run.json has none of the settings. Those of AdamW are refused."""
    workdir, history = finished_run
    path = tmp_path / "run"
    path.mkdir()
    for name in ("metrics.jsonl", "last", "best"):
        (path / name).symlink_to(workdir / name)
    content = json.loads((workdir / "run.json").read_text())
    for name in ("optimizer", "label_smoothing", "warmup_epochs"):
        del content["config"][name]
    (path / "run.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"optimizer is 'sgd' in run\.json and 'adamw' now"):
        fit(make_config(photos, optimizer="adamw"), path)
    assert fit(make_config(photos), path).history == history


def test_halving_halves_the_rest_of_the_schedule(photos, tmp_path):
    config = make_config(photos, **COSINE)
    trainer_class = diverging_trainer({5})
    history = fit(config, tmp_path, on_nan="halve", trainer_class=trainer_class).history
    halves = [1e-3 * FACTORS[2], 5e-4 * FACTORS[5], 5e-4 * FACTORS[8]]
    assert [record["learning_rate"] for record in history] == pytest.approx(halves, rel=1e-5)
    opt_state = load_last_arrays(tmp_path)["opt_state"]
    assert float(opt_state["hyperparams"]["learning_rate"]) == pytest.approx(5e-4)


def test_divergence_names_the_highest_rate(photos, tmp_path):
    """The hint divides it by 10 for the next run."""
    with pytest.raises(DivergedError, match=r"a learning rate of at most 0\.001") as error:
        fit(make_config(photos, **COSINE), tmp_path, trainer_class=diverging_trainer({9}))
    assert error.value.rate == 1e-3
