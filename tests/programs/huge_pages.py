"""Prints glibc's tunables and its arguments after `use_huge_pages`."""

import os
import sys

from vgg_jax.runtime.memory import use_huge_pages

use_huge_pages()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:])
