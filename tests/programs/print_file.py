"""Prints a file, local or in an object store, or nothing if it does not exist.

python -m tests.programs.print_file PATH
"""

import sys

from vgg_jax.paths import to_path

if __name__ == "__main__":
    path = to_path(sys.argv[1])
    print(path.read_text() if path.exists() else "", end="")
