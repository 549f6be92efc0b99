"""Published weights by name, and the caches of other libraries that may hold them.

This module needs no jax, so that `vgg-jax weights` answers at once.
"""

import contextlib
import difflib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vgg_jax.errors import InputError
from vgg_jax.runs.files import atomic_write
from vgg_jax.runtime.compilation_cache import cache_folder

HUGGING_FACE = "https://huggingface.co"


class Digest(NamedTuple):
    """A published digest of a file, or the first digits of one."""

    algorithm: str  # a name of hashlib
    digits: str  # lower-case hexadecimal

    @property
    def is_strong(self) -> bool:
        """True if nobody can make another file with this digest."""
        return self.algorithm in ("sha256", "sha384") and len(self.digits) >= 64

    def __str__(self) -> str:
        length = 2 * hashlib.new(self.algorithm, usedforsecurity=False).digest_size
        count = len(self.digits)
        return self.algorithm if count == length else f"first {count} digits of {self.algorithm}"


class PublishedWeights(NamedTuple):
    """A published weight file.

    Attributes:
        name: Name in vgg_jax.
        net: Column of Table 1, a key of `CONFIGS`.
        batch_norm: True with batch normalisation.
        url: Address of the file.
        source: Who published the file, and whose weights they are if others trained them.
        licence: Licence of the weights.
        size: Bytes of the file, or None if unknown.
        megabytes: Size in 10^6 bytes, rounded, or None if unknown.
        digest: Digest that was published, or None if unknown.
        top1: Accuracy in percent on ImageNet's validation images as published, or None if unknown.
        top5: The same among five classes.
        top: True if the file has fully connected layers.
        preprocessing: Name of the preprocessing, for a file whose tensors' names do not tell it.
    """

    name: str
    net: str
    batch_norm: bool
    url: str
    source: str
    licence: str
    size: int | None = None
    megabytes: int | None = None
    digest: Digest | None = None
    top1: float | None = None
    top5: float | None = None
    top: bool = True
    preprocessing: str | None = None

    @property
    def file(self) -> str:
        """Name of the file."""
        return self.url.rsplit("/", 1)[-1]

    @property
    def min_bytes(self) -> int:
        """Bytes that the file has at least; 0 if nothing is known about its size."""
        if self.size is not None:
            return self.size
        return 0 if self.megabytes is None else (self.megabytes - 1) * 10**6

    def size_fault(self, num_bytes: int) -> str | None:
        """Compares a number of bytes with the published size, which may be rounded.

        Args:
            num_bytes: Size of a file.

        Returns:
            A clause such as "has 12 bytes, not 553,433,881", or None if the size is possible.
        """
        if self.size is not None:
            return None if num_bytes == self.size else f"has {num_bytes:,} bytes, not {self.size:,}"
        if self.megabytes is not None and abs(num_bytes / 1e6 - self.megabytes) > 1:
            return f"has {num_bytes:,} bytes, not about {self.megabytes} MB"
        return "is empty" if num_bytes == 0 else None

    @property
    def repository(self) -> str | None:
        """Repository on Hugging Face, such as "timm/vgg16.tv_in1k", or None."""
        if not self.url.startswith(HUGGING_FACE + "/"):
            return None
        return self.url.removeprefix(HUGGING_FACE + "/").partition("/resolve/")[0]


def _torchvision() -> Iterator[PublishedWeights]:
    """Those of torchvision 0.29.1. The file name has the first eight digits of its SHA-256."""
    for stem, net, digits, mebibytes, top1, top5 in (
        ("vgg11", "A", "8a719046", 506.840, 69.020, 88.628),
        ("vgg11_bn", "A", "6002323d", 506.881, 70.370, 89.810),
        ("vgg13", "B", "19584684", 507.545, 69.928, 89.246),
        ("vgg13_bn", "B", "abd245e5", 507.590, 71.586, 90.374),
        ("vgg16", "D", "397923af", 527.796, 71.592, 90.382),
        ("vgg16_bn", "D", "6c64b313", 527.866, 73.360, 91.516),
        ("vgg19", "E", "dcbb9e9d", 548.051, 72.376, 90.876),
        ("vgg19_bn", "E", "c79401a0", 548.143, 74.218, 91.842),
        # The classifier is NaN.
        ("vgg16_features-amdegroot", "D", "88682ab5", 527.802, None, None),
    ):
        name = stem.removesuffix("-amdegroot")
        is_whole = stem == "vgg16"  # the only whole digest that was found
        sha256 = "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"
        yield PublishedWeights(
            name=f"torchvision/{name}",
            net=net,
            batch_norm=name.endswith("_bn"),
            url=f"https://download.pytorch.org/models/{stem}-{digits}.pth",
            source="torchvision" if name == stem else "torchvision (authors')",
            licence="BSD-3",
            size=553_433_881 if is_whole else None,
            megabytes=round(mebibytes * 2**20 / 1e6),
            digest=Digest("sha256", sha256 if is_whole else digits),
            top1=top1,
            top5=top5,
            top=name == stem,
        )


