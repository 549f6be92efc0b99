"""Downloads from a server on this machine, with the faults that networks and disks have."""

import contextlib
import hashlib
import http.server
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time

import pytest

import vgg_jax
from tests.helpers.caches import CONTENT, small_entry, use_caches
from tests.helpers.export_files import random_weights
from tests.helpers.tiny import narrow
from vgg_jax import CONFIGS, InputError, cli
from vgg_jax.weights import fetch as fetch_module
from vgg_jax.weights import save
from vgg_jax.weights.fetch import fetch
from vgg_jax.weights.pretrained import WEIGHTS, Digest, caches, own_file

# No digest and no size of it is known, so a small file can stand for it.
UNCHECKED = "timm/vgg11_bn.tv_in1k"


class Server(http.server.ThreadingHTTPServer):
    """Serves one content under every path with a dot."""

    def __init__(self):
        self.content, self.etag, self.modified = CONTENT, '"one"', None
        self.has_ranges = True
        self.content_type = "application/octet-stream"
        self.cut = []  # bytes after which each answer ends, for as many answers
        self.status = []  # codes of the first answers
        self.location = None  # of a redirect
        self.has_length = True
        self.max_part = None  # bytes of an answer to a range
        self.pause = 0.0  # seconds in the middle of an answer
        self.requests = []  # (path, Range, If-Range)
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that went away is no error."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked, self.headers.get("If-Range")))
        self.close_connection = True
        if server.location and not self.path.startswith("/moved/"):
            self.send_response(302)
            self.send_header("Location", server.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if server.status:
            self.send_error(server.status.pop(0))
            return
        if "." not in self.path:
            self.send_error(404)
            return
        start = 0
        validators = (server.etag, server.modified)
        if asked and server.has_ranges and self.headers.get("If-Range") in validators:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start and start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start:][: server.max_part if start else None]
        self.send_response(206 if start else 200)
        if start:
            end = start + len(body)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(server.content)}")
        if server.has_length:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", server.content_type)
        if server.etag:
            self.send_header("ETag", server.etag)
        if server.modified:
            self.send_header("Last-Modified", server.modified)
        self.end_headers()
        end = server.cut.pop(0) if server.cut else len(body)
        self.wfile.write(body[: end // 2])
        self.wfile.flush()
        time.sleep(server.pause)
        self.wfile.write(body[end // 2 : end])
        self.wfile.flush()


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, caplog):
    use_caches(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetch_module, "PAUSE", 0)
    caplog.set_level(logging.INFO, "vgg_jax")
    return tmp_path


def leftovers(entry):
    """Names beside the file. The lock stays."""
    return sorted(path.name for path in own_file(entry).parent.iterdir())


def quick(entry, **options):
    return fetch(entry, **{"pause": 0, **options})


def test_fetch_checks_and_finishes(server, caplog):
    entry = small_entry(f"{server.url}/tiny.bin")
    path = quick(entry)
    assert path == own_file(entry)
    assert path.read_bytes() == CONTENT
    assert leftovers(entry) == ["tiny.bin", "tiny.bin.lock"]
    assert f"1,280,000 bytes in {path} (checked against the published sha256)" in caplog.text
    assert quick(entry) == path
    assert f"tiny/net is here already: {path}" in caplog.text
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("digest", "said"),
    [
        (Digest("md5", hashlib.md5(CONTENT).hexdigest()), "checked against the published md5"),
        (
            Digest("sha384", hashlib.sha384(CONTENT).hexdigest()),
            "checked against the published sha384",
        ),
        (
            Digest("sha256", hashlib.sha256(CONTENT).hexdigest()[:8]),
            "checked against the published first 8 digits of sha256",
        ),
        (None, "no digest is known, so the content was not checked"),
    ],
)
def test_fetch_says_what_it_checked(digest, said, server, caplog):
    quick(small_entry(f"{server.url}/tiny.bin", digest=digest, size=None))
    assert said in caplog.text


def test_another_cache_has_it(server):
    entry = small_entry(f"{server.url}/tiny.bin")
    torch = caches()["torch"] / entry.file
    torch.parent.mkdir(parents=True)
    torch.write_bytes(CONTENT)
    assert quick(entry) == torch
    assert server.requests == []


def test_wrong_file_in_a_cache_is_replaced(server, caplog):
    entry = small_entry(f"{server.url}/tiny.bin")
    path = own_file(entry)
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[::-1])
    assert quick(entry).read_bytes() == CONTENT
    assert f"{path} has sha256" in caplog.text


@pytest.mark.parametrize("algorithm", ["sha256", "sha384", "md5"])
@pytest.mark.parametrize("count", [None, 8])
def test_wrong_digest(algorithm, count, server):
    digits = hashlib.new(algorithm, CONTENT).hexdigest()[:count]
    entry = small_entry(f"{server.url}/tiny.bin", digest=Digest(algorithm, digits))
    server.content = CONTENT[::-1]
    with pytest.raises(InputError, match=rf"sent has {algorithm} .*… *: expected the published"):
        quick(entry)
    assert leftovers(entry) == ["tiny.bin.lock"]
    server.content = CONTENT
    assert quick(entry).read_bytes() == CONTENT


@pytest.mark.parametrize("has_length", [True, False])
def test_wrong_size(has_length, server):
    entry = small_entry(f"{server.url}/tiny.bin")
    server.content, server.has_length = CONTENT + b"x", has_length
    with pytest.raises(InputError, match="has 1,280,001 bytes"):
        quick(entry)
    assert leftovers(entry) == ["tiny.bin.lock"]


def test_cut_connection_is_resumed(server, caplog):
    entry = small_entry(f"{server.url}/tiny.bin")
    server.cut = [700_000, 100_000]
    assert quick(entry).read_bytes() == CONTENT
    assert server.requests == [
        ("/tiny.bin", None, None),
        ("/tiny.bin", "bytes=700000-", '"one"'),
        ("/tiny.bin", "bytes=800000-", '"one"'),
    ]
    assert "the connection was cut after 700,000 of 1,280,000 bytes: trying again" in caplog.text


def test_next_call_resumes(server):
    entry = small_entry(f"{server.url}/tiny.bin")
    server.cut = [500_000, 0, 0]
    with pytest.raises(
        InputError,
        match=r"3 times, the last time: .* cut after 500,000 of 1,280,000 bytes\): .*"
        "`vgg-jax fetch tiny/net` resumes after 500,000 bytes",
    ):
        quick(entry, tries=3)
    assert leftovers(entry) == ["tiny.bin.lock", "tiny.bin.part", "tiny.bin.part.json"]
    assert quick(entry).read_bytes() == CONTENT
    assert server.requests[-1] == ("/tiny.bin", "bytes=500000-", '"one"')


@pytest.mark.parametrize("etag", ['W/"one"', None])
def test_last_modified_in_place_of_a_strong_etag(etag, server):
    entry = small_entry(f"{server.url}/tiny.bin")
    server.etag, server.modified, server.cut = etag, "Tue, 01 Jan 2030 00:00:00 GMT", [500_000]
    assert quick(entry).read_bytes() == CONTENT
    assert server.requests[-1] == ("/tiny.bin", "bytes=500000-", server.modified)


def test_part_without_validator_is_not_resumed(server):
    entry = small_entry(f"{server.url}/tiny.bin")
    server.etag, server.cut = None, [500_000]
    assert quick(entry).read_bytes() == CONTENT
    assert server.requests[-1] == ("/tiny.bin", None, None)


def test_server_without_ranges(server):
    entry = small_entry(f"{server.url}/tiny.bin")
    server.has_ranges, server.cut = False, [500_000]
    assert quick(entry).read_bytes() == CONTENT


def test_changed_file_starts_again(server):
    """No digest would notice a mixture of two versions."""
    entry = small_entry(f"{server.url}/tiny.bin", size=None, digest=None)
    server.cut = [500_000]
    with pytest.raises(InputError, match="was not downloaded"):
        quick(entry, tries=1)
    server.content, server.etag = CONTENT[::-1], '"two"'
    assert quick(entry).read_bytes() == CONTENT[::-1]
    assert server.requests[-1] == ("/tiny.bin", "bytes=500000-", '"one"')


def test_part_of_another_address_is_not_used(server):
    entry = small_entry(f"{server.url}/tiny.bin", size=None, digest=None)
    server.cut = [500_000]
    with pytest.raises(InputError, match="was not downloaded"):
        quick(entry, tries=1)
    moved = entry._replace(url=f"{server.url}/other/tiny.bin")
    assert quick(moved).read_bytes() == CONTENT
    assert server.requests[-1] == ("/other/tiny.bin", None, None)


@pytest.mark.parametrize("source", ["", "{", "[]", "null", '{"url": 3}'])
def test_damaged_note_of_a_part(source, server):
    entry = small_entry(f"{server.url}/tiny.bin")
    part = own_file(entry).with_name("tiny.bin.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"something else")
    part.with_name("tiny.bin.part.json").write_text(source)
    assert quick(entry).read_bytes() == CONTENT


@pytest.mark.parametrize("extra", [b"", b"x"])
def test_whole_part_needs_only_its_name(extra, server):
    """A process may end between the last byte and the new name. A longer part is wrong."""
    entry = small_entry(f"{server.url}/tiny.bin")
    part = own_file(entry).with_name("tiny.bin.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(CONTENT + extra)
    source = {"url": entry.url, "validator": '"one"'}
    part.with_name("tiny.bin.part.json").write_text(json.dumps(source))
    assert quick(entry).read_bytes() == CONTENT
    assert len(server.requests) == 1 + len(extra)


def test_server_that_is_busy(server, caplog):
    server.status = [503, 429]
    assert quick(small_entry(f"{server.url}/tiny.bin")).read_bytes() == CONTENT
    assert "the server answered 503 Service Unavailable: trying again" in caplog.text


@pytest.mark.parametrize("code", [404, 403, 401])
def test_file_that_is_not_there(code, server):
    entry = small_entry(f"{server.url}/tiny.bin")
    server.status = [code]
    with pytest.raises(InputError, match=rf"tiny\.bin cannot be downloaded .*answered {code} "):
        quick(entry)
    assert len(server.requests) == 1
    assert leftovers(entry) == ["tiny.bin.lock"]


def test_web_page(server):
    """Networks of hotels answer everything with a login page."""
    server.content_type = "text/html; charset=utf-8"
    with pytest.raises(InputError, match="sent a web page"):
        quick(small_entry(f"{server.url}/tiny.bin", digest=None, size=None))


def test_unknown_length(server):
    server.has_length = False
    assert quick(small_entry(f"{server.url}/tiny.bin")).read_bytes() == CONTENT
    unknown = small_entry(f"{server.url}/tiny.bin", name="tiny/other", digest=None, size=None)
    with pytest.raises(InputError, match="does not tell its length, and no digest is known"):
        quick(unknown)


@pytest.mark.parametrize(
    ("known", "min_bytes"),
    [({"size": 2_560_000}, "2,560,000"), ({"size": None, "megabytes": 3}, "2,000,000")],
)
def test_cut_without_length_is_resumed(known, min_bytes, server, caplog):
    """The end of a connection looks like the end of the file."""
    entry = small_entry(f"{server.url}/tiny.bin", content=2 * CONTENT, **known)
    server.content, server.has_length, server.cut = 2 * CONTENT, False, [700_000]
    assert quick(entry).read_bytes() == 2 * CONTENT
    assert f"cut after 700,000 of at least {min_bytes} bytes" in caplog.text
    assert server.requests[-1] == ("/tiny.bin", "bytes=700000-", '"one"')


def test_shorter_part_than_asked_for(server, caplog):
    """A server may answer with less than the rest. Content-Range tells the length of the file."""
    entry = small_entry(f"{server.url}/tiny.bin", digest=None, size=None)
    server.cut, server.max_part = [300_000], 500_000
    assert quick(entry).read_bytes() == CONTENT
    assert [asked for _, asked, _ in server.requests[1:]] == ["bytes=300000-", "bytes=800000-"]


def test_log_shows_progress_each_minute(server, caplog, monkeypatch):
    monkeypatch.setattr(fetch_module, "SECONDS_PER_LINE", 0)
    quick(small_entry(f"{server.url}/tiny.bin"))
    assert "tiny.bin: 1 of 1 MB" in caplog.text


def test_no_network():
    with socket.create_server(("127.0.0.1", 0)) as closed:
        entry = small_entry(f"http://127.0.0.1:{closed.getsockname()[1]}/tiny.bin")
    started = time.monotonic()
    with pytest.raises(InputError, match=r"cannot be reached \(.*refused.*https_proxy"):
        fetch(entry)  # with the pauses: it does not try again
    assert time.monotonic() - started < 1
    with pytest.raises(InputError, match=r"tiny\.invalid.* cannot be reached"):
        fetch(small_entry("https://tiny.invalid/tiny.bin"))


def test_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    entry = small_entry("http://far.invalid/tiny.bin")
    assert quick(entry).read_bytes() == CONTENT
    assert server.requests[0][0] == "http://far.invalid/tiny.bin"


@pytest.mark.parametrize(
    ("url", "digest", "message"),
    [
        ("http://example.org/tiny.bin", None, "not encrypted, and no whole digest"),
        ("http://example.org/tiny.bin", Digest("sha256", "0" * 8), "not encrypted"),
        ("http://example.org/tiny.bin", Digest("md5", "0" * 32), "not encrypted"),
        ("http://127.0.0.1.example.org/tiny.bin", None, "not encrypted"),
        ("ftp://example.org/tiny.bin", None, "is no address"),
        ("file:///etc/passwd", None, "is no address"),
        ("example.org/tiny.bin", None, "is no address"),
        ("http://127.0.0.1:port/tiny.bin", None, "is no address"),
        ("https://[::1/tiny.bin", None, "is no address"),
        ("https://a b/tiny.bin", None, "is no address|cannot be reached"),
    ],
)
def test_unsafe_address(url, digest, message):
    with pytest.raises(InputError, match=message):
        fetch(small_entry(url, digest=digest))


def test_redirect(server):
    server.location = "/moved/tiny.bin"
    server.cut = [500_000]
    assert quick(small_entry(f"{server.url}/tiny.bin")).read_bytes() == CONTENT
    assert server.requests[-1] == ("/moved/tiny.bin", "bytes=500000-", '"one"')


@pytest.mark.parametrize("location", ["http://example.org/x.bin", "ftp://example.org/x.bin"])
def test_unsafe_redirect(location, server):
    server.location = location
    with pytest.raises(InputError, match=r"is not encrypted|is no address"):
        quick(small_entry(f"{server.url}/tiny.bin", digest=None))


@pytest.fixture
def certificate(home):
    """A certificate of 127.0.0.1 that nobody trusts, with its key."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the program openssl")
    path = home / "certificate.pem"
    subprocess.run(
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 "
        f"-addext subjectAltName=IP:127.0.0.1 -keyout {path} -out {home / 'only.pem'}",
        shell=True,
        check=True,
        capture_output=True,
    )
    path.write_text(path.read_text() + (home / "only.pem").read_text())
    return path


def test_https(server, certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http:", "https:")
    entry = small_entry(f"{url}/tiny.bin", digest=None)
    with pytest.raises(InputError, match=r"cannot be reached .*CERTIFICATE_VERIFY_FAILED"):
        quick(entry)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server.location = "http://127.0.0.1/moved/tiny.bin"
    with pytest.raises(InputError, match=r"https led to http://127\.0\.0\.1/moved.*expected https"):
        quick(entry)
    server.location = None
    assert quick(entry).read_bytes() == CONTENT


def test_endless_redirect(server):
    server.location = "/tiny.bin"
    with pytest.raises(InputError, match="answered 302"):
        quick(small_entry(f"{server.url}/tiny.bin"))


def test_two_threads_download_once(server, caplog):
    entry = small_entry(f"{server.url}/tiny.bin")
    server.pause = 0.3
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(quick(entry))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [own_file(entry)] * 2
    assert len(server.requests) == 1
    assert "another process downloads tiny/net: waiting for it" in caplog.text


FETCH = """
import logging, sys
from tests.helpers.caches import small_entry
from vgg_jax import InputError
from vgg_jax.weights.fetch import fetch
logging.basicConfig(level="INFO", stream=sys.stdout)
{before}
try:
    fetch(small_entry({url!r}), pause=0)
except InputError as error:
    sys.exit(str(error))
"""


def start_process(server, before=""):
    code = FETCH.format(url=f"{server.url}/tiny.bin", before=before)
    root = os.path.dirname(os.path.dirname(vgg_jax.__file__))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition):
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise TimeoutError


def test_two_processes_download_once(server):
    """The second takes over when the first is killed."""
    entry = small_entry(f"{server.url}/tiny.bin")
    part = own_file(entry).with_name("tiny.bin.part")
    server.pause = 3
    first = start_process(server)
    wait_for(lambda: part.exists() and part.stat().st_size == 640_000)
    second = start_process(server)
    assert second.stdout.readline().strip().endswith("waiting for it")
    server.pause = 0
    first.kill()
    first.communicate()
    _, error = second.communicate(timeout=30)
    assert second.returncode == 0, error
    assert own_file(entry).read_bytes() == CONTENT
    assert server.requests[-1][1] == "bytes=640000-"


def test_ctrl_c_leaves_a_part(server):
    entry = small_entry(f"{server.url}/tiny.bin")
    part = own_file(entry).with_name("tiny.bin.part")
    server.pause = 2
    process = start_process(server)
    wait_for(lambda: part.exists() and part.stat().st_size == 640_000)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    server.pause = 0
    assert quick(entry).read_bytes() == CONTENT
    assert server.requests[-1][1] == "bytes=640000-"


def test_full_disk(server):
    """A limit of the size of files fails in `write` as a full disk does."""
    entry = small_entry(f"{server.url}/tiny.bin")
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    process = start_process(server, limit)
    out, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert error.startswith(f"cannot write to {own_file(entry).parent} (File too large)"), out
    assert "make room, or set VGG_JAX_CACHE" in error and error.count("\n") == 1
    assert quick(entry).read_bytes() == CONTENT
    assert server.requests[-1][1] == "bytes=300000-"


@pytest.mark.parametrize("obstacle", ["file in place of a folder", "folder in place of the file"])
def test_cache_that_cannot_be_written_to(obstacle, server, home):
    entry = small_entry(f"{server.url}/tiny.bin")
    if obstacle.startswith("file"):
        (home / "VGG_JAX_CACHE").write_text("")
    else:
        own_file(entry).mkdir(parents=True)
    with pytest.raises(InputError, match=r"cannot write to .*VGG_JAX_CACHE"):
        quick(entry)


def test_load_downloads_only_if_asked(server, home, monkeypatch):
    monkeypatch.setitem(CONFIGS, "A", narrow("A"))
    save(home / "net.safetensors", random_weights("A", batch_norm=True), "timm")
    server.content = (home / "net.safetensors").read_bytes()
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    with pytest.raises(
        InputError, match=rf"gets it from {server.url}/timm/vgg11_bn\.tv_in1k/resolve/"
    ):
        vgg_jax.load(UNCHECKED)
    assert server.requests == []
    assert vgg_jax.load(UNCHECKED, download=True)[0].batch_norm
    assert server.requests[0][0] == f"/{UNCHECKED}/resolve/main/model.safetensors"
    assert vgg_jax.load(UNCHECKED)[0].batch_norm
    assert len(server.requests) == 1


def test_command_with_a_mirror(server, monkeypatch, capsys):
    monkeypatch.setenv("VGG_JAX_MIRROR", server.url)
    assert cli.main(["fetch", UNCHECKED, UNCHECKED]) == 0
    out, err = capsys.readouterr()
    assert f"downloading {server.url}/{UNCHECKED}/model.safetensors to" in out
    assert "no digest is known, so the content was not checked" in out
    assert f"{UNCHECKED} is here already" in out
    assert err == ""
    path = own_file(WEIGHTS[UNCHECKED])
    # The folder of a cache can be the mirror of another machine.
    assert path.relative_to(caches()["vgg_jax"]).as_posix() == f"{UNCHECKED}/model.safetensors"


def test_command_fails_with_one_sentence(server, monkeypatch, capsys):
    for name, message in (
        ("torchvision/vgg17", "no weights are named 'torchvision/vgg17': expected torchvision/"),
        ("vgg16.pth", "no weights are named 'vgg16.pth': expected a name that `vgg-jax weights`"),
        ("", "no weights are named ''"),
    ):
        assert cli.main(["fetch", UNCHECKED, name]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"vgg-jax: {message}") and err.count("\n") == 1
    monkeypatch.setenv("VGG_JAX_MIRROR", server.url)
    server.content_type = "application/octet-stream"
    assert cli.main(["fetch", "timm/vgg16.tv_in1k"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("vgg-jax: http://127.0.0.1") and err.count("\n") == 1
    assert "has 1,280,000 bytes, not about 553 MB: expected the published file" in err
    assert cli.main(["fetch", "oxford/vgg16"]) == 2
    assert "has 1,280,000 bytes, not 553,432,081" in capsys.readouterr().err


def test_progress_bar_is_for_terminals(server):
    """A pseudo-terminal shows it; the other tests have none."""
    import pty

    main, terminal = pty.openpty()
    root = os.path.dirname(os.path.dirname(vgg_jax.__file__))
    code = FETCH.format(url=f"{server.url}/tiny.bin", before="")
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": root},
        stdout=subprocess.DEVNULL,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the other end was closed
        while block := os.read(main, 1000):
            shown += block
    assert process.wait() == 0
    assert b"\rtiny.bin [" + b"#" * 30 + b"] 100% of 1 MB\r\n" in shown
