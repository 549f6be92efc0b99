"""The web page of docs/export.md classifies a photo in Chromium."""

import functools
import http.server
import json
import queue
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

# The page sends its answer, or its error: Chromium does not know when it is complete.
CLASSIFY = """<script>
fetch("photo.png").then(file => file.blob()).then(show)
  .then(() => document.getElementById("answer").textContent, error => `error: ${error}`)
  .then(body => fetch("answer", {method: "POST", body}));
</script>"""


class PageHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder without a log, and keeps what the page sends in `server.answers`."""

    def do_POST(self):
        self.server.answers.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
        self.send_response(204)
        self.end_headers()

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
    handler = functools.partial(PageHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.answers = queue.Queue()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu"]
        command += ["--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}"]
        page = f"http://127.0.0.1:{server.server_port}/index.html"
        with subprocess.Popen([*command, page], stderr=subprocess.DEVNULL) as browser:
            try:
                return server.answers.get(timeout=300)
            finally:
                browser.terminate()
                server.shutdown()


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
        answer = answer_of_page(folder)
        assert not answer.startswith("error: "), answer
        lines = [line.split(" % ") for line in answer.splitlines()]
        actual = {name: float(percent) / 100 for percent, name in lines}
        assert actual == pytest.approx(dict(top), abs=1e-3)
