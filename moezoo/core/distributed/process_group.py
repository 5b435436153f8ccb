"""Settings of a JAX process group (coordinator, ranks, timeouts), and how a process of a group exits."""

import os
import re
import sys
from dataclasses import dataclass
from typing import NoReturn

from moezoo.core.distributed.startup import STARTUP_S
from moezoo.core.errors import BackendError


@dataclass(frozen=True)
class ProcessGroup:
    """Rendezvous settings of a JAX process. MLX processes get theirs from environment variables set by the launcher.

    Fields:
        coordinator: HOST:PORT at which the first process listens; or `auto`, to detect address and ranks under SLURM,
            Kubernetes, Open MPI or on a Cloud TPU (`jax.distributed.initialize`).
        num_processes, process_id: number of processes, and rank of this one from 0; None with `auto`.
        startup_s: timeout for all processes to connect.
        heartbeat_s: time without a heartbeat after which a process counts as dead and all others exit.
        shutdown_s: how long a finished process waits for the others.
    """

    coordinator: str
    num_processes: int | None = None
    process_id: int | None = None
    startup_s: int = STARTUP_S
    heartbeat_s: int = 20
    shutdown_s: int = 30

    def __post_init__(self) -> None:
        has_both = self.num_processes is not None and self.process_id is not None
        if self.coordinator == "auto":
            if self.num_processes is not None or self.process_id is not None:
                raise BackendError(
                    f"--coordinator auto detects the number of processes and their ranks; got {self.options()}. "
                    "Remove --num-processes and --process-id, or use --coordinator HOST:PORT."
                )
        elif not is_address(self.coordinator):
            raise BackendError(
                f"--coordinator is {self.coordinator!r}; expected HOST:PORT of the first process with a port from 1 to "
                "65535, or auto. Use the same address in every process."
            )
        elif not has_both:
            raise BackendError(
                f"--coordinator HOST:PORT needs --num-processes and --process-id; got {self.options()}. "
                "Pass both to every process."
            )
        elif not 0 <= (self.process_id or 0) < (self.num_processes or 0):
            raise BackendError(
                f"--process-id is {self.process_id} of --num-processes {self.num_processes}; expected 0 to "
                f"{(self.num_processes or 0) - 1}. Pass a different id to each process."
            )

    def options(self) -> str:
        """Return the command-line options of these settings: `--coordinator ...`."""
        options = (
            *(("coordinator", self.coordinator), ("num-processes", self.num_processes)),
            ("process-id", self.process_id),
        )
        return " ".join(f"--{name} {value}" for name, value in options if value is not None)


def is_address(text: str) -> bool:
    """Return True for HOST:PORT with a port from 1 to 65535."""
    return re.fullmatch(r"\S+:[0-9]{1,5}", text) is not None and 1 <= int(text.rpartition(":")[2]) <= 65535


_immediate_exit = False


def set_immediate_exit(enabled: bool = True) -> None:
    """Set whether `exit_process` skips all cleanup: on while peers would block in a collective with this process."""
    global _immediate_exit
    _immediate_exit = enabled


def exit_process(status: int) -> NoReturn:
    """Exit with a status: immediately while peers wait for this process, so that they fail too, else normally."""
    if _immediate_exit:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
