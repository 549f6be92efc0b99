"""Several processes as one run: how they start, agree and end, on jax's distributed runtime.

A function marked "Collective" must be called by every process, in the same order. In a single
process it returns its own answer without any communication.
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
from vgg_jax.errors import PROCESS_LOST_EXIT_CODE, DataError, InputError, single_line

HEARTBEAT_TIMEOUT = 60  # seconds without a heartbeat of a peer, until jax ends this process
# Seconds without a step, until a process ends itself. Its peers may be alive and hang forever,
# for example on a disk, and then their heartbeats continue.
WATCHDOG_TIMEOUT = 1800
SHUTDOWN_GRACE = 2  # seconds
# jax's messages contain one of these if a peer is gone.
LOST_PEER_MARKERS = ("Gloo", "NCCL", "oordination", "UNAVAILABLE", "DEADLINE_EXCEEDED")
JAX_ENV_VARS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# The variables by which jax recognises each launcher. The last one is the number of processes.
# For SLURM that is the number of tasks in the step, which is 1 in the shell that salloc opens.
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
    """Another process of the run ended, so the step cannot finish."""


def detect_cluster(environment: Mapping[str, str]) -> str | None:
    """Detects if a launcher started this program as one of several processes.

    Args:
        environment: The environment variables.

    Returns:
        The launcher's name, or the coordinator variable and its value; None for a single process.
    """
    if _has_all(environment, JAX_ENV_VARS):
        return f"{JAX_ENV_VARS[0]}={environment[JAX_ENV_VARS[0]]}"
    for launcher, names in CLUSTER_ENV_VARS.items():
        if _has_all(environment, names) and environment[names[-1]] != "1":
            return launcher
    is_pod = _has_all(environment, ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"))
    if is_pod and importlib.util.find_spec("kubernetes"):
        return "Kubernetes"
    has_workers = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    has_slices = bool(environment.get("MEGASCALE_COORDINATOR_ADDRESS"))
    if importlib.util.find_spec("libtpu") and (has_workers or has_slices):
        return "a TPU pod"
    return None


def _has_all(environment: Mapping[str, str], names: tuple[str, ...]) -> bool:
    return all(environment.get(name) for name in names)


def initialize(mode: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Connects to the other processes of the run, if there are any.

    Collective. Call it before anything asks jax for its devices.

    Args:
        mode: "auto" connects if `detect_cluster` detects a launcher. "on" connects always, also
            where only jax detects the processes, as on a Cloud TPU. "off" never connects.
        environment: The environment variables.

    Returns:
        A line for the user about the processes and devices, or None for a single process.

    Raises:
        InputError: The mode is unknown, or the processes cannot connect.
    """
    if mode not in DISTRIBUTED_MODES:
        raise InputError(f"distributed is {mode!r}: expected one of {', '.join(DISTRIBUTED_MODES)}")
    if mode == "off":
        return None
    launcher = detect_cluster(environment)
    # Open MPI 5 no longer sets the variable by which jax recognises it.
    if launcher is None and environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        raise InputError(
            f"Open MPI started {environment['OMPI_COMM_WORLD_SIZE']} processes, which cannot find "
            f"each other: expected {', '.join(JAX_ENV_VARS)} in each, as "
            "experiments/launch/open_mpi.sh sets them; or pass --distributed off"
        )
    if mode == "auto" and launcher is None:
        return None
    try:
        # jax would handle SIGTERM itself, which `fit` handles.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
            **_explicit_cluster(environment),
        )
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        raise InputError(
            f"the processes cannot connect ({single_line(error, 300)}): expected SLURM, Open MPI, "
            f"Kubernetes, a TPU pod, or {', '.join(JAX_ENV_VARS)} set in each process; "
            "see experiments/launch, or pass --distributed off"
        ) from error
    return (
        f"{launcher or 'a TPU'}: process {jax.process_index()} of {jax.process_count()}, "
        f"{jax.local_device_count()} of {jax.device_count()} devices"
    )


