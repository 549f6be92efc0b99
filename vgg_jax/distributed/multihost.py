"""Several processes as one run, by jax's own distributed runtime: how they start and end, and what they agree on.

Every process calls these functions in the same order. With one process each of them does what is left of it, and no more.
"""

import contextlib
import importlib.util
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vgg_jax.configs.train import DISTRIBUTED_MODES
from vgg_jax.distributed.sharding import replicated
from vgg_jax.errors import DataError, InputError

HEARTBEAT_TIMEOUT = 60  # without a sign of life of another process, before jax ends this one
WATCHDOG_TIMEOUT = 1800  # without a step, before a process ends itself: another one may be alive and wait for ever, for a disk for example
SHUTDOWN_GRACE = 2
LOST_PEER_MARKERS = (
    "Gloo",
    "NCCL",
    "oordination",
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
)  # in what jax says where another process is gone
JAX_ENV_VARS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# What each engine sets in the environment of its processes, the last of them their number: what jax itself looks for, and of SLURM the
# number of the step's tasks, which is 1 in a shell that salloc gave.
CLUSTER_ENV_VARS = {
    "SLURM": (
        "SLURM_JOB_ID",
        "SLURM_STEP_NODELIST",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NTASKS",
        "SLURM_STEP_NUM_TASKS",
    ),
    "Open MPI": ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
}


class ProcessLostError(Exception):
    """Another process is gone, and with it the step."""


