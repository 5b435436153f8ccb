"""Processes without a backend: shares of a batch, and `first_process_first`. Results of training: test_launch.py."""

import numpy as np
import pytest

from moezoo.core.distributed.processes import Numbers, Processes, first_process_first
from moezoo.core.errors import SpecError


class FakeBackend:
    """A backend whose other processes gathered `others`; it logs when it waits for them."""

    def __init__(self, index: int, others: tuple[int, ...] = (0,)):
        self.processes, self.others = Processes(index, 1 + len(others)), others
        self.log: list[str] = []

    def gather(self, number: int) -> Numbers:
        self.log.append("waited")
        return Numbers((number, *self.others))


def test_shares_of_a_batch_are_equal_disjoint_and_complete() -> None:
    parts = [Processes(index, 3).share(12) for index in range(3)]
    assert [len(part) for part in parts] == [4, 4, 4]
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(12))
    np.testing.assert_array_equal(Processes().share(5), np.arange(5))


def test_indivisible_batch_is_refused() -> None:
    with pytest.raises(SpecError, match=r"got 6 sequences .*expected a multiple of 4"):
        Processes(1, 4).share(6)


@pytest.mark.parametrize(("index", "order"), [(0, ["worked", "waited"]), (1, ["waited", "worked"])])
def test_the_first_process_works_before_the_others(index: int, order: list[str]) -> None:
    backend = FakeBackend(index)

    def work() -> str:
        backend.log.append("worked")
        return "done"

    assert first_process_first(backend, work) == "done"
    assert backend.log == order
