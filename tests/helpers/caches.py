"""Empty caches of all libraries, and published weights of a few bytes."""

import hashlib

from vgg_jax.weights.pretrained import Digest, PublishedWeights

CONTENT = bytes(range(256)) * 5000  # 1.28 MB: more than one read


def use_caches(monkeypatch, folder):
    """Points every cache at subfolders of a folder."""
    for name in (
        "HF_HUB_CACHE",
        "HF_ENDPOINT",
        "VGG_JAX_MIRROR",
        "http_proxy",
        "HTTP_PROXY",
        "all_proxy",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    for name in ("VGG_JAX_CACHE", "TORCH_HOME", "HF_HOME", "KERAS_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(folder / name))


def small_entry(url="https://example.org/tiny.bin", content=CONTENT, **changes):
    """Published weights of which size and SHA-256 are known."""
    entry = PublishedWeights(
        name="tiny/net",
        net="A",
        batch_norm=False,
        url=url,
        source="nobody",
        licence="none",
        size=len(content),
        digest=Digest("sha256", hashlib.sha256(content).hexdigest()),
    )
    return entry._replace(**changes)
