"""The memory that is free on this machine or in its container."""

import math

from vgg_jax.runtime import memory


def test_container_limits_free_memory(tmp_path, monkeypatch):
    """The cgroup of the process or one above it has the limit. Its file cache can be dropped."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    assert memory._free_in_cgroup(inner) == math.inf
    for folder, limit in ((inner, "max"), (inner.parent, "5000000")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("3000000\n")
        (folder / "memory.stat").write_text("anon 9\ninactive_file 1000000\nactive_file 1\n")
    assert memory._free_in_cgroup(inner) == math.inf
    monkeypatch.setattr(memory, "_cgroups", lambda: [inner, inner.parent, tmp_path])
    assert memory.free_memory() == 3_000_000


def test_cgroups_end_at_the_root():
    folders = [str(folder) for folder in memory._cgroups()]
    assert folders[-1] == "/sys/fs/cgroup"
    assert all(folder.startswith("/sys/fs/cgroup") for folder in folders)
