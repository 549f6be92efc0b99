"""A CPU convolves bfloat16 in the way that is faster, and remembers which one that is."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.compare import assert_close_to_largest
from tests.helpers.convolution import reference_conv, value_and_grads
from tests.helpers.tiny import DEEP, images, init
from vgg_jax import VGG, InputError, compile_inference
from vgg_jax.cli import main
from vgg_jax.evaluation.dense import class_posteriors
from vgg_jax.inference import pack_kernels
from vgg_jax.ops import bfloat16
from vgg_jax.ops.bfloat16 import ConvTimes, choose_bfloat16_conv
from vgg_jax.ops.convolution import convolution
from vgg_jax.runtime.compiler import compiler_options, has_onednn_bfloat16

TIMES = ConvTimes(onednn=3e-3, packed=2e-3, unpacked=4e-3)

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="only a CPU chooses")


@pytest.fixture(autouse=True)
def measurements(monkeypatch, tmp_path):
    """An empty folder, XLA with oneDNN, and a list: each measurement takes its last times."""
    queue = [TIMES]
    monkeypatch.delenv("VGG_JAX_BFLOAT16", raising=False)
    monkeypatch.setattr(bfloat16, "has_onednn_bfloat16", lambda: True)
    monkeypatch.setattr(bfloat16, "programs_folder", lambda: str(tmp_path / "programs"))
    monkeypatch.setattr(bfloat16, "_measure", queue.pop)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    choose_bfloat16_conv.cache_clear()
    jax.clear_caches()  # tmeasurements contain the choice
    yield queue
    choose_bfloat16_conv.cache_clear()
    jax.clear_caches()


def choose_again():
    """Chooses as a new process would."""
    choose_bfloat16_conv.cache_clear()
    return choose_bfloat16_conv()


def kept_files(tmp_path):
    return sorted((tmp_path / "programs").iterdir())


@pytest.mark.parametrize(
    ("milliseconds", "inference", "training"),
    [
        ((1, 2, 3), True, True),
        ((4, 2, 3), False, False),
        ((2.2, 2, 3), False, True),
        ((2.2, 3, 2), True, True),  # noise: a kernel that is packed cannot cost more
        ((2, 2.5, 2.5), False, False),  # too close
    ],
)
def test_shorter_time_decides(milliseconds, inference, training, measurements):
    measurements[:] = [ConvTimes(*(value / 1000 for value in milliseconds))]
    assert choose_bfloat16_conv()[:2] == (inference, training)
    assert choose_bfloat16_conv()[:2] == (inference, training)
    assert not measurements  # measured once


def test_shortest_times():
    """Two functions in turn. The first calls are slow, and some others."""
    durations = iter([90, 90] + [5, 7] * (bfloat16._ROUNDS - 2) + [4, 9])
    now = 0

    def wait():
        nonlocal now
        now += next(durations)

    assert bfloat16._shortest_times([wait, wait], lambda: now) == [4, 7]
    assert next(durations, None) is None


def test_times_are_kept(measurements, tmp_path):
    assert "; measured, " in choose_bfloat16_conv().describe()
    (file,) = kept_files(tmp_path)
    content = json.loads(file.read_text())
    assert content["seconds"] == {"onednn": 3e-3, "packed": 2e-3, "unpacked": 4e-3}
    assert choose_again()[:2] == (False, True)
    assert choose_again().describe() == (
        "bfloat16 convolutions: float32 for inference, oneDNN for training (oneDNN 3.0 ms; "
        f"float32 2.0 ms in inference, 4.0 ms in training; measured before, {file})"
    )


@pytest.mark.parametrize("changed", ["jaxlib", "threads", "cpu"])
def test_other_conditions_are_measured_again(changed, measurements, monkeypatch, tmp_path):
    measurements.insert(0, ConvTimes(1e-3, 2e-3, 4e-3))
    assert not choose_bfloat16_conv().inference_in_onednn
    conditions = bfloat16._conditions()
    monkeypatch.setattr(bfloat16, "_conditions", lambda: conditions | {changed: "other"})
    assert choose_again().inference_in_onednn
    assert len(kept_files(tmp_path)) == 2
    monkeypatch.setattr(bfloat16, "_conditions", lambda: conditions)
    assert not choose_again().inference_in_onednn  # both are kept


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"seconds": 3}',
        '{"seconds": {"onednn": 1}}',
        '{"seconds": {"onednn": 1, "packed": "2", "unpacked": 3}}',
        '{"seconds": {"onednn": NaN, "packed": 2, "unpacked": 3}}',
        '{"seconds": {"onednn": 1, "packed": 0, "unpacked": 3}}',
        "\udcff",
    ],
)
def test_damaged_file_is_measured_again(content, measurements, tmp_path):
    measurements.append(TIMES)
    choose_bfloat16_conv()
    (file,) = kept_files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(content.encode(errors="surrogateescape"))
    assert choose_again()[:2] == (False, True)
    assert not measurements
    assert file.read_bytes() == whole


def test_folder_that_cannot_be_written(measurements, tmp_path):
    """The times are measured in each process."""
    measurements.append(TIMES)
    (tmp_path / "programs").write_text("")
    for _ in range(2):
        assert "measured, and not kept in " in choose_again().describe()
    assert not measurements


def test_times_of_a_busy_machine_are_not_kept(measurements, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "getloadavg", lambda: (bfloat16._count_threads() + 0.1, 0.0, 0.0))
    assert "measured while other programs ran, and not kept" in choose_bfloat16_conv().describe()
    assert not (tmp_path / "programs").exists()
    monkeypatch.setattr(os, "getloadavg", lambda: (bfloat16._count_threads() - 0.1, 0.0, 0.0))
    measurements[:] = [TIMES]
    choose_again()
    assert len(kept_files(tmp_path)) == 1


def test_store_is_not_written(measurements, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bfloat16, "programs_folder", lambda: "gs://bucket/programs")
    assert (
        choose_bfloat16_conv()
        .describe()
        .endswith("measured, and not kept in gs://bucket/programs)")
    )
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("setting", "onednn"), [("onednn", True), ("float32", False)])
def test_variable_replaces_choice(setting, onednn, measurements, monkeypatch):
    monkeypatch.setenv("VGG_JAX_BFLOAT16", setting)
    assert choose_bfloat16_conv()[:2] == (onednn, onednn)
    assert measurements  # nothing was measured
    assert f"(VGG_JAX_BFLOAT16 is '{setting}')" in choose_bfloat16_conv().describe()
    monkeypatch.setattr(bfloat16, "has_onednn_bfloat16", lambda: False)
    assert choose_again()[:2] == (False, False)
    assert "XLA has no bfloat16 convolution in oneDNN here" in choose_again().describe()


def test_variable_rejects_other_values(monkeypatch):
    monkeypatch.setenv("VGG_JAX_BFLOAT16", "amx")
    with pytest.raises(InputError, match="VGG_JAX_BFLOAT16 is 'amx': expected 'onednn' or 'float3"):
        choose_bfloat16_conv()


@pytest.mark.parametrize(("flags", "onednn"), [("avx512_bf16 amx_bf16", True), ("avx512_bf16", 0)])
def test_processes_of_one_run_measure_nothing(flags, onednn, measurements, monkeypatch):
    """The times differ between processes, and would give them different programs."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(bfloat16, "_describe_cpu", lambda: f"A processor {flags}")
    assert choose_bfloat16_conv()[:2] == (onednn, onednn)
    assert measurements


