"""Finds published weights by name, and downloads them into the cache of vgg_jax.

It needs the standard library only. A download is resumed, and checked before it gets its name.
"""

import contextlib
import http.client
import json
import logging
import os
import re
import socket
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vgg_jax.errors import InputError, single_line
from vgg_jax.paths import is_remote
from vgg_jax.runs.files import atomic_write, file_lock, fsync
from vgg_jax.runtime.progress import SECONDS_PER_LINE
from vgg_jax.weights.pretrained import (
    HUGGING_FACE,
    WEIGHTS,
    CachedWeights,
    PublishedWeights,
    compute_digest,
    find_cached,
    find_fault,
    own_file,
    remember_digest,
    similar_names,
)

logger = logging.getLogger(__name__)

TRIES = 5
PAUSE = 1.0  # seconds before the second try; each further pause is twice as long
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 2**20  # bytes
_NO_ADDRESS = "{url} is no address: expected https://…; check VGG_JAX_MIRROR and HF_ENDPOINT"
_RETRY_CODES = (408, 429, 500, 502, 503, 504)  # of answers that may change


class _TransferError(Exception):
    """A transfer that failed, and that another try may resume."""


def resolve(
    path: str | os.PathLike, download: bool = False
) -> tuple[str | os.PathLike, PublishedWeights | None]:
    """Finds the file of a name of published weights. What exists as a path is a path.

    Args:
        path: The workdir of a run, a weight file, or a name.
        download: Download the file if it is not in a cache.

    Returns:
        The path and, for a name, its published weights.

    Raises:
        InputError: The file of a name is not in a cache, or cannot be downloaded; or a path does
            not exist and resembles a name.
    """
    if is_remote(path) or os.path.lexists(path):
        return path, None
    name = os.fspath(path)
    entry = WEIGHTS.get(name)
    if entry is None:
        if names := similar_names(name):
            raise InputError(
                f"there is no file {name!r}, and no weights have this name: "
                f"expected {', '.join(names)}"
            )
        return path, None
    cached = find_cached(entry)
    if cached.path is None and not download:
        raise InputError(_not_cached(entry, cached))
    return cached.path or fetch(entry), entry


def _not_cached(entry: PublishedWeights, cached: CachedWeights) -> str:
    reason = "; ".join(cached.rejected) or "no cache has its file"
    size = "it" if entry.megabytes is None else f"{entry.megabytes} MB"
    return (
        f"{entry.name} is not here ({reason}): expected its file; `vgg-jax fetch {entry.name}` "
        f"(in Python: download=True) gets {size} from {_address(entry)}"
    )


def fetch(entry: PublishedWeights, *, tries: int = TRIES, pause: float = PAUSE) -> Path:
    """Downloads a file into the cache of vgg_jax, unless a cache has it.

    A second process that fetches the same file waits for the first. The log says what was checked.

    Args:
        entry: Published weights.
        tries: How often to connect before giving up.
        pause: Seconds between the first two tries.

    Returns:
        The file.

    Raises:
        InputError: The file cannot be downloaded or written, or is not the published one. Part of
            a file stays, and the next call resumes it, unless it is the wrong one.
    """
    cached = find_cached(entry)
    if cached.path is None:
        target = own_file(entry)
        with _disk_errors(target.parent, entry):
            target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target, entry):
            cached = find_cached(entry)  # the process that held the lock may have fetched it
            if cached.path is None:
                for fault in cached.rejected:
                    logger.warning(f"{fault}, so that file is not used")
                _fetch(entry, target, tries, pause)
                return target
    logger.info(f"{entry.name} is here already: {cached.path} ({_checked(entry)})")
    return cached.path


@contextlib.contextmanager
def _lock(target: Path, entry: PublishedWeights) -> Iterator[None]:
    def on_wait() -> None:
        logger.info(f"another process downloads {entry.name}: waiting for it")

    with contextlib.ExitStack() as stack:
        with _disk_errors(target.parent, entry):
            lock = file_lock(target.with_name(target.name + ".lock"), on_wait)
            stack.enter_context(lock)
        yield


def _fetch(entry: PublishedWeights, target: Path, tries: int, pause: float) -> None:
    """Downloads a file, checks it, and gives it its name."""
    url, part = _address(entry), target.with_name(target.name + ".part")
    _check_address(entry, url)
    logger.info(f"downloading {url} to {target}")
    _download(entry, url, part, tries, pause)
    with _disk_errors(part.parent, entry):
        fsync(part)
        size, digest = part.stat().st_size, entry.digest
        digits = None if digest is None else compute_digest(part, digest.algorithm)
        if fault := find_fault(part, entry, digits):
            _remove(part)
            raise InputError(
                f"what {url} sent {fault}: expected the published file; it was removed, and "
                f"`vgg-jax fetch {entry.name}` starts again"
            )
        os.replace(part, target)
        fsync(target.parent)
        _remove(part)
    if digest is not None and digits is not None:
        remember_digest(target, digest.algorithm, digits)
    logger.info(f"{entry.name}: {size:,} bytes in {target} ({_checked(entry)})")


