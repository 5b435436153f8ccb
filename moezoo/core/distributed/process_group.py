"""What a command is told about the group of processes that it belongs to, and how it ends if it fails there."""

import os
import re
import sys
from dataclasses import dataclass
from typing import NoReturn

from moezoo.core.errors import BackendError


@dataclass(frozen=True)
class ProcessGroup:
    """How a JAX process finds the others. MLX's find each other by what their launcher has put into the environment.

    Fields:
        coordinator: HOST:PORT of the first process, which listens there; or `auto`, where SLURM, Kubernetes, Open MPI
            or a Cloud TPU says who is who (`jax.distributed.initialize`).
        num_processes, process_id: how many there are, and which this is, from 0; None with `auto`.
        startup_s: how long to wait for all to come.
        heartbeat_s: after how long a process that is silent counts as dead, which ends all others.
        shutdown_s: how long one that has finished waits for the others.
    """

    coordinator: str
    num_processes: int | None = None
    process_id: int | None = None
    startup_s: int = 60
    heartbeat_s: int = 20
    shutdown_s: int = 30

    def __post_init__(self) -> None:
        given = self.num_processes is not None and self.process_id is not None
        if self.coordinator == "auto":
            if self.num_processes is not None or self.process_id is not None:
                raise BackendError(
                    f"--coordinator auto finds out who is who; got {self.in_words()}. Leave --num-processes and "
                    "--process-id out, or give HOST:PORT."
                )
        elif not re.fullmatch(r"\S+:[0-9]{1,5}", self.coordinator):
            raise BackendError(
                f"--coordinator is {self.coordinator!r}; expected HOST:PORT of the first process, or auto."
            )
        elif not given:
            raise BackendError(
                f"--coordinator HOST:PORT needs --num-processes and --process-id; got {self.in_words()}. "
                "Give both to every process."
            )
        elif not 0 <= (self.process_id or 0) < (self.num_processes or 0):
            raise BackendError(
                f"--process-id is {self.process_id} of --num-processes {self.num_processes}; expected 0 to "
                f"{(self.num_processes or 0) - 1}, each once."
            )

    def in_words(self) -> str:
        """`--coordinator ...`: the options that it was made from."""
        options = (
            *(("coordinator", self.coordinator), ("num-processes", self.num_processes)),
            ("process-id", self.process_id),
        )
        return " ".join(f"--{name} {value}" for name, value in options if value is not None)


_others_wait = False


def others_wait(wait: bool = True) -> None:
    """Say whether other processes wait for what this one does, and `end` must not wait for them in turn."""
    global _others_wait
    _others_wait = wait


def end(status: int) -> NoReturn:
    """End this process with an exit status; at once where others wait for it, so that they learn of it."""
    if _others_wait:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
