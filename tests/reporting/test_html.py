"""Reports: their content, and what they say about missing parts."""

import dataclasses
import html.parser
import json
import os
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.helpers.photos import make_photo_folder
from tests.helpers.reports import record, write_run
from vgg_jax import cli
from vgg_jax.evaluation.evaluate import Evaluation, save_evaluation
from vgg_jax.reporting.collect import collect
from vgg_jax.reporting.html import report

pytestmark = pytest.mark.usefixtures("small_nets")


class Page(html.parser.HTMLParser):
    """The text of a page, the titles of its parts, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.text, self.titles, self.loads, self.open = "", [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.loads.append(value)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("h3", "h2"):
            self.titles.append(data)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_photo_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "shallow", photos)


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """The notes of a report, its page and the folder of its figures."""
    folder = tmp_path_factory.mktemp("report")
    notes = report([run], folder / "report.html", figures=folder / "figures")
    return notes, Page((folder / "report.html").read_text()), folder / "figures"


def test_page_has_all_parts(written):
    notes, page, _ = written
    assert notes == []
    assert page.titles == [
        "Curves",
        "Classes",
        "The most confident mistakes",
        "The least confident hits",
        "Where the net looks",
        "What the net computes",
        "Where the time goes",
        "Parameters and multiply-adds",
        "How it was made",
    ]
    assert "vgg-jax train photos" in page.text
    assert "jax 1.2.3" in page.text
    assert "75.00%" in page.text  # the best validation accuracy
    assert "All 7 validation images, centre crops." in page.text


def test_page_needs_no_network(written):
    _, page, _ = written
    assert page.loads
    assert all(address.startswith(("data:image/", "#")) for address in page.loads)


def test_figures_are_files(written):
    _, _, folder = written
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "loss.svg",
        "top1_error.svg",
        "confusion.svg",
        "filters.svg",
        "activations.svg",
        "time.svg",
        "grad-cam-1.jpg",
        "score-map-1.jpg",
    }
    assert "top5_error.svg" not in names  # there are two classes
    num_photos = sum(name.startswith(("mistake", "hit")) for name in names)
    assert num_photos == 7
    with Image.open(folder / "grad-cam-1.jpg") as image:
        assert image.size == (24, 24)


def test_galleries_show_the_files_of_the_evaluation(run, photos):
    result = collect(run)
    assert len(result.mistakes) + len(result.hits) == 7
    for picture in result.mistakes + result.hits:
        is_hit = picture.label == picture.prediction
        assert is_hit == (picture in result.hits)
        assert os.path.basename(os.path.dirname(picture.file)) == picture.label
        with Image.open(picture.file) as image:
            expected = image.convert("RGB").resize(
                [round(side * 24 / min(image.size)) for side in image.size],
                Image.Resampling.BILINEAR,
            )
        left, top = ((side - 24) // 2 for side in expected.size)
        square = np.asarray(expected)[top : top + 24, left : left + 24].astype(int)
        assert np.abs(picture.pixels - square).mean() < 3


def test_saved_evaluation_is_used(run, photos, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    result = collect(copy)
    # All images are taken for the first class.
    posteriors = np.tile(np.float32([[0.9, 0.1]]), (7, 1))
    evaluation = dataclasses.replace(result.evaluation, posteriors=posteriors)
    facts = {
        "data": photos,
        "split": "val",
        "epoch": 2,
        "scales": [24],
        "protocol": {"name": "dense"},
    }
    save_evaluation(copy / "val-dense-24", evaluation, facts)
    again = collect(copy)
    np.testing.assert_array_equal(again.evaluation.posteriors, posteriors)
    assert again.evaluated == (
        "All 7 validation images, protocol dense, Q = 24, from val-dense-24/."
    )
    assert [picture.posterior for picture in again.mistakes] == pytest.approx([0.9] * 4)
    # That of another epoch, or of other data, is not.
    for changed in ({"epoch": 1}, {"data": "digits"}, {"split": "test"}):
        save_evaluation(copy / "val-dense-24", evaluation, facts | changed)
        assert collect(copy).is_sample


def test_several_runs_are_compared(run, photos, tmp_path):
    other = write_run(tmp_path / "wide", photos, [record(1, 0.9)], best_epoch=1, batch_size=64)
    report([run, other], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert page.titles[0] == "Comparison"
    assert page.titles.count("Classes") == 2
    assert {"shallow", "wide"} <= set(page.titles)
    rows = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", (tmp_path / "report.html").read_text())
    cells = {name: re.findall("<td>(.*?)</td>", row) for name, row in rows}
    assert cells["batch_size"] == ["256", "64"]
    assert cells["validation accuracy"] == ["75.00%", "90.00%"]
    assert "momentum" not in cells  # it is the same


def test_runs_without_epochs_are_compared(run, photos, tmp_path):
    other = write_run(tmp_path / "new", photos, records=())
    report([run, other], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<th>best epoch</th><td>2</td><td>–</td>" in text


def test_run_without_epoch_gets_one_sentence(photos, tmp_path):
    folder = write_run(tmp_path / "run", photos, records=())
    (folder / "diverged.txt").write_text("the loss is not finite in epoch 1\n")
    notes = report([folder], tmp_path / "report.html")
    assert notes[0] == "The run diverged: the loss is not finite in epoch 1."
    assert notes[1].startswith("No epoch has finished")
    page = Page((tmp_path / "report.html").read_text())
    assert page.titles == ["Parameters and multiply-adds", "How it was made"]


def test_moved_photos_get_one_sentence(run, tmp_path, capsys):
    moved = make_photo_folder(tmp_path / "moved")
    folder = write_run(tmp_path / "run", moved)
    os.rename(moved, tmp_path / "elsewhere")
    out = tmp_path / "report.html"
    assert cli.main(["report", str(folder), "-o", str(out)]) == 0
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("vgg-jax: The photos are not shown: ") and moved in line
    titles = Page(out.read_text()).titles
    assert "Curves" in titles and "What the net computes" in titles
    assert (
        cli.main(["report", str(folder), "-o", str(out), "--data", str(tmp_path / "elsewhere")])
        == 0
    )
    assert capsys.readouterr().err == ""
    assert "Where the net looks" in Page(out.read_text()).titles


def test_missing_net_gets_one_sentence(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "best")
    (note,) = report([copy], tmp_path / "report.html")
    assert note.startswith("The net is not shown: no trained network in")


def test_figures_that_cannot_be_written_get_one_sentence(run, tmp_path):
    (tmp_path / "file").write_text("")
    (note,) = report([run], tmp_path / "report.html", figures=tmp_path / "file")
    assert note.startswith("The figures were not saved in") and "--figures" in note
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("runs", "out", "message"),
    [
        (["missing"], "report.html", "no run in missing"),
        (["RUN", "RUN"], "report.html", "is passed twice: expected different runs"),
        (
            ["RUN"],
            "no/report.html",
            "cannot write no/report.html: expected the name",
        ),
        (["RUN"], "report", "expected a file ending in .html"),
    ],
)
def test_wrong_arguments_are_refused(run, tmp_path, monkeypatch, capsys, runs, out, message):
    monkeypatch.chdir(tmp_path)
    arguments = [str(run) if name == "RUN" else name for name in runs]
    assert cli.main(["report", *arguments, "-o", out]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_names_are_escaped(run, photos, tmp_path):
    copy = shutil.copytree(run, tmp_path / "a<b>&c")
    content = json.loads((copy / "run.json").read_text())
    content["command"] = "vgg-jax train '<script>'"
    (copy / "run.json").write_text(json.dumps(content))
    report([copy], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<script>" not in text and "<b>&c" not in text
    assert "&lt;script&gt;" in text


def test_large_net_is_evaluated_on_a_sample(run, monkeypatch):
    monkeypatch.setattr("vgg_jax.reporting.collect.MAX_IMAGES", 3)
    result = collect(run)
    assert len(result.evaluation.labels) == 3
    assert result.evaluated == "3 of 7 validation images, drawn at random, centre crops."
    again = collect(run)
    np.testing.assert_array_equal(again.evaluation.files, result.evaluation.files)
    assert isinstance(again.evaluation, Evaluation)