def test_selfcheck_prints_choice(measurements, monkeypatch, capsys):
    monkeypatch.setattr("vgg_jax.selfcheck.run_checks", lambda: [])
    main(["selfcheck"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == choose_bfloat16_conv().describe()
    assert "float32 for inference, oneDNN for training (oneDNN 3.0 ms; float32 2.0 ms in" in line


def test_measurement_ignores_callers_settings(monkeypatch):
    """The real measurement runs outside of the trace, the mesh and the precision of its caller."""
    monkeypatch.undo()
    monkeypatch.setattr(bfloat16, "_SHAPE", (1, 8, 8, 16))
    times = []

    def measure_while_traced(x):
        assert isinstance(x, jax.core.Tracer)
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2,), ("data",))):
            monkeypatch.setattr(bfloat16, "has_onednn_bfloat16", lambda: True)
            monkeypatch.setattr(bfloat16, "programs_folder", lambda: "gs://none")
            monkeypatch.delenv("VGG_JAX_BFLOAT16", raising=False)
            times.append(bfloat16._read_or_measure()[0])
        return x

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        jax.jit(measure_while_traced)(jnp.ones(3))
    (measured,) = times
    assert all(0 < seconds < 1 for seconds in measured)


@pytest.mark.parametrize("setting", ["onednn", "float32"])
def test_ways_are_accurate(setting, monkeypatch):
    """Values and gradients against XLA's convolution in float64."""
    monkeypatch.setattr(bfloat16, "has_onednn_bfloat16", has_onednn_bfloat16)
    monkeypatch.setenv("VGG_JAX_BFLOAT16", setting)
    rng = np.random.default_rng(0)
    shapes = (2, 9, 10, 16), (3, 3, 16, 24), (24,), (2, 9, 10, 24)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    arrays[2] *= 0  # the bias is added after rounding
    jitted = jax.jit(
        lambda *arrays: value_and_grads(convolution, *arrays),
        compiler_options=compiler_options(dtype=jnp.bfloat16),
    )
    calls = 2 if setting == "onednn" and has_onednn_bfloat16() else 0
    text = jitted.lower(*arrays).compile().as_text()
    assert text.count('custom_call_target="__onednn$convolution"') == calls
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(array, np.float64)) for array in arrays]
        expected = [np.asarray(array) for array in value_and_grads(reference_conv, *exact)]
    for actual, value in zip(jitted(*arrays), expected, strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_close_to_largest(np.asarray(actual, np.float64), value, 5e-3)


@pytest.mark.parametrize(("onednn", "dtype"), [(1e-3, jnp.bfloat16), (9e-3, jnp.float32)])
def test_inference_takes_faster_way(onednn, dtype, measurements):
    """Float32 filters are packed for the float32 way, whose result is also closer to the net's."""
    measurements[:] = [TIMES._replace(onednn=onednn)]
    model = VGG(DEEP, 7, image_size=32, dtype=jnp.bfloat16)
    variables, x = init(model), images(2, 32, 32)
    packed = pack_kernels(variables, jnp.bfloat16)["packed"]
    assert ("conv2_2" in packed) == (dtype == jnp.float32)
    compiled = compile_inference(model, variables)
    assert compiled.args[0]["packed"]["fc6"].dtype == dtype
    exact = np.asarray(model.clone(dtype=jnp.float32).apply(variables, x))
    logits = compiled(x)
    assert logits.dtype == jnp.bfloat16
    tolerance = 0.05 if dtype == jnp.bfloat16 else 5e-3  # 2**-8 is the result's own rounding
    assert_close_to_largest(logits.astype(jnp.float32), exact, tolerance)


def test_predictions_take_faster_way(measurements):
    """If float32 wins, a bfloat16 net predicts what the float32 one does."""
    measurements[:] = [TIMES._replace(onednn=9e-3)]
    model = VGG(DEEP, 7, image_size=32)
    variables = init(model)
    photos = np.random.default_rng(0).integers(256, size=(2, 40, 36, 3), dtype=np.uint8)
    expected = class_posteriors(model, variables, [[photo] for photo in photos])
    actual = class_posteriors(
        model.clone(dtype=jnp.bfloat16), variables, [[photo] for photo in photos]
    )
    np.testing.assert_array_equal(actual, expected)
