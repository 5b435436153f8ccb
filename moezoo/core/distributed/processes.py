"""Data-parallel processes: ranks, each process's share of a batch, and agreement between processes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from moezoo.core.errors import SpecError

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Processes:
    """Rank of this process and world size. Only the first process writes files and prints.

    Fields:
        index: rank of this process, from 0.
        count: number of processes.
    """

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def share(self, batch: int) -> NDArray[np.int64]:
        """Return the indices of this process's contiguous, equal share of `batch` sequences: int64 [b].

        Raises SpecError: `batch` is not divisible by the number of processes.
        """
        own = batch // self.count
        if own * self.count != batch:
            raise SpecError(
                f"a micro-batch cannot be divided equally among {self.count} processes; got {batch} sequences "
                f"(training.batch_size / training.gradient_accumulation); expected a multiple of {self.count}. "
                "Change the batch size or the number of processes."
            )
        return np.arange(self.index * own, (self.index + 1) * own)


class PendingNumbers(Protocol):
    """Asynchronous result of an all-gather of one number per process."""

    def fetch(self) -> Sequence[int]:
        """Wait for the numbers and return them by rank."""
        ...


@dataclass(frozen=True)
class Numbers:
    """Result of an all-gather that is already complete, with a single process for instance."""

    values: tuple[int, ...]

    def fetch(self) -> Sequence[int]:
        return self.values


class SupportsGather(Protocol):
    """The part of `core.backend.Backend` that agreement between processes needs."""

    @property
    def processes(self) -> Processes: ...
    def gather(self, number: int) -> PendingNumbers: ...


def first_process_first(backend: SupportsGather, work: Callable[[], _Result]) -> _Result:
    """Run `work` in the first process while the others wait, then in the others, which find the first one's files."""
    if backend.processes.is_first:
        result = work()
        backend.gather(0).fetch()
        return result
    backend.gather(0).fetch()
    return work()