def _timm() -> Iterator[PublishedWeights]:
    """Those on Hugging Face. Without a known commit, the address is that of the newest one."""
    for stem, net, commit, megabytes, sha256 in (
        (
            "vgg11",
            "A",
            "38b46049b490ec2bdb6d4d32b8354c74977f3347",
            531,
            "682c023808812148d4e60c76d80ad83dbeaf5d50eb1a952a0b836895003151e5",
        ),
        ("vgg11_bn", "A", None, None, None),
        ("vgg13", "B", None, 532, None),
        (
            "vgg13_bn",
            "B",
            "ed6e64d6167edbe08697cb4d7ceaef5077972131",
            532,
            "7dae235e35772693cd527e7ac9ef8f6594707a14a8d26aabdb83c0baa6847861",
        ),
        (
            "vgg16",
            "D",
            "3394518cba29aee1ea82a49d971be90d2dd1dab7",
            553,
            "57b026918159a6bf9faf8405c3a551903768e7138989d9c6224a14227203fad8",
        ),
        (
            "vgg16_bn",
            "D",
            "e00c01e7cee168262dcba6428dc4a8f41e27e965",
            554,
            "88bbedbc8e780413736db38ac4efd41b06fc0e93fd5b8879b584bba63a950129",
        ),
        (
            "vgg19",
            "E",
            None,
            575,
            "11aea017b543ff59233749d8f1cf544cda749378f5790d2fedab841fb86b7669",
        ),
        (
            "vgg19_bn",
            "E",
            None,
            575,
            "f8249087e63bae61c6166bb23d7c26efe1b2a43fd9fb5cd60ac6ce00535ba312",
        ),
    ):
        name = f"timm/{stem}.tv_in1k"
        yield PublishedWeights(
            name=name,
            net=net,
            batch_norm=stem.endswith("_bn"),
            url=f"{HUGGING_FACE}/{name}/resolve/{commit or 'main'}/model.safetensors",
            source="timm (torchvision's)",
            licence="BSD-3",
            megabytes=megabytes,
            digest=Digest("sha256", sha256) if sha256 else None,
        )


def _oxford() -> Iterator[PublishedWeights]:
    """The authors' own. The digests are those of OpenVINO's Open Model Zoo."""
    folder = "http://www.robots.ox.ac.uk/~vgg/software/very_deep/caffe"
    sha256 = "a6196bc498e45ea4cb2637114ae8db9410cf1556fd60a55ae93272371beba197"
    sha384 = (
        "86b83739d448a81ddc927922d4d7581e06113478106b59480097b02cc63ff51c"
        "9da7c3cd8a865b08946d07d0281d5b2e"
    )
    for depth, net, size, digest, top5 in (
        (16, "D", 553_432_081, Digest("sha256", sha256), 91.9),
        (19, "E", 574_671_192, Digest("sha384", sha384), 92.0),
    ):
        yield PublishedWeights(
            name=f"oxford/vgg{depth}",
            net=net,
            batch_norm=False,
            url=f"{folder}/VGG_ILSVRC_{depth}_layers.caffemodel",
            source="authors",
            licence="CC BY 4.0",
            size=size,
            megabytes=round(size / 1e6),
            digest=digest,
            top5=top5,
        )


def _keras() -> Iterator[PublishedWeights]:
    """Those of Keras 3.15. The digests are in its source code."""
    folder = "https://storage.googleapis.com/tensorflow/keras-applications"
    for name, net, md5 in (
        ("vgg16", "D", "64373286793e3c8b2b4e3219cbf3544b"),
        ("vgg16_notop", "D", "6d6bbae143d832006294945121d1f1fc"),
        ("vgg19", "E", "cbe5617147190e668d6c5d5026f83318"),
        ("vgg19_notop", "E", "253f8cb515780f3b799900260a226db6"),
    ):
        stem, suffix = name.partition("_")[0], name[len("vgg16") :]
        yield PublishedWeights(
            name=f"keras/{name}",
            net=net,
            batch_norm=False,
            url=f"{folder}/{stem}/{stem}_weights_tf_dim_ordering_tf_kernels{suffix}.h5",
            source="Keras (authors')",
            licence="CC BY 4.0",
            digest=Digest("md5", md5),
            top=not suffix,
        )


