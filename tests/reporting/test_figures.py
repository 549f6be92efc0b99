"""The figures that `vgg_jax.reporting` returns, and their look."""

import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from tests.helpers.photos import make_photo_folder
from tests.helpers.reports import RECORDS, record, write_run
from vgg_jax import InputError, reporting
from vgg_jax.evaluation.evaluate import Evaluation, save_evaluation
from vgg_jax.evaluation.explain import Explanation
from vgg_jax.reporting.net_figures import cam_overlay, plot_filters, score_overlay
from vgg_jax.reporting.run_figures import plot_confusion
from vgg_jax.reporting.style import INK, figure_bytes, inline_svg

pytestmark = pytest.mark.usefixtures("small_nets")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "shallow", photos)


def lines_by_style(axes):
    """The y values of the lines of an axes, by line style."""
    return {
        line.get_linestyle(): list(line.get_ydata())
        for line in axes.get_lines()
        if len(line.get_ydata()) > 2
    }


def test_curves_are_those_of_the_records(run):
    figure = reporting.curves(run)
    loss, error = figure.axes  # two classes have no top-5 error
    assert lines_by_style(loss) == {
        "-": [line["validation"]["loss"] for line in RECORDS],
        "--": [line["train"]["loss"] for line in RECORDS],
    }
    assert lines_by_style(error)["-"] == [0.5, 0.25, 0.25, 0.375]
    marks = [line for line in error.get_lines() if line.get_marker() == "*"]
    assert [(*mark.get_xdata(), *mark.get_ydata()) for mark in marks] == [(2, 0.25)]
    changes = [line for line in error.get_lines() if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in changes] == [2.5]
    assert [text.get_text() for text in error.texts] == ["1e-2"]


def test_curves_of_several_runs_have_their_names(run, photos, tmp_path):
    other = write_run(tmp_path / "other", photos, [record(1, 0.9)], best_epoch=1)
    empty = write_run(tmp_path / "empty", photos, records=())
    legend = reporting.curves([run, other, empty]).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["shallow", "other"]
    assert reporting.curves(empty).axes[0].texts[0].get_text() == "no finished epoch"


def test_confusion_takes_evaluations_and_their_folders(tmp_path):
    evaluation = Evaluation(
        np.float32([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]]),
        np.array([0, 1, 1]),
        np.array(["a", "b", "c"]),
        np.array(["cat", "dog"]),
    )
    save_evaluation(tmp_path, evaluation, {})
    for argument in (evaluation, tmp_path, str(tmp_path / "posteriors.npz")):
        axes = reporting.confusion(argument).axes[0]
        assert [text.get_text() for text in axes.texts] == ["1", "1", "1"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog"]
        np.testing.assert_array_equal(axes.images[0].get_array(), [[1, 0], [0.5, 0.5]])


def test_large_confusion_matrix_keeps_each_cell():
    matrix = np.zeros((1000, 1000), int)
    matrix[np.arange(1000), np.arange(1000)] = 1
    matrix[3, 998] = 1
    shown = plot_confusion(matrix, [str(i) for i in range(1000)]).axes[0].images[0].get_array()
    assert shown.shape == (250, 250)
    assert shown[0, 249] == 0.5 and shown[0, 0] == 1 and shown.sum() == 250.5


def test_filters_are_scaled_and_grey_at_zero():
    kernel = np.zeros((3, 3, 3, 5), np.float32)
    kernel[0, 0, 0, 0] = -2
    image = plot_filters(kernel).axes[0].images[0].get_array()
    assert image.shape == (2 * 4 - 1, 3 * 4 - 1, 4)
    np.testing.assert_allclose(image[0, 0], [0, 0.5, 0.5, 1])
    np.testing.assert_allclose(image[0, 4], [0.5, 0.5, 0.5, 1])
    assert image[0, 3, 3] == 0  # between two filters


def explanation(posterior_map, grad_cam, window, stride):
    maps = np.float32(posterior_map), np.float32(grad_cam)
    return Explanation(np.float32([1]), 0, maps[0], maps[0], maps[1], "relu", window, stride)


def test_score_map_is_painted_at_the_centres_of_its_windows():
    # Windows of 32 pixels at 0 and 32: their centres are 16 and 48.
    result = explanation([[0, 1]], [[0]], 32, 32)
    painted = score_overlay(np.zeros((32, 64, 3), np.uint8), result)[0].astype(int).sum(-1)
    assert (painted[:16] == painted[0]).all() and (painted[48:] == painted[48]).all()
    assert (np.diff(painted[15:49]) >= 0).all() and painted[48] > painted[16]


def test_grad_cam_is_painted_over_the_whole_photo():
    result = explanation([[1]], [[0, 0], [0, 5]], 32, 32)
    painted = cam_overlay(np.zeros((40, 40, 3), np.uint8), result).astype(int).sum(-1)
    assert painted.argmax() // 40 >= 30 and painted.argmax() % 40 >= 30
    assert painted[:10, :10].max() == painted.min()


def test_svg_takes_the_colours_of_the_page(run):
    figure = reporting.curves(run)
    svg = inline_svg(figure)
    assert INK not in svg and "currentColor" in svg and "var(--grid)" in svg
    ElementTree.fromstring(svg)
    identifiers = re.findall(r'\bid="([^"]+)"', svg)
    assert len(set(identifiers)) == len(identifiers)
    references = re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)
    assert set(references) <= set(identifiers)
    assert not set(identifiers) & set(
        re.findall(r'\bid="([^"]+)"', inline_svg(plot_filters(np.ones((3, 3, 3, 2)))))
    )


def test_figures_leave_the_settings_of_matplotlib_alone(run):
    before = dict(matplotlib.rcParams)
    first = figure_bytes(reporting.curves(run), "svg")
    assert dict(matplotlib.rcParams) == before
    assert figure_bytes(reporting.curves(run), "svg") == first


def test_names_with_dollars_and_rare_letters_are_drawn():
    names = ["$x_1$", "蚂蚁", "a" * 60]
    figure_bytes(plot_confusion(np.eye(3, dtype=int), names), "png")


def test_curves_of_a_missing_run(tmp_path):
    with pytest.raises(InputError, match="no run in"):
        reporting.curves(tmp_path)