def _explicit_cluster(environment: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `jax.distributed.initialize` that `JAX_ENV_VARS` define, if all are set."""
    if not _has_all(environment, JAX_ENV_VARS):
        return {}
    address, count, index = (environment[name] for name in JAX_ENV_VARS)
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
        # This process then gets all visible devices of its machine.
        "cluster_detection_method": "deactivate",
    }


@contextlib.contextmanager
def shutdown_on_exit() -> Iterator[None]:
    """Closes the connection to the other processes after the block.

    If the block raises, the connection closes with the process instead. Collective.
    """
    try:
        yield
    except Exception:
        if jax.process_count() > 1 and is_main_process():
            # jax aborts the peers once this process is gone. They may have the same error to print.
            time.sleep(SHUTDOWN_GRACE)
        raise
    if jax.process_count() > 1:
        jax.distributed.shutdown()  # waits for the peers


def is_main_process() -> bool:
    """Tells if this process is the one that prints and that owns the workdir."""
    return jax.process_index() == 0


def run_on_main_and_broadcast(function: Callable[[], Any]) -> Any:
    """Runs a function in the main process and sends its result to all processes.

    Collective.

    Args:
        function: It returns a JSON value. Only the main process calls it.

    Returns:
        The function's result.

    Raises:
        InputError: The function raised it. It is raised in all processes.
        DataError: In the same way.
    """
    if jax.process_count() == 1:
        return function()
    outcome = {}
    if is_main_process():
        try:
            outcome = {"result": function()}
        except DataError as error:
            outcome = {"data_error": str(error)}
        except InputError as error:
            outcome = {"input_error": str(error)}
    outcome = _broadcast_json_from_main(outcome)
    if "data_error" in outcome:
        raise DataError(outcome["data_error"])
    if "input_error" in outcome:
        raise InputError(outcome["input_error"])
    return outcome["result"]


def _broadcast_json_from_main(value: Any) -> Any:
    text = json.dumps(value).encode()
    size = int(broadcast_from_main(np.int32(len(text))))
    # Every process passes an array of the same shape. Only the main one's content counts.
    array = np.frombuffer(text.ljust(size)[:size], np.uint8)
    return json.loads(broadcast_from_main(array).tobytes())


def broadcast_from_main(array: Any) -> Any:
    """Sends the main process's array to all processes.

    Collective.

    Args:
        array: The array to send. The other processes pass one of the same shape and dtype.

    Returns:
        The main process's array, on the host.
    """
    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def assert_same_on_all(values: Mapping[str, Any]) -> None:
    """Checks that all processes have the same values.

    Collective.

    Args:
        values: Named values, compared by their `repr`.

    Raises:
        InputError: Some values differ. It is raised in all processes, and names their values.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digests = np.array([zlib.crc32(repr(value).encode()) for value in values.values()], np.uint32)
    is_equal = (np.asarray(multihost_utils.process_allgather(digests)) == digests).all(0)
    if not is_equal.all():
        differences = "; ".join(
            f"{name} is {repr(value)[:200]}"
            for (name, value), same in zip(values.items(), is_equal, strict=True)
            if not same
        )
        raise InputError(
            f"the processes have different settings: in process {jax.process_index()} "
            f"{differences}; expected the same in each"
        )


def any_process(flag: bool) -> bool:
    """Tells if the flag is set in any process. Collective."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.bool_(flag))))


class StepSynchronizer:
    """Lets all processes react to a request of any process at the same step.

    The exchange of one step is read at the next one. So a step never waits for it, and no process
    waits for a peer that already left the loop.

    Args:
        mesh: The mesh of all devices of the run.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._pending: jax.Array | None = None
        self._any_row = jax.jit(lambda requests: requests.any(0), out_shardings=replicated(mesh))

    def any(self, stop: bool, save: bool) -> tuple[bool, bool]:
        """Combines the requests of all processes.

        Collective, once for each step.

        Args:
            stop: This process wants to stop.
            save: This process wants to save.

        Returns:
            `(stop, save)`: if any process requested it at the previous call. A single process
            gets its own requests of this call.
        """
        if jax.process_count() == 1:
            return stop, save
        previous = self._pending
        rows = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        row = np.array([[stop, save]])
        requests = jax.make_array_from_callback((self._mesh.size, 2), rows, lambda _: row)
        self._pending = self._any_row(requests)
        if previous is None:
            return False, False
        stop, save = np.asarray(previous.addressable_data(0)).tolist()
        return stop, save


@contextlib.contextmanager
def translate_lost_peer(workdir: Path) -> Iterator[None]:
    """Turns jax's error about a lost process into a message for the user.

    jax may end this process instead. Then it prints the reason itself.

    Args:
        workdir: The folder of the run, for the message.

    Raises:
        ProcessLostError: An error of the block says that another process is gone.
    """
    try:
        yield
    # On CPUs, the error of a collective is a ValueError, raised where its result is read.
    except (ValueError, RuntimeError) as error:
        is_lost_peer = any(marker in str(error) for marker in LOST_PEER_MARKERS)
        if jax.process_count() == 1 or isinstance(error, InputError) or not is_lost_peer:
            raise
        raise ProcessLostError(
            f"another process of this run has ended ({single_line(error)}): see its output; "
            f"run the same command to resume from the last save in {workdir}"
        ) from error


class Watchdog:
    """Ends this process unless `heartbeat()` is called regularly.

    A process whose peer hangs would wait for it forever, and print nothing. A single process has
    no watchdog. Use it as a context manager.

    Args:
        seconds: The longest time between two heartbeats.
    """

    def __init__(self, seconds: float = WATCHDOG_TIMEOUT) -> None:
        self._seconds, self._last_heartbeat = seconds, time.monotonic()
        self._closed = threading.Event()
        if jax.process_count() > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def heartbeat(self) -> None:
        """Reports that this process makes progress."""
        self._last_heartbeat = time.monotonic()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last_heartbeat > self._seconds:
                # Not by logging: the thread that hangs may hold the lock of its handler.
                print(
                    f"vgg-jax: process {jax.process_index()} did no step in {self._seconds:.0f} s: "
                    "it or another one is stuck; run the same command to resume from the last save",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(PROCESS_LOST_EXIT_CODE)

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