def _keras_hub() -> Iterator[PublishedWeights]:
    """KerasHub's backbones: timm's convolutions, which the names in the files do not tell."""
    for depth, net, megabytes in ((11, "A", None), (13, "B", None), (16, "D", 59), (19, "E", None)):
        name = f"keras/vgg_{depth}_imagenet"
        yield PublishedWeights(
            name=name,
            net=net,
            batch_norm=False,
            url=f"{HUGGING_FACE}/{name}/resolve/main/model.weights.h5",
            source="KerasHub (timm's)",
            licence="Apache 2.0",
            megabytes=megabytes,
            top=False,
            preprocessing="torchvision",
        )


WEIGHTS = {
    entry.name: entry
    for publisher in (_torchvision, _timm, _oxford, _keras, _keras_hub)
    for entry in publisher()
}


def lookup(name: str) -> PublishedWeights:
    """Returns the published weights of a name.

    Args:
        name: A key of `WEIGHTS`.

    Raises:
        InputError: There are none. The message lists similar names.
    """
    if name not in WEIGHTS:
        names = ", ".join(similar_names(name)) or "a name that `vgg-jax weights` lists"
        raise InputError(f"no weights are named {name!r}: expected {names}")
    return WEIGHTS[name]


def similar_names(name: str) -> list[str]:
    """Lists names that a wrong one may stand for.

    Args:
        name: A name or a path.

    Returns:
        All names of the same publisher, or those that contain the name, or the closest ones.
        The list is empty for a name that is not similar to any.
    """
    part = name.strip().lower()
    publisher, slash, _ = part.partition("/")
    if slash and part.count("/") == 1:
        names = [published for published in WEIGHTS if published.startswith(publisher + "/")]
        if names:
            return names
    if len(part) >= len("vgg16") and any(f"/{part}" in published for published in WEIGHTS):
        return [published for published in WEIGHTS if f"/{part}" in published]
    return difflib.get_close_matches(part, WEIGHTS, n=4, cutoff=0.8)


def own_file(entry: PublishedWeights) -> Path:
    """The place of a file in the cache of vgg_jax, whether or not it is there."""
    return _own_folder() / entry.name / entry.file


def caches() -> dict[str, Path]:
    """The folders in which files are looked for, by the name of their library."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"))
    torch = Path(os.environ.get("TORCH_HOME") or user_cache / "torch") / "hub" / "checkpoints"
    hub = Path(os.environ.get("HF_HOME") or user_cache / "huggingface") / "hub"
    keras = Path(os.environ.get("KERAS_HOME") or os.path.join("~", ".keras")) / "models"
    folders = {
        "torch": torch,
        "Hugging Face": Path(os.environ.get("HF_HUB_CACHE") or hub),
        "Keras": keras,
    }
    expanded = {name: Path(os.path.expanduser(folder)) for name, folder in folders.items()}
    return {"vgg_jax": _own_folder()} | expanded


def cached_files(entry: PublishedWeights) -> Iterator[tuple[str, Path]]:
    """Finds the copies of a file in the caches, without a look into them.

    Args:
        entry: Published weights.

    Yields:
        The name of the cache, a key of `caches()`, and the path. The first is the best.
    """
    folders = caches()
    candidates = [("vgg_jax", own_file(entry))]
    if entry.repository is not None:
        folder = folders["Hugging Face"] / f"models--{entry.repository.replace('/', '--')}"
        candidates += [("Hugging Face", path) for path in _snapshots(folder, entry)]
    else:
        candidates += [(name, folders[name] / entry.file) for name in ("torch", "Keras")]
    for name, path in candidates:
        if os.path.isfile(path):  # False without permission, where Path.is_file may raise
            yield name, path


def _snapshots(folder: Path, entry: PublishedWeights) -> list[Path]:
    """The file in all snapshots of a repository: the commit of the address, `main`, the others."""
    commit = entry.url.split("/")[-2]
    try:
        main = (folder / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        main = ""
    paths = (folder / "snapshots").glob(f"*/{entry.file}")

    def order(path: Path) -> tuple[bool, bool, str]:
        revision = path.parent.name
        return revision != commit, revision != main, revision

    return sorted(paths, key=order)


class CachedWeights(NamedTuple):
    """The copy of a published file to use, and the copies that are not the published file."""

    path: Path | None
    rejected: list[str]  # one clause for each, such as "PATH has 12 bytes, not 553,433,881"


def find_cached(entry: PublishedWeights) -> CachedWeights:
    """Finds the first copy of a file in the caches that has the right size and digest.

    Args:
        entry: Published weights.

    Returns:
        The copy, if there is one, and why the copies before it are not used.
    """
    rejected: list[str] = []
    for _, path in cached_files(entry):
        fault = find_fault(path, entry)
        if fault is None:
            return CachedWeights(path, rejected)
        rejected.append(f"{path} {fault}")
    return CachedWeights(None, rejected)


def find_fault(path: Path, entry: PublishedWeights, digits: str | None = None) -> str | None:
    """Compares a file with the published size and digest.

    A digest is computed once, and remembered as long as the file keeps its size and its time.

    Args:
        path: A local file.
        entry: Published weights.
        digits: The file's digest if it is known already.

    Returns:
        A clause such as "has 12 bytes, not 553,433,881", or None if no fault is found.
    """
    try:
        fault = entry.size_fault(path.stat().st_size)
        if fault or entry.digest is None:
            return fault
        actual = digits or _remembered_digest(path, entry.digest.algorithm)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if actual.startswith(entry.digest.digits):
        return None
    digits, count = entry.digest.digits[:16], min(len(entry.digest.digits), 16)
    return f"has {entry.digest.algorithm} {actual[:count]}…, not {digits}…"


def compute_digest(path: Path, algorithm: str) -> str:
    """Hashes a file.

    Args:
        path: A local file.
        algorithm: A name of hashlib.

    Returns:
        All digits of the digest.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        # MD5 is Keras' choice. It finds damage, and no attack.
        return hashlib.file_digest(
            file, lambda: hashlib.new(algorithm, usedforsecurity=False)
        ).hexdigest()


