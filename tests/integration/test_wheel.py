"""The wheel and the source archive, installed outside of the repository."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import vgg_jax

pytestmark = [pytest.mark.slow, pytest.mark.integration]

ROOT = Path(__file__).parents[2]
USER_PROGRAM = ROOT / "tests" / "programs" / "user_program.py"


def run(*command, cwd):
    """Runs a command without this process's Python path, and returns its stdout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The wheel and the source archive, built from a copy of the tracked files."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    run("git", "clone", "-q", str(ROOT), str(source), cwd=folder)
    build = "from hatchling.build import build_sdist; build_sdist('..')"
    run(sys.executable, "-c", build, cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    # The wheel is built from the source archive, which so has all that it needs.
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", ".", str(sdist), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel, sdist


def test_archives_hold_the_tracked_files(archives):
    wheel, sdist = archives
    names = zipfile.ZipFile(wheel).namelist()
    assert vgg_jax.__version__ in wheel.name and vgg_jax.__version__ in sdist.name
    with tarfile.open(sdist) as archive:
        files = {name.split("/", 1)[-1] for name in archive.getnames()}
    tracked = run("git", "ls-files", cwd=sdist.parent / "source").splitlines()
    assert files == {*tracked, "PKG-INFO"}
    package = {name for name in tracked if name.startswith("vgg_jax/")}
    assert package == {name for name in names if ".dist-info/" not in name}
    licences = {name.split("/licenses/")[1] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "vgg_jax/weights/lpips_LICENSE.txt"}


def find_python(version):
    """The path of a Python, in PATH or of pyenv, or None."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    candidates = [f"python{version}", *map(str, pyenv.glob(f"{version}.*/bin/python"))]
    for candidate in candidates:
        program = "import sys; print(sys.version_info[:2])"
        try:
            result = subprocess.run([candidate, "-c", program], capture_output=True, text=True)
        except FileNotFoundError:
            continue
        if result.stdout == f"{tuple(map(int, version.split('.')))}\n":
            return candidate
    return None


def test_wheel_works_outside_of_the_repository(archives, tmp_path):
    """A light environment: jax, flax, numpy, safetensors and Pillow.

    The wheel is the same for all Pythons. .ci/run tests 3.11 and 3.13.
    """
    base = find_python("3.12") or sys.executable
    wheel, _ = archives
    python = str(tmp_path / "env" / "bin" / "python")
    run(base, "-m", "venv", "env", cwd=tmp_path)
    run(python, "-m", "pip", "install", "-q", str(wheel), cwd=tmp_path)
    command = str(tmp_path / "env" / "bin" / "vgg-jax")
    assert vgg_jax.__version__ in run(command, "--version", cwd=tmp_path)
    assert "Train, for example" in run(command, cwd=tmp_path)
    assert "138,357,544" in run(command, "summary", "D", cwd=tmp_path)
    program = tmp_path / "user_program.py"
    program.write_text(USER_PROGRAM.read_text())
    assert run(python, str(program), cwd=tmp_path) == "(2, 10)\n"
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.jpg")
    assert "photo.jpg: " in run(command, "predict", "net.safetensors", "photo.jpg", cwd=tmp_path)
    run(command, "export", "net.safetensors", "out.safetensors", cwd=tmp_path)
    assert "largest difference" in run(command, "verify", "out.safetensors", cwd=tmp_path)
    assert "tensorflow" not in run(python, "-m", "pip", "list", cwd=tmp_path)
    run(python, "-m", "pip", "install", "-q", "mypy", cwd=tmp_path)
    assert "Success" in run(python, "-m", "mypy", "--strict", str(program), cwd=tmp_path)
