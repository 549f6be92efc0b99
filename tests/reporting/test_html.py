"""Reports: their content, and what they say about missing parts."""

import dataclasses
import html.parser
import json
import os
import re
import shutil
import tempfile
import time

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

from tests.helpers.photos import make_photo_folder
from tests.helpers.reports import record, write_run
from vgg_jax import InputError, cli
from vgg_jax.arrays import IN_MEMORY
from vgg_jax.evaluation.evaluate import Evaluation, save_evaluation
from vgg_jax.reporting.collect import collect
from vgg_jax.reporting.html import report

pytestmark = pytest.mark.usefixtures("small_nets")


class Page(html.parser.HTMLParser):
    """The text of a page, the titles of its parts, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.source = text
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
def written(run, tmp_path_factory):
    """The notes of a report, its page and the folder of its figures."""
    folder = tmp_path_factory.mktemp("report")
    result = report([run], folder / "report.html", figures=folder / "figures")
    assert result.has_figures
    return result.notes, Page((folder / "report.html").read_text()), folder / "figures"


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
    assert not re.search(r"url\((?!#)|@import|<link|<script", page.source)


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
        left, top = ((side - 24 + 1) // 2 for side in expected.size)  # an odd margin, half up
        square = np.asarray(expected)[top : top + 24, left : left + 24].astype(int)
        assert np.abs(picture.pixels - square).mean() < 3


def saved_evaluation(run, folder, **changes):
    """Saves an evaluation that takes all images for the first class, and returns its posteriors."""
    posteriors = np.tile(np.float32([[0.9, 0.1]]), (7, 1))
    evaluation = dataclasses.replace(collect(run).evaluation, posteriors=posteriors)
    data = json.loads((run / "run.json").read_text())["config"]["data"]
    facts = {"data": data, "split": "val", "epoch": 2, "scales": [24], "count": 7}
    save_evaluation(folder, evaluation, facts | {"protocol": {"name": "dense"}} | changes)
    return posteriors


def test_saved_evaluation_is_used(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    posteriors = saved_evaluation(copy, copy / "val-dense-24")
    result = collect(copy)
    np.testing.assert_array_equal(result.evaluation.posteriors, posteriors)
    assert result.evaluated == (
        "All 7 validation images, protocol dense, Q = 24, from val-dense-24/."
    )
    assert [picture.posterior for picture in result.mistakes] == pytest.approx([0.9] * 4)


@pytest.mark.parametrize(
    "changes",
    [{"epoch": 1}, {"data": "digits"}, {"split": "test"}, {"count": 6}, {"data": IN_MEMORY}],
)
def test_other_evaluations_are_not_used(run, tmp_path, changes):
    copy = shutil.copytree(run, tmp_path / "run")
    if changes.get("data") == IN_MEMORY:  # of a run on arrays, too
        text = (copy / "run.json").read_text()
        data = json.loads(text)["config"]["data"]
        saved_evaluation(copy, copy / "x", **changes)
        (copy / "run.json").write_text(text.replace(json.dumps(data), json.dumps(IN_MEMORY)))
        result = collect(copy)
        assert result.evaluation is None and "arrays in memory" in result.notes[0]
    else:
        saved_evaluation(copy, copy / "x", **changes)
        assert collect(copy).is_sample


def test_evaluation_of_moved_photos_is_used(tmp_path):
    moved = make_photo_folder(tmp_path / "moved")
    folder = write_run(tmp_path / "run", moved)
    elsewhere = str(tmp_path / "elsewhere")
    saved_evaluation(folder, folder / "elsewhere-val", data=elsewhere)
    os.rename(moved, elsewhere)
    assert collect(folder).evaluation is None
    result = collect(folder, elsewhere)
    assert not result.is_sample and len(result.mistakes) == 4 and result.notes == []


def test_photos_of_other_data_are_not_shown_under_an_evaluation(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    saved_evaluation(copy, copy / "val-dense-24")
    others = make_photo_folder(tmp_path / "others")
    os.rename(f"{others}/val/red/0.jpg", f"{others}/val/red/x.jpg")
    result = collect(copy, others)
    (note,) = result.notes
    assert note == (
        f"The photos are not shown: the images of {others} val are not those of the saved "
        "evaluation."
    )
    assert result.evaluation is not None and result.mistakes == []


def test_several_runs_are_compared(run, photos, tmp_path):
    other = write_run(tmp_path / "wide", photos, [record(1, 0.9)], best_epoch=1, batch_size=64)
    report([run, other], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert page.titles[0] == "Comparison"
    assert page.titles.count("Classes") == 2
    assert {"shallow", "wide"} <= set(page.titles)
    text = (tmp_path / "report.html").read_text()
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', text)
    cells = {name: re.findall("<td>(.*?)</td>", row) for name, row in rows}
    assert cells["batch_size"] == ["256", "64"]
    assert cells["accuracy, centre crops"] == ["75.00%", "90.00%"]
    assert "momentum" not in cells  # it is the same


def test_runs_without_epochs_are_compared(run, photos, tmp_path):
    other = write_run(tmp_path / "new", photos, records=())
    report([run, other], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert ">best epoch</th><td>2</td><td>–</td>" in text


def test_run_without_epoch_gets_one_sentence(photos, tmp_path):
    folder = write_run(tmp_path / "run", photos, records=())
    (folder / "diverged.txt").write_text("the loss is not finite in epoch 1 (images a, b)\n")
    notes = report([folder], tmp_path / "report.html").notes
    assert notes[0] == "The run diverged: the loss is not finite in epoch 1."
    assert notes[1].startswith("No epoch has finished") and "--learning-rate" in notes[1]
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
    assert line.startswith(
        "vgg-jax: The classes, the photos and where the net looks are not shown: "
    )
    assert moved in line
    titles = Page(out.read_text()).titles
    assert "Curves" in titles and "What the net computes" in titles
    assert (
        cli.main(["report", str(folder), "-o", str(out), "--data", str(tmp_path / "elsewhere")])
        == 0
    )
    assert capsys.readouterr().err == ""
    assert "Where the net looks" in Page(out.read_text()).titles


@pytest.mark.parametrize(
    ("name", "content", "message", "missing"),
    [
        ("metrics.jsonl", b"{", "The curves are not shown: ", "Curves"),
        ("diverged.txt", b"\xff", "The end of the run is unknown: ", None),
    ],
)
def test_damaged_file_gets_one_sentence(run, tmp_path, name, content, message, missing):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / name).write_bytes(content)
    (note,) = report([copy], tmp_path / "report.html").notes
    assert note.startswith(message) and name in note
    titles = Page((tmp_path / "report.html").read_text()).titles
    assert missing not in titles and "Where the net looks" in titles


def test_notes_of_several_runs_have_their_names(run, photos, tmp_path):
    empty = write_run(tmp_path / "empty", photos, records=())
    (note,) = report([run, empty], tmp_path / "report.html").notes
    assert note.startswith("empty: No epoch has finished")


def test_missing_net_gets_one_sentence(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "best")
    (note,) = report([copy], tmp_path / "report.html").notes
    assert note.startswith("The net is not shown: no trained network in")


def test_figures_that_cannot_be_written_get_one_sentence(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (note,) = report([run], tmp_path / "report.html", figures=tmp_path / "file").notes
    assert note.startswith("The figures were not saved in") and "--figures" in note
    assert (tmp_path / "report.html").exists()
    assert cli.main(["report", str(run), "--figures", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().out.endswith(" MB)\n")


def test_only_reports_are_replaced(run, tmp_path, capsys):
    path = tmp_path / "thesis.html"
    path.write_text("my thesis")
    assert cli.main(["report", str(run), "-o", str(path)]) == 2
    assert "thesis.html exists" in capsys.readouterr().err
    assert path.read_text() == "my thesis"
    for flags in (["--overwrite"], []):
        assert cli.main(["report", str(run), "-o", str(path), *flags]) == 0


def test_data_that_was_asked_for_must_be_there(run, tmp_path, capsys):
    out = ["-o", str(tmp_path / "report.html")]
    assert cli.main(["report", str(run), *out, "--data", str(tmp_path / "none")]) == 2
    assert "pass --data PATH with the folder" in capsys.readouterr().err


def test_missing_run_is_reported_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr("vgg_jax.reporting.html.collect", None)
    with pytest.raises(InputError, match="no run in"):
        report([run, tmp_path / "none"], tmp_path / "report.html")
    (tmp_path / "weights.h5").write_text("")
    with pytest.raises(InputError, match=r"weights\.h5 is a file: expected the folder of a run"):
        report([tmp_path / "weights.h5"], tmp_path / "report.html")


def test_run_that_has_not_learned_is_told(photos, tmp_path):
    line = record(1, 0.5)
    line["train"]["loss"] = 0.693
    result = collect(write_run(tmp_path / "run", photos, [line], best_epoch=1))
    assert result.notes == [
        "The training loss is that of guessing, ln(2) = 0.693: the net has not learned."
    ]


def test_run_with_a_net_and_without_records(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "metrics.jsonl").write_text("")
    result = collect(copy)
    assert result.notes == ["The curves are not shown: metrics.jsonl lists no finished epoch."]
    assert result.evaluation is not None


def test_folder_without_permission_is_refused(run, tmp_path, monkeypatch, capsys):
    def fail(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)  # root may write to every folder
    assert cli.main(["report", str(run), "-o", str(tmp_path / "report.html")]) == 2
    assert "expected a folder that can be written to" in capsys.readouterr().err


def test_full_disk_is_one_sentence(run, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert cli.main(["report", str(run), "-o", str(tmp_path / "report.html")]) == 2
    assert "report.html (No space left on device): expected room" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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


def test_names_are_escaped(tmp_path):
    photos = make_photo_folder(tmp_path / "photos")
    for split in ("train", "val"):
        os.rename(f"{photos}/{split}/red", f"{photos}/{split}/<i>&\udcff$x$")
    folder = write_run(tmp_path / "a<b>&c", photos)
    content = json.loads((folder / "run.json").read_text())
    content["command"] = "vgg-jax train '<script>'"
    (folder / "run.json").write_text(json.dumps(content))
    assert report([folder], tmp_path / "report.html").notes == []
    text = (tmp_path / "report.html").read_text()
    assert not re.search(
        r"<(script|i|b)>(?!\w)", text.replace("<b>blue", "").replace("<b>&lt;", "")
    )
    assert "&lt;script&gt;" in text and "&lt;i&gt;&amp;\\udcff$x$" in text


def test_class_table_equals_scikit_learn(run, tmp_path):
    report([run], tmp_path / "report.html")
    evaluation = collect(run).evaluation
    expected = precision_recall_fscore_support(
        evaluation.labels, evaluation.posteriors.argmax(1), zero_division=np.nan
    )
    rows = re.findall(
        r'<tr><td>(\w+)</td><td class="n">(\d+)</td>' + r'<td class="n">(.*?)</td>' * 3,
        (tmp_path / "report.html").read_text(),
    )
    shown = {name: cells for name, *cells in rows}
    for index, name in enumerate(("blue", "red")):
        precision, recall, f1, count = (column[index] for column in expected)
        shares = ["–" if np.isnan(x) else f"{x:.1%}" for x in (precision, recall, f1)]
        assert shown[name] == [str(count), *shares]


@pytest.mark.slow
def test_page_of_a_thousand_classes_is_small(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"class number {i}" for i in range(1000)]
    images, labels = rng.integers(0, 256, (2000, 16, 16, 3), np.uint8), np.arange(2000) % 1000
    path = tmp_path / "data.npz"
    arrays = {"x_train": images, "y_train": labels, "x_val": images, "y_val": labels}
    np.savez(path, **arrays, classes=np.array(names))
    folder = write_run(tmp_path / "run", path, [record(1, 0.5)], best_epoch=1, scale=(16,))
    started = time.monotonic()
    assert report([folder], tmp_path / "report.html").notes == []
    assert time.monotonic() - started < 30
    assert (tmp_path / "report.html").stat().st_size < 5e6
    text = (tmp_path / "report.html").read_text()
    assert all(f"<td>{name}</td>" in text for name in names)
    assert "The other 970 classes" in text


def test_large_net_is_evaluated_on_a_sample(run, monkeypatch):
    monkeypatch.setattr("vgg_jax.reporting.collect.MAX_IMAGES", 3)
    result = collect(run)
    assert len(result.evaluation.labels) == 3
    assert result.evaluated == "3 of 7 validation images, drawn at random, centre crops."
    again = collect(run)
    np.testing.assert_array_equal(again.evaluation.files, result.evaluation.files)
    assert isinstance(again.evaluation, Evaluation)
