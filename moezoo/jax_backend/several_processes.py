"""Several processes of one JAX program: joining them, what they agree on, and leaving. Only here: MLX joins by itself.

Everything between them is JAX's own (jax.distributed): a coordinator, which the first process is, and collectives of
the devices (gloo on the CPU, NCCL on CUDA). Each process runs the same program; arrays lie on the devices of all.
"""

import functools
import os
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moezoo.core.errors import BackendError
from moezoo.core.process_group import ProcessGroup, others_wait
from moezoo.core.processes import Numbers, PendingNumbers, Processes


def join(group: ProcessGroup) -> None:
    """Find the other processes; to be called before anything asks JAX for its devices.

    From now on an error ends this process at once. Raises BackendError: no coordinator, or not all came in time.
    """
    # Trap: JAX's preemption service takes SIGTERM away from the train loop, which agrees on a stop by itself.
    jax.config.update("jax_enable_preemption_service", False)
    address = None if group.coordinator == "auto" else group.coordinator
    others_wait()
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
            f"cannot join the other JAX processes within {group.startup_s} s; got {group.in_words()} and "
            f"{' '.join(str(error).split())[:300]}. Start all of them at the same time, with the same --coordinator."
        ) from None


def leave() -> None:
    """Wait until all processes have come here, and part."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()
        others_wait(False)


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
    given = jax.make_array_from_callback(
        (jax.device_count(),), own, lambda places: np.full(len(range(jax.device_count())[places[0]]), number, np.int32)
    )
    return _Gathered(everywhere(given))


def on_host(values: Any) -> Any:
    """Arrays of any tree as NumPy arrays, whole. Of several processes, all must ask, in the same order."""

    def here(value: Any) -> Any:
        if not isinstance(value, jax.Array) or value.is_fully_addressable or value.is_fully_replicated:
            return value
        return multihost_utils.process_allgather(value, tiled=True)

    return jax.device_get(jax.tree.map(here, values))


class _Gathered:
    """The numbers of all devices, of which each process has given its own to all of its."""

    def __init__(self, numbers: jax.Array):
        self._numbers = numbers

    def fetch(self) -> Sequence[int]:
        owners = [device.process_index for device in jax.devices()]
        found = dict(zip(owners, np.asarray(self._numbers).tolist(), strict=True))
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
