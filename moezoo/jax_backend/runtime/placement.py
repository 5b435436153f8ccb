"""Placement for which a program is being traced: all that row-wise code needs to know about the mesh."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import jax
from jax.sharding import Mesh, PartitionSpec


class Placement(Protocol):
    """A mesh of devices and the axes over which the tokens of a batch are sharded."""

    @property
    def mesh(self) -> Mesh: ...

    @property
    def batch_axes(self) -> tuple[str, ...]: ...


_active: ContextVar[Placement | None] = ContextVar("placement", default=None)


@contextmanager
def active(placement: Placement | None) -> Iterator[None]:
    """Trace for this placement inside the context; None traces for one device."""
    token = _active.set(placement)
    try:
        yield
    finally:
        _active.reset(token)


def active_placement() -> Placement | None:
    """Return the placement of the model being traced; None on one device."""
    return _active.get()


def row_by_row(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a row-wise function of arrays [P, ...] to run on each device's own rows (`shard_map`).

    Trap: XLA all-gathers the rows for some operations that each device could run on its own rows (`top_k`).
    """
    placement = active_placement()
    if placement is None:
        return function
    rows = PartitionSpec(placement.batch_axes)
    return jax.shard_map(function, mesh=placement.mesh, in_specs=rows, out_specs=rows, check_vma=False)
