"""Result files: several parts and processes, runs with other settings, and files of others."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from experiments.paper.result_file import ResultPart
from vgg_jax.errors import InputError


def open_part(path, name="a", **header):
    return ResultPart(path, name, header, key=("n",), summarize=lambda runs: {"runs": len(runs)})


def test_parts_do_not_disturb_each_other(tmp_path):
    out = tmp_path / "results.json"
    open_part(out, "a", settings={"x": 1}).add({"n": 1})
    open_part(out, "b", settings={"x": 2}).add({"n": 2})
    again = open_part(out, "a", settings={"x": 1})
    assert again.find(n=1) == {"n": 1} and again.find(n=2) is None
    again.add({"n": 3})
    document = json.loads(out.read_text())
    assert document["a"]["runs"] == [{"n": 1}, {"n": 3}]
    assert document["b"] == {"settings": {"x": 2}, "summary": {"runs": 1}, "runs": [{"n": 2}]}


def test_two_writers_lose_nothing(tmp_path):
    """Both open the file before either adds a run. The summary has the runs of both."""
    out = tmp_path / "results.json"
    first, second = open_part(out), open_part(out)
    first.add({"n": 1})
    second.add({"n": 2})
    first.add({"n": 3})
    part = json.loads(out.read_text())["a"]
    assert part == {"summary": {"runs": 3}, "runs": [{"n": 1}, {"n": 2}, {"n": 3}]}
    assert first.runs == part["runs"]


def test_the_first_of_two_equal_runs_stays(tmp_path):
    out = tmp_path / "results.json"
    first, second = open_part(out), open_part(out)
    first.add({"n": 1, "loss": 0.5})
    second.add({"n": 1, "loss": 0.7})
    assert json.loads(out.read_text())["a"]["runs"] == [{"n": 1, "loss": 0.5}]
    assert second.find(n=1) == {"n": 1, "loss": 0.5}


def test_writers_wait_for_each_other(tmp_path):
    """Four threads with a part each. A lost lock loses runs."""
    out = tmp_path / "results.json"
    parts = [open_part(out) for _ in range(4)]

    def add_all(number):
        for n in range(5):
            parts[number].add({"n": 5 * number + n})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add_all, range(4)))
    runs = json.loads(out.read_text())["a"]["runs"]
    assert sorted(run["n"] for run in runs) == list(range(20))


@pytest.mark.parametrize(
    "header, message",
    [
        ({"settings": {"x": 2}, "device": "a CPU"}, "has runs with settings x 1, not 2: expected"),
        ({"settings": {"x": 1}, "device": "a GPU"}, "with device 'a CPU', not 'a GPU': expected"),
        ({"settings": {"x": 1}, "device": "a CPU", "data_digest": "0"}, "digest None, not '0': ex"),
    ],
)
def test_runs_of_another_command_are_refused(header, message, tmp_path):
    """When the part is opened, and when another process has made it since."""
    out = tmp_path / "results.json"
    late = open_part(out, **header)
    open_part(out, settings={"x": 1}, device="a CPU", command="old").add({"n": 1})
    content = out.read_bytes()
    with pytest.raises(InputError, match=message):
        open_part(out, **header)
    with pytest.raises(InputError, match=message):
        late.add({"n": 2})
    assert out.read_bytes() == content
    open_part(out, settings={"x": 1}, device="a CPU", command="new").add({"n": 2})


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', '{"a": {"runs": {}}}'])
def test_files_of_others_are_refused(content, tmp_path):
    out = tmp_path / "results.json"
    out.write_text(content)
    with pytest.raises(InputError, match="is no result file: expected JSON of this script"):
        open_part(out)
    assert out.read_text() == content


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no folder '.*none': expected one for"):
        open_part(tmp_path / "none" / "a.json")
