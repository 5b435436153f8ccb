"""Multi-process JAX: join, exchange numbers, leave. JAX only: MLX initializes its process group on first use.

All communication is JAX's own (jax.distributed): the first process is the coordinator, and devices run collectives
(Gloo on the CPU, NCCL on CUDA). Each process runs the same program; arrays are sharded over the devices of all.
"""

import functools
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moezoo.core.distributed.process_group import ProcessGroup, set_immediate_exit
from moezoo.core.distributed.processes import Numbers, PendingNumbers, Processes
from moezoo.core.distributed.startup import startup_limit
from moezoo.core.errors import BackendError, TrainingError

_RETRY_S = 0.1
_LATER_S = 60


def join(group: ProcessGroup) -> None:
    """Initialize JAX's process group. Call it before anything queries JAX's devices.

    From then on, an error ends this process immediately. Raises BackendError: no coordinator, or a process is missing
    after the timeout.
    """
    # Trap: JAX's preemption service catches SIGTERM, which the training loop handles: all processes agree to stop.
    jax.config.update("jax_enable_preemption_service", False)
    address = None if group.coordinator == "auto" else group.coordinator
    if address is not None:
        _check_reachable(group)
    set_immediate_exit()
    sys.excepthook = functools.partial(_print_and_exit, sys.excepthook)
    failure = f"cannot join the other JAX processes within {group.startup_s} s; got {group.options()}"
    advice = "Start all processes at the same time, with the same --coordinator, at which nothing else listens."
    try:
        with startup_limit(group.startup_s, f"{BackendError.__name__}: {failure} and no answer. {advice}"):
            jax.distributed.initialize(
                address,
                group.num_processes,
                group.process_id,
                cluster_detection_method=None if address is None else "deactivate",
                # Trap: at its own limit jaxlib aborts with a native stack, so ours comes first.
                initialization_timeout=group.startup_s + _LATER_S,
                heartbeat_timeout_seconds=group.heartbeat_s,
                shutdown_timeout_seconds=group.shutdown_s,
                # Trap: otherwise, the coordinator listens on all network interfaces.
                coordinator_bind_address=address,
            )
    except (RuntimeError, ValueError, TypeError) as error:
        cause = " ".join(str(error).split())[:300].rstrip(".")
        raise BackendError(f"{failure} and {cause}. {advice}") from None


def _check_reachable(group: ProcessGroup) -> None:
    """Check the coordinator's address. Trap: if it cannot listen or starts too late, jaxlib aborts by a signal."""
    host, _, port = group.coordinator.rpartition(":")
    address = host.strip("[]"), int(port)
    try:
        if group.process_id == 0:
            socket.create_server(address, family=socket.AF_INET6 if ":" in address[0] else socket.AF_INET).close()
            return
        deadline = time.monotonic() + group.startup_s
        while True:
            try:
                socket.create_connection(address, timeout=group.startup_s).close()
                return
            except OSError:  # its host name may resolve late too
                if time.monotonic() > deadline:
                    raise
                time.sleep(_RETRY_S)
    except OSError as error:
        action = "listen there" if group.process_id == 0 else f"reach the first process within {group.startup_s} s"
        raise BackendError(
            f"cannot {action}: {(error.strerror or str(error)).lower()}; got {group.options()}. Start "
            "all processes at the same time, with a free HOST:PORT of the first process's machine."
        ) from None


def leave() -> None:
    """Wait for all processes, then shut down the process group."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()
        set_immediate_exit(False)


def processes() -> Processes:
    """Return the rank of this process and the number of processes in this run."""
    return Processes(jax.process_index(), jax.process_count()) if _joined() else Processes()


def facts() -> dict[str, str]:
    """Return the entries for a run's header."""
    count = processes().count
    each = f"{jax.local_device_count()} device{'s' if jax.local_device_count() > 1 else ''}"
    return {} if count == 1 else {"processes": f"{count}, each with {each}"}


def gather(number: int) -> PendingNumbers:
    """All-gather one number per process. See moezoo.core.backend.Backend.gather."""
    if processes().count == 1:
        return Numbers((number,))
    all_gather, sharding = _all_gather_program()
    count = jax.device_count()

    def own_numbers(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return np.full(len(range(count)[index[0]]), number, np.int32)

    numbers = jax.make_array_from_callback((count,), sharding, own_numbers)
    with lost_peer():
        return _Gathered(all_gather(numbers))


@contextmanager
def lost_peer() -> Iterator[None]:
    """Raise TrainingError if a CPU collective fails because another process ended, earlier than by its heartbeat."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if processes().count == 1 or "Gloo" not in str(error):
            raise
        raise TrainingError(
            f"another process of the run has ended; got {' '.join(str(error).split())[:200]} in process "
            f"{processes().index} of {processes().count}. See the output of that process, then continue from the last "
            "checkpoint with --resume."
        ) from None


def on_host(values: Any) -> Any:
    """Return the arrays of a tree as whole NumPy arrays. All processes must call it, in the same order."""

    def here(value: Any) -> Any:
        if not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated:
            return value
        return multihost_utils.process_allgather(value, tiled=True)

    with lost_peer():
        return jax.device_get(jax.tree.map(here, values))


class _Gathered:
    """All-gathered numbers, one per device; all devices of a process have the same number."""

    def __init__(self, numbers: jax.Array):
        self._numbers = numbers

    def fetch(self) -> Sequence[int]:
        owners = [device.process_index for device in jax.devices()]
        found = dict(zip(owners, on_host(self._numbers).tolist(), strict=True))
        return [found[index] for index in range(jax.process_count())]


@functools.cache
def _all_gather_program() -> tuple[Any, NamedSharding]:
    """Return a compiled all-gather of one number per device, and the sharding of its input."""
    mesh = Mesh(np.array(jax.devices()), ("device",))
    own, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("device"), PartitionSpec()))
    return jax.jit(lambda numbers: numbers, out_shardings=whole), own


def _joined() -> bool:
    """Return True after `join`. Trap: querying JAX's processes initializes JAX, which then cannot join others."""
    return jax.distributed.is_initialized()


def _print_and_exit(print_error: Any, *error: Any) -> None:
    """Print an error and exit. Trap: a failed process waits at shutdown for the others, and they for its next step."""
    print_error(*error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