def _checked(entry: PublishedWeights) -> str:
    """Says what the bytes of a file were compared with."""
    if entry.digest is None:
        return "no digest is known, so the content was not checked"
    return f"checked against the published {entry.digest}"


def _address(entry: PublishedWeights) -> str:
    """The URL of a file, at the mirror that the environment names."""
    mirror, endpoint = os.environ.get("VGG_JAX_MIRROR"), os.environ.get("HF_ENDPOINT")
    if mirror:
        return f"{mirror.rstrip('/')}/{entry.name}/{entry.file}"
    if endpoint and entry.repository is not None:
        return endpoint.rstrip("/") + entry.url.removeprefix(HUGGING_FACE)
    return entry.url


def _check_address(entry: PublishedWeights, url: str, is_secure: bool = False) -> None:
    """Raises InputError for an address whose answer could be forged on the way.

    `is_secure` tells that https led to this address.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        scheme, host = parts.scheme, parts.hostname
    except ValueError:
        scheme, host = "", None
    if scheme not in ("https", "http") or not host:
        raise InputError(_NO_ADDRESS.format(url=url))
    if scheme == "https":
        return
    if is_secure:
        raise InputError(f"https led to {url}: expected https to the end; nothing was downloaded")
    has_digest = entry.digest is not None and entry.digest.is_strong
    if not has_digest and host not in ("127.0.0.1", "::1", "localhost"):
        raise InputError(
            f"{url} is not encrypted, and no whole digest of {entry.name} is known: "
            "expected https; check VGG_JAX_MIRROR and HF_ENDPOINT"
        )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to safe addresses only."""

    def __init__(self, entry: PublishedWeights) -> None:
        self.entry = entry

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str):
        _check_address(self.entry, newurl, is_secure=req.type == "https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(entry: PublishedWeights, url: str, part: Path, tries: int, pause: float) -> None:
    """Downloads all bytes into `part`, with several tries."""
    cause = ""
    for attempt in range(tries):
        if attempt:
            logger.info(f"{cause}: trying again")
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            _transfer(entry, url, part, is_retry=attempt > 0)
            return
        except _TransferError as error:
            cause = single_line(error)
    kept = part.stat().st_size if part.exists() else 0
    resumes = f"resumes after {kept:,} bytes" if kept else "tries again"
    raise InputError(
        f"{url} was not downloaded ({tries} times, the last time: {cause}): expected the whole "
        f"file; `vgg-jax fetch {entry.name}` {resumes}"
    )


def _transfer(entry: PublishedWeights, url: str, part: Path, is_retry: bool) -> None:
    """Downloads the missing bytes over one connection.

    Raises _TransferError if another try may help.
    """
    validator, start = _resumable(part, url)
    headers = {"User-Agent": "vgg_jax", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": validator}
    try:
        response = _open(entry, url, headers, is_retry)
    except urllib.error.HTTPError as error:
        length = error.headers.get("Content-Range", "").removeprefix("bytes */")
        if error.code == 416 and length == str(start):  # only the check and the name were missing
            return
        if error.code == 416:
            _remove(part)
        if error.code in (416, *_RETRY_CODES):
            raise _TransferError(f"the server answered {error.code} {error.reason}") from error
        raise InputError(
            f"{url} cannot be downloaded (the server answered {error.code} {error.reason}): "
            "expected the file there; check VGG_JAX_MIRROR and HF_ENDPOINT, or pass a path"
        ) from error
    with response:
        if response.headers.get_content_type() == "text/html":
            raise InputError(
                f"{url} sent a web page: expected the file; check the network for a login page"
            )
        content_range = response.headers.get("Content-Range", "")
        if response.status != 206 or not content_range.startswith(f"bytes {start}-"):
            start = 0
        if response.status == 206 and not start:
            _remove(part)
            raise _TransferError("the server sent another part of the file")
        total = _total_length(response, start)
        _check_length(entry, url, part, total, is_bounded=total is not None or response.chunked)
        if not start:
            _begin(entry, part, url, response.headers)
        _receive(entry, response, part, start, total)


def _open(entry: PublishedWeights, url: str, headers: dict[str, str], is_retry: bool) -> Any:
    """Connects, and returns the response.

    Raises HTTPError, _TransferError if another try may help, and InputError.
    """
    opener = urllib.request.build_opener(_Redirects(entry))
    try:
        return opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError:
        raise
    except (http.client.InvalidURL, UnicodeError) as error:
        raise InputError(_NO_ADDRESS.format(url=url)) from error
    except (OSError, http.client.HTTPException) as error:
        cause = getattr(error, "reason", error)  # of a URLError
        reason = " ".join(str(cause).split()) or type(cause).__name__
        # A wrong name or certificate stays wrong, unless it was right a moment ago.
        final = (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError)
        if is_retry or not isinstance(cause, final):
            raise _TransferError(reason) from error
        raise InputError(
            f"{url} cannot be reached ({reason}): expected a connection; check the "
            "network and the proxy (https_proxy)"
        ) from error


def _total_length(response: Any, start: int) -> int | None:
    """Bytes of the whole file as the server tells them, or None."""
    content_range = response.headers.get("Content-Range", "")
    if start and (match := re.fullmatch(r"bytes \d+-\d+/(\d+)", content_range)):
        return int(match[1])  # the answer may be shorter than the rest of the file
    return None if response.length is None else start + response.length


def _check_length(
    entry: PublishedWeights, url: str, part: Path, total: int | None, is_bounded: bool
) -> None:
    """Raises InputError if the answer is not as long as the published file."""
    if total is not None and (fault := entry.size_fault(total)):
        _remove(part)
        raise InputError(f"{url} {fault}: expected the published file; check VGG_JAX_MIRROR")
    if not is_bounded and entry.size is None and entry.digest is None:
        raise InputError(
            f"{url} does not tell its length, and no digest is known: expected one of them; "
            "download it yourself, and pass its path"
        )


def _receive(
    entry: PublishedWeights, response: Any, part: Path, start: int, total: int | None
) -> None:
    """Appends the bytes of a response to `part`."""
    with _disk_errors(part.parent, entry):
        file = part.open("ab", buffering=0)  # what a full disk takes is right, and stays
    done = start
    with file, _Progress(entry.file, total) as progress:
        while True:
            try:
                chunk = response.read1(_CHUNK)  # what has arrived, so that little is lost
            except (OSError, http.client.HTTPException) as error:
                raise _TransferError(f"the connection was cut ({single_line(error)})") from error
            if not chunk:
                break
            rest = memoryview(chunk)
            with _disk_errors(part.parent, entry):
                while rest:
                    rest = rest[file.write(rest) :]
            done += len(chunk)
            progress.show(done)
    with _disk_errors(part.parent, entry):
        done = part.stat().st_size
    # Without a length, the end of the connection is no sign of the end of the file.
    expected = f"at least {entry.min_bytes:,}" if total is None else f"{total:,}"
    if done < (entry.min_bytes if total is None else total):
        raise _TransferError(f"the connection was cut after {done:,} of {expected} bytes")


def _resumable(part: Path, url: str) -> tuple[str, int]:
    """Returns the validator and the number of the bytes in `part`, or zero bytes.

    A part without a validator may belong to another version of the file.
    """
    try:
        source = json.loads(_source_file(part).read_text())
        if source["url"] == url and source["validator"]:
            return str(source["validator"]), part.stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return "", 0


def _begin(entry: PublishedWeights, part: Path, url: str, headers: Any) -> None:
    """Begins a part anew, and writes down which version of the file it is of."""
    etag = headers.get("ETag", "")
    # HTTP compares weak tags with nothing in If-Range.
    validator = etag if etag.startswith('"') else headers.get("Last-Modified", "")
    with _disk_errors(part.parent, entry):
        _remove(part)
        source = {"url": url, "validator": validator}
        atomic_write(_source_file(part), json.dumps(source).encode())


def _source_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _remove(part: Path) -> None:
    part.unlink(missing_ok=True)
    _source_file(part).unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_errors(folder: Path, entry: PublishedWeights) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}): expected room for "
            f"{entry.file}; make room, or set VGG_JAX_CACHE to another folder, and run "
            f"`vgg-jax fetch {entry.name}` again"
        ) from error


class _Progress:
    """A progress bar on a terminal, without a package for it, or a line a minute in a log."""

    def __init__(self, file: str, total: int | None) -> None:
        self.file, self.total, self.shown = file, total, 0.0
        self.logged = time.monotonic()
        self.is_terminal = sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self) -> "_Progress":
        return self

    def show(self, done: int) -> None:
        """Draws the bar, at most five times a second, or logs a line."""
        is_last, now = done == self.total, time.monotonic()
        if not self.is_terminal and now - self.logged >= SECONDS_PER_LINE:
            self.logged = now
            of_total = f" of {self.total / 1e6:.0f}" if self.total else ""
            logger.info(f"{self.file}: {done / 1e6:.0f}{of_total} MB")
        if not self.is_terminal or (now - self.shown < 0.2 and not is_last):
            return
        self.shown = now
        text = f"{done / 1e6:.0f} MB"
        if self.total:
            bar = "#" * (30 * done // self.total)
            text = f"[{bar:<30}] {done / self.total:4.0%} of {self.total / 1e6:.0f} MB"
        print(f"\r{self.file} {text}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self.shown:
            print(file=sys.stderr)
