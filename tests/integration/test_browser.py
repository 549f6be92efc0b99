"""The web page of docs/export.md classifies a photo in Chromium."""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest
from PIL import Image

from tests.helpers.export_files import require_onnx, undecided_weights
from tests.helpers.pages import ROOT, blocks
from tests.helpers.tiny import narrow
from tests.helpers.tiny_data import noise
from vgg_jax import CONFIGS
from vgg_jax.configs.evaluation import ROUNDINGS, EvalProtocol
from vgg_jax.evaluation.predict import predict
from vgg_jax.export import ExportSpec, write
from vgg_jax.weights import save

CLASSIFY = '<script>fetch("photo.png").then(file => file.blob()).then(show)</script>'


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a log."""

    def log_message(self, *_):
        pass


@pytest.fixture
def folder(tmp_path):
    """A folder with onnxruntime-web."""
    require_onnx()
    for program in ("chromium", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}: apt-get install {program}")
    command = ["npm", "install", "--no-audit", "--no-fund", "onnxruntime-web"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


def answer_of_page(folder):
    """Opens the folder's page in Chromium, and returns the text of its answer."""
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += ["--virtual-time-budget=60000", f"--user-data-dir={folder / 'profile'}"]
        process = subprocess.run(
            [*command, f"http://127.0.0.1:{server.server_port}/index.html"],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        server.shutdown()
        thread.join()
    return re.search(r'<pre id="answer">(.*?)</pre>', process.stdout, re.DOTALL).group(1)


@pytest.mark.slow
def test_page_answers_as_predict(folder, monkeypatch):
    monkeypatch.setitem(CONFIGS, "A", narrow("A"))
    (page,) = (
        block.text for block in blocks(ROOT / "docs" / "export.md") if block.language == "html"
    )
    (folder / "index.html").write_text(page + CLASSIFY)
    for rounding, sides in zip(ROUNDINGS, ((70, 101), (87, 50)), strict=True):
        weights = undecided_weights(rounding)
        spec = ExportSpec(weights)
        write(folder / "web.onnx", spec, overwrite=True)
        (folder / "web.json").write_text(json.dumps(spec.metadata()))
        save(folder / "net.safetensors", weights)
        photo = str(folder / "photo.png")
        Image.fromarray(noise(*sides)).save(photo)
        ((_, top, _),) = predict(
            folder / "net.safetensors", [photo], protocol=EvalProtocol("center")
        )
        lines = [line.split(" % ") for line in answer_of_page(folder).splitlines()]
        actual = {name: float(percent) / 100 for percent, name in lines}
        assert actual == pytest.approx(dict(top), abs=1e-3)
