"""Several processes that train one model: who this one is, which sequences are its own, and how they agree."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import SpecError

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Processes:
    """This process is the `index`-th of `count`. The first alone writes files and speaks."""

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def share(self, batch: int) -> NDArray[np.int64]:
        """Which of `batch` sequences are this process's own, where all take equal parts in order: int64 [b].

        Raises SpecError where they cannot be equal.
        """
        own = batch // self.count
        if own * self.count != batch:
            raise SpecError(
                f"{self.count} processes cannot have equal parts of a micro-batch; got {batch} sequences "
                f"(training.batch_size / training.gradient_accumulation); expected a multiple of {self.count}."
            )
        return np.arange(self.index * own, (self.index + 1) * own)


class PendingNumbers(Protocol):
    """One number of each process, which may still be on their way."""

    def fetch(self) -> Sequence[int]:
        """Wait for them: that of process i at place i."""
        ...


@dataclass(frozen=True)
class Numbers:
    """Numbers that are here already: what a process that is alone has gathered."""

    values: tuple[int, ...]

    def fetch(self) -> Sequence[int]:
        return self.values


class Gathers(Protocol):
    """What of a backend (`core.backend.Backend`) is needed to agree."""

    @property
    def processes(self) -> Processes: ...
    def gather(self, number: int) -> PendingNumbers: ...


def first_then_others(backend: Gathers, work: Callable[[], _Result]) -> _Result:
    """What `work` gives, done by the first process while the others wait, and then by them: they find its files."""
    if backend.processes.is_first:
        result = work()
        backend.gather(0).fetch()
        return result
    backend.gather(0).fetch()
    return work()
