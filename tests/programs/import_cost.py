"""Prints the seconds that `import vgg_jax` takes, the modules, and the backends that it started."""

import json
import sys
import time

start = time.perf_counter()
import vgg_jax  # noqa: E402, F401

seconds = time.perf_counter() - start

import jax  # noqa: E402

backends = sorted(jax._src.xla_bridge._backends)
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules), "backends": backends}))