def detect_cluster(environment: Mapping[str, str]) -> str | None:
    """What has started this program as one of several processes, if anything has."""
    if all(environment.get(name) for name in JAX_ENV_VARS):
        return f"{JAX_ENV_VARS[0]}={environment[JAX_ENV_VARS[0]]}"
    for engine, names in CLUSTER_ENV_VARS.items():
        if all(environment.get(name) for name in names) and environment[names[-1]] != "1":
            return engine
    pod = all(environment.get(name) for name in ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"))
    if pod and importlib.util.find_spec("kubernetes"):
        return "Kubernetes"
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    if importlib.util.find_spec("libtpu") and (
        "," in hosts or environment.get("MEGASCALE_COORDINATOR_ADDRESS")
    ):
        return "a TPU pod"
    return None


def initialize(mode: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Joins the other processes, if there are any; says what was found. Before anything else asks jax for its devices.

    "auto" does so where `detect_cluster` finds something, "on" also where jax alone does: on a Cloud TPU. Raises InputError where that fails.
    """
    if mode not in DISTRIBUTED_MODES:
        raise InputError(f"distributed is {mode!r}: expected one of {', '.join(DISTRIBUTED_MODES)}")
    engine = detect_cluster(environment)
    if mode == "off":
        return None
    if (
        engine is None and environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1"
    ):  # since Open MPI 5 jax finds it no more
        raise InputError(
            f"Open MPI started {environment['OMPI_COMM_WORLD_SIZE']} processes, which cannot find each other: expected "
            f"{', '.join(JAX_ENV_VARS)} in each, as experiments/launch/open_mpi.sh sets them; or pass --distributed off"
        )
    if mode == "auto" and engine is None:
        return None
    given: dict[str, Any] = {}
    try:
        if all(environment.get(name) for name in JAX_ENV_VARS):
            address, count, number = (environment[name] for name in JAX_ENV_VARS)
            given = {
                "coordinator_address": address,
                "num_processes": int(count),
                "process_id": int(number),
            }
            given["cluster_detection_method"] = (
                "deactivate"  # all devices of this machine that it may see are this process's
            )
        jax.config.update(
            "jax_enable_preemption_service", False
        )  # it would take SIGTERM, which `fit` listens to
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
            **given,
        )
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        names = ", ".join(JAX_ENV_VARS)
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"the processes cannot join ({reason}): expected SLURM, Open MPI, Kubernetes, a TPU pod, or {names} set in each process; "
            "see experiments/launch, or pass --distributed off"
        ) from error
    return (
        f"{engine or 'a TPU'}: process {jax.process_index()} of {jax.process_count()}, "
        f"{jax.local_device_count()} of {jax.device_count()} devices"
    )


@contextlib.contextmanager
def shutdown_on_exit() -> Iterator[None]:
    """Ends the connection to the other processes with the block, or, where that ends by an error, with the process."""
    try:
        yield
    except Exception:
        if jax.process_count() > 1 and is_main_process():
            time.sleep(
                SHUTDOWN_GRACE
            )  # they may have the same to say, and jax aborts them when this one is gone
        raise
    if jax.process_count() > 1:
        jax.distributed.shutdown()  # waits for the others


def is_main_process() -> bool:
    """Whether this process is the one that prints, and that has the run's folder."""
    return jax.process_index() == 0


def run_on_main_and_broadcast(function: Callable[[], Any]) -> Any:
    """What the function gives in the first process, which alone calls it: a JSON value. Its InputError is raised in all of them."""
    if jax.process_count() == 1:
        return function()
    said: dict[str, Any] = {}
    if is_main_process():
        try:
            said = {"value": function()}
        except InputError as error:
            said = {"error": str(error), "of_data": isinstance(error, DataError)}
    text = json.dumps(said).encode()
    size = int(broadcast_from_main(np.int32(len(text))))
    said = json.loads(
        broadcast_from_main(np.frombuffer(text.ljust(size)[:size], np.uint8)).tobytes()
    )
    if "error" in said:
        raise (DataError if said["of_data"] else InputError)(said["error"])
    return said["value"]


def broadcast_from_main(array: Any) -> Any:
    """The first process's array in all of them; the others give one of the same shape and type."""
    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def assert_same_on_all(values: Mapping[str, Any]) -> None:
    """Raises InputError in all processes where one of the values is not the same in each of them."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digests = np.array([zlib.crc32(repr(value).encode()) for value in values.values()], np.uint32)
    equal = (np.asarray(multihost_utils.process_allgather(digests)) == digests).all(0)
    if not equal.all():
        here = "; ".join(
            f"{name} is {repr(value)[:200]}"
            for (name, value), same in zip(values.items(), equal, strict=True)
            if not same
        )
        raise InputError(
            f"the processes are to do different things: in process {jax.process_index()} {here}; expected the same in each"
        )


def any_process(flag: bool) -> bool:
    """Whether it is set in any process."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


class StepSynchronizer:
    """What any of the processes wishes, known to all of them at the same step: what was asked with one is answered with the next.

    Then no process waits for another one that is not there, and a step's exchange is not waited for. A single process hears at once.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._asked: jax.Array | None = None
        self._any = jax.jit(lambda wishes: wishes.any(0), out_shardings=replicated(mesh))

    def any(self, stop: bool, save: bool) -> tuple[bool, bool]:
        if jax.process_count() == 1:
            return stop, save
        before, axes = self._asked, PartitionSpec(self._mesh.axis_names)
        mine = np.array([[stop, save]])
        self._asked = self._any(
            jax.make_array_from_callback(
                (self._mesh.size, 2), NamedSharding(self._mesh, axes), lambda _: mine
            )
        )
        if before is None:
            return False, False
        stop, save = np.asarray(before.addressable_data(0)).tolist()
        return stop, save


@contextlib.contextmanager
def translate_lost_peer(workdir: Path) -> Iterator[None]:
    """Raises ProcessLostError where an error of jax's says that another process is gone. Where jax ends this one instead, it says why."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        # On CPUs the exchange's error comes as a ValueError, where the array is read.
        if (
            jax.process_count() == 1
            or isinstance(error, InputError)
            or not any(word in str(error) for word in LOST_PEER_MARKERS)
        ):
            raise
        reason = " ".join(str(error).split())[:200]
        raise ProcessLostError(
            f"another process of this run has ended ({reason}): see what it printed; the same command goes on from what was saved last in "
            f"{workdir}"
        ) from error


class Watchdog:
    """Ends this process, unless it is told again and again that it goes on: one that waits for another for ever says nothing."""

    def __init__(self, seconds: float = WATCHDOG_TIMEOUT) -> None:
        self._seconds, self._heard = seconds, time.monotonic()
        self._off = threading.Event()
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def heartbeat(self) -> None:
        self._heard = time.monotonic()

    def _watch(self) -> None:
        while not self._off.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._heard > self._seconds:
                print(
                    f"vgg-jax: process {jax.process_index()} did no step in {self._seconds:.0f} s: it or another one is stuck; "
                    "the same command goes on from what was saved last",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(76)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self._off.set()
