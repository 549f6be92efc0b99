"""The figures that `vgg_jax.reporting` returns, and their look."""

import io
import re
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest

from tests.helpers.reports import RECORDS, record, write_run
from vgg_jax import InputError, reporting
from vgg_jax.evaluation.evaluate import Evaluation, save_evaluation
from vgg_jax.evaluation.explain import Explanation
from vgg_jax.reporting.history import read_run
from vgg_jax.reporting.net_figures import cam_overlay, plot_filters, score_overlay
from vgg_jax.reporting.run_figures import plot_confusion, plot_time
from vgg_jax.reporting.style import INK, figure_bytes, inline_svg

pytestmark = pytest.mark.usefixtures("small_nets")


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
    assert [text.get_text() for text in error.texts] == ["0.01"]
    assert [text.get_text() for text in loss.texts] == ["0.01", "guessing"]


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


def explanation(posterior_map, grad_cam, window=32, stride=32, cam_stride=16):
    maps = np.float32(posterior_map), np.float32(grad_cam)
    return Explanation(
        np.float32([1]), 0, maps[0], maps[0], maps[1], "relu", window, stride, cam_stride
    )


def brightness(overlay):
    return overlay.astype(int).sum(-1)


def test_score_map_is_painted_at_the_centres_of_its_windows():
    # Windows of 32 pixels, whose centres along x are 16, 48 and 80. The last 7 columns are in none.
    result = explanation([[0, 1, 0], [0, 0, 0]], [[0]])
    painted = brightness(score_overlay(np.zeros((64, 103, 3), np.uint8), result))
    assert painted.shape == (64, 103)
    top, bottom = painted[:16], painted[48:]
    assert (top == top[0]).all() and (bottom == bottom[0, 0]).all()
    assert (top[0, :16] == top[0, 0]).all() and (top[0, 80:] == top[0, 0]).all()
    assert (np.diff(top[0, 15:48]) >= 0).all() and (np.diff(top[0, 48:81]) <= 0).all()
    assert top[0].argmax() in (47, 48)


@pytest.mark.parametrize("swapped", [False, True])
def test_grad_cam_is_painted_at_the_centres_of_its_positions(swapped):
    """Positions are 16 pixels apart, and the last 10 pixels of a side belong to none."""
    cam = np.zeros((2, 4), np.float32)
    cam[1, 2] = 5
    photo = np.zeros((42, 74, 3), np.uint8)
    if swapped:
        cam, photo = cam.T, photo.swapaxes(0, 1)
    painted = brightness(cam_overlay(photo, explanation([[1]], cam)))
    painted = painted.T if swapped else painted
    # The centre of row 1 is 24, and that of column 2 is 40. Below the last row, it goes on.
    assert painted[24].argmax() in (39, 40)
    assert painted[:, 40].argmax() in (23, 24)
    assert painted[41, 40] == painted[24, 40] > painted[16, 40] > painted[7, 40] == painted.min()
    assert painted[24, 25] > painted.min() == painted[24, 23]


def test_svg_takes_the_colours_of_the_page(run):
    figure = reporting.curves(run)
    svg = inline_svg(figure, "a <label>")
    assert 'aria-label="a &lt;label&gt;"' in svg
    assert INK not in svg and "currentColor" in svg and "var(--grid)" in svg
    ElementTree.fromstring(svg)
    identifiers = re.findall(r'\bid="([^"]+)"', svg)
    assert len(set(identifiers)) == len(identifiers)
    references = re.findall(r'(?:url\(#|href="#)([^)"]+)', svg)
    assert set(references) <= set(identifiers)
    assert not set(identifiers) & set(
        re.findall(r'\bid="([^"]+)"', inline_svg(plot_filters(np.ones((3, 3, 3, 2))), ""))
    )


def test_figures_leave_the_settings_of_matplotlib_alone(run):
    before = dict(matplotlib.rcParams)
    first = figure_bytes(reporting.curves(run), "svg")
    assert dict(matplotlib.rcParams) == before
    assert figure_bytes(reporting.curves(run), "svg") == first


def test_names_with_dollars_and_rare_letters_are_drawn():
    """matplotlib warns of letters that a font lacks, and warnings are errors here."""
    names = ["$x_1$", "\u8682\u8681", "a" * 60, "\udcff"]
    figure = reporting.confusion(
        Evaluation(
            np.eye(4, dtype=np.float32), np.arange(4), np.array(list("abcd")), np.array(names)
        )
    )
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[0] == "$x_1$" and len(labels[1]) == 2 and len(labels[2]) == 16
    figure.savefig(io.BytesIO(), format="png")  # outside of `figure_style`, as in a notebook
    assert "$x_1$" in figure_bytes(figure, "svg").decode()


def test_names_of_runs_may_begin_with_an_underscore(photos, tmp_path):
    runs = [write_run(tmp_path / name, photos, [record(1, 0.9)], best_epoch=1) for name in "_a"]
    legend = reporting.curves(runs).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["_", "a"]


def test_loss_that_explodes_is_cut_off(photos, tmp_path):
    records = [record(epoch, 0.5) for epoch in (1, 2, 3)]
    records[2]["train"]["loss"] = 1e6
    folder = write_run(tmp_path / "run", photos, records, best_epoch=1)
    axes = reporting.curves(folder).axes[0]
    # The loss of guessing between two classes is ln 2.
    assert axes.get_ylim() == pytest.approx((0, 3 * np.log(2)))
    assert axes.get_title() == "loss (cross-entropy), cut off at 2.1"


def test_confusion_of_many_classes_is_in_its_place():
    matrix = np.zeros((1001, 1001), int)
    matrix[1000, 0] = 1
    image = plot_confusion(matrix, [str(i) for i in range(1001)]).axes[0].images[0]
    assert image.get_array().shape == (201, 201)
    assert list(image.get_extent()) == [-0.5, 1004.5, 1004.5, -0.5]  # blocks of five classes
    assert image.axes.get_xlim() == (-0.5, 1000.5)


def test_parts_of_the_time_are_named(run):
    figure = plot_time(read_run(run))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["training steps: 64%", "waiting for images: 7%", "validation: 29%"]


def test_notebooks_show_figures(run):
    """IPython shows an object by its method `_repr_png_`."""
    evaluation = Evaluation(np.eye(2), np.arange(2), np.array(["a", "b"]), np.array(["x", "y"]))
    preview = reporting.preview("digits", images=1, epochs=1)
    for figure in (reporting.curves(run), reporting.confusion(evaluation), preview):
        assert figure._repr_png_().startswith(b"\x89PNG")


def test_shares_are_not_cut_off(photos, tmp_path):
    """Most top-1 errors are 0 here, and so is their median."""
    records = [record(1, 0.5), *(record(epoch, 1.0) for epoch in (2, 3, 4))]
    axes = reporting.curves(write_run(tmp_path / "run", photos, records)).axes[1]
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 0.5
    assert axes.get_title() == "top-1 error"


def test_curves_of_a_missing_run(tmp_path):
    with pytest.raises(InputError, match="there is no run"):
        reporting.curves([])
    with pytest.raises(InputError, match="no run in"):
        reporting.curves(tmp_path)
