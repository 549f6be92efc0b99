"""Loads the best network of a run with the nets of the tests, prints a summary, and evaluates it.

python -m tests.programs.evaluate_run WORKDIR
"""

import json
import sys

from tests.programs.train_tiny import register_nets
from vgg_jax import cli, load

if __name__ == "__main__":
    register_nets()
    workdir = sys.argv[1]
    _, variables, metadata = load(workdir)
    accuracy = metadata["validation"]["accuracy"]
    weight_sum = float(abs(variables["params"]["fc6"]["kernel"]).sum())
    print(json.dumps([metadata["epoch"], accuracy, weight_sum]))
    out = f"{workdir}/evaluated"
    sys.exit(cli.main(["evaluate", workdir, "--protocol", "center", "--out", out]))
