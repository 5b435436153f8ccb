"""Several processes of one JAX program: joining them, what they agree on, and leaving. Only here: MLX joins by itself.

Everything between them is JAX's own (jax.distributed): a coordinator, which the first process is, and collectives of
the devices (gloo on the CPU, NCCL on CUDA). Each process runs the same program; arrays lie on the devices of all.
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
from moezoo.core.errors import BackendError, TrainingError

_LOOK_AGAIN_S = 0.1


def join(group: ProcessGroup) -> None:
    """Find the other processes; to be called before anything asks JAX for its devices.

    From now on an error ends this process at once. Raises BackendError: no coordinator, or not all came in time.
    """
    # Trap: JAX's preemption service takes SIGTERM away from the train loop, which agrees on a stop by itself.
    jax.config.update("jax_enable_preemption_service", False)
    address = None if group.coordinator == "auto" else group.coordinator
    if address is not None:
        _check_reachable(group)
    set_immediate_exit()
    sys.excepthook = functools.partial(_tell_and_end, sys.excepthook)
    try:
        jax.distributed.initialize(
            address,
            group.num_processes,
            group.process_id,
            cluster_detection_method=None if address is None else "deactivate",
            initialization_timeout=group.startup_s,
            heartbeat_timeout_seconds=group.heartbeat_s,
            shutdown_timeout_seconds=group.shutdown_s,
            # Trap: else the coordinator listens on all of the machine's addresses.
            coordinator_bind_address=address,
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise BackendError(
            f"cannot join the other JAX processes within {group.startup_s} s; got {group.options()} and "
            f"{' '.join(str(error).split())[:300]}. Start all of them at the same time, with the same --coordinator."
        ) from None


def _check_reachable(group: ProcessGroup) -> None:
    """Trap: where the coordinator cannot listen, or does not come in time, jaxlib ends the process by a signal."""
    host, _, port = group.coordinator.rpartition(":")
    place = host.strip("[]"), int(port)
    try:
        if group.process_id == 0:
            socket.create_server(place, family=socket.AF_INET6 if ":" in place[0] else socket.AF_INET).close()
            return
        deadline = time.monotonic() + group.startup_s
        while True:
            try:
                socket.create_connection(place, timeout=group.startup_s).close()
                return
            except OSError:  # its name may be as late as itself
                if time.monotonic() > deadline:
                    raise
                time.sleep(_LOOK_AGAIN_S)
    except OSError as error:
        what = "listen there" if group.process_id == 0 else f"reach the first process within {group.startup_s} s"
        raise BackendError(
            f"cannot {what}: {(error.strerror or str(error)).lower()}; got {group.options()}. Give all processes a "
            "free HOST:PORT of the first one's machine, and start them at the same time."
        ) from None


def leave() -> None:
    """Wait until all processes have come here, and part."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()
        set_immediate_exit(False)


def processes() -> Processes:
    """The processes of this run."""
    return Processes(jax.process_index(), jax.process_count()) if _joined() else Processes()


def facts() -> dict[str, str]:
    """What a run's header says."""
    count = processes().count
    each = f"{jax.local_device_count()} device{'s' if jax.local_device_count() > 1 else ''}"
    return {} if count == 1 else {"processes": f"{count}, each with {each}"}


def gather(number: int) -> PendingNumbers:
    """See moezoo.core.backend.Backend.gather."""
    if processes().count == 1:
        return Numbers((number,))
    everywhere, own = _exchange()
    count = jax.device_count()

    def own_numbers(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        return np.full(len(range(count)[index[0]]), number, np.int32)

    given = jax.make_array_from_callback((count,), own, own_numbers)
    with lost_peer():
        return _Gathered(everywhere(given))


@contextmanager
def lost_peer() -> Iterator[None]:
    """Says in our words that another process has gone, where the CPU's collectives notice it before a heartbeat."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if processes().count == 1 or "Gloo" not in str(error):
            raise
        raise TrainingError(
            f"another process of the run has ended; got {' '.join(str(error).split())[:200]} in process "
            f"{processes().index} of {processes().count}. See what that one said, and go on from the last checkpoint "
            "with --resume."
        ) from None


def on_host(values: Any) -> Any:
    """Arrays of any tree as NumPy arrays, whole. Of several processes, all must ask, in the same order."""

    def here(value: Any) -> Any:
        if not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated:
            return value
        return multihost_utils.process_allgather(value, tiled=True)

    with lost_peer():
        return jax.device_get(jax.tree.map(here, values))


class _Gathered:
    """The numbers of all devices, of which each process has given its own to all of its."""

    def __init__(self, numbers: jax.Array):
        self._numbers = numbers

    def fetch(self) -> Sequence[int]:
        owners = [device.process_index for device in jax.devices()]
        found = dict(zip(owners, on_host(self._numbers).tolist(), strict=True))
        return [found[index] for index in range(jax.process_count())]


@functools.cache
def _exchange() -> tuple[Any, NamedSharding]:
    mesh = Mesh(np.array(jax.devices()), ("device",))
    own, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("device"), PartitionSpec()))
    return jax.jit(lambda numbers: numbers, out_shardings=whole), own


def _joined() -> bool:
    """Whether there are others. Trap: to ask JAX for its processes starts it, and then none can be joined."""
    return jax.distributed.is_initialized()


def _tell_and_end(tell: Any, *error: Any) -> None:
    """Trap: a process that failed would wait for the others to shut down, and they for its part of the next step."""
    tell(*error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