def remember_digest(path: Path, algorithm: str, digits: str) -> None:
    """Writes down the digest of a file, so that it need not be computed again.

    A cache that cannot be written to costs time and nothing else.

    Args:
        path: A local file.
        algorithm: A name of hashlib.
        digits: The digest.
    """
    entries = {file: value for file, value in _known_digests().items() if os.path.exists(file)}
    entries[str(path.absolute())] = {"version": _version(path), algorithm: digits}
    with contextlib.suppress(OSError):
        _own_folder().mkdir(parents=True, exist_ok=True)
        atomic_write(_digests_file(), json.dumps(entries, indent=1).encode())


def _remembered_digest(path: Path, algorithm: str) -> str:
    version = _version(path)
    entry = _known_digests().get(str(path.absolute()), {})
    if entry.get("version") == version and isinstance(entry.get(algorithm), str):
        return entry[algorithm]
    digits = compute_digest(path, algorithm)
    remember_digest(path, algorithm, digits)
    return digits


def _known_digests() -> dict[str, dict[str, Any]]:
    """What was written down; nothing if the file is absent or damaged."""
    try:
        entries = json.loads(_digests_file().read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    return {path: value for path, value in entries.items() if isinstance(value, dict)}


def _version(path: Path) -> list[int]:
    """Size and time of a file, which change when its content does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _digests_file() -> Path:
    return _own_folder() / "digests.json"


def _own_folder() -> Path:
    return cache_folder() / "weights"


def as_rows() -> list[dict[str, Any]]:
    """Lists the published weights, as JSON values.

    Returns:
        The fields of each entry of `WEIGHTS`, "file", and "cached": the paths of the copies in the
        caches that have the right size. Digests are not computed.
    """
    rows = []
    for entry in WEIGHTS.values():
        digest = None if entry.digest is None else entry.digest._asdict()
        paths = [str(path) for _, path in _plausible_copies(entry)]
        rows.append(entry._asdict() | {"digest": digest, "file": entry.file, "cached": paths})
    return rows


def format_table() -> str:
    """Prints the published weights as a table, with the caches below it."""
    header = ("name", "net", "source", "top-1", "top-5", "MB", "licence", "cached")
    rows = [header]
    for entry in WEIGHTS.values():
        kind = " bn" * entry.batch_norm + " conv" * (not entry.top)
        # Convolutions alone have no accuracy.
        unknown = "?" if entry.top else "-"
        rows.append(
            (
                entry.name,
                entry.net + kind,
                entry.source,
                unknown if entry.top1 is None else f"{entry.top1:.2f}",
                unknown if entry.top5 is None else f"{entry.top5:.2f}",
                "?" if entry.megabytes is None else str(entry.megabytes),
                entry.licence,
                ", ".join(dict.fromkeys(cache for cache, _ in _plausible_copies(entry))) or "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = {header.index(name) for name in ("top-1", "top-5", "MB")}
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    folders = [f"  {name}: {folder}" for name, folder in caches().items()]
    return "\n".join([*lines, "", *_LEGEND, "caches:", *folders])


_LEGEND = (
    "net: column of Table 1; bn: with batch normalisation; conv: without fully connected layers",
    "top-1, top-5: accuracy on ImageNet's validation images in percent, as published; the authors'",
    "  is that of the dense evaluation at Q = 384; ?: unknown, -: none",
)


def _plausible_copies(entry: PublishedWeights) -> Iterator[tuple[str, Path]]:
    """The copies in the caches that do not have a wrong size."""
    for name, path in cached_files(entry):
        if entry.size_fault(path.stat().st_size) is None:
            yield name, path
