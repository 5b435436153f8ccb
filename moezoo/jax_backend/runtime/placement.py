"""Placement for which a program is being traced: all that row-wise code needs to know about the mesh."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec


class Placement(Protocol):
    """A mesh of devices and the axes over which tokens, and the features of n-gram embeddings, are sharded."""

    @property
    def mesh(self) -> Mesh: ...

    @property
    def batch_axes(self) -> tuple[str, ...]: ...

    @property
    def ngram_axes(self) -> tuple[str, ...]: ...


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


def look_up(table_SRH: jax.Array, row_BTN: jax.Array, rows: int, dtype: jnp.dtype) -> jax.Array:
    """Return rows [B, T, N, H] of a table that is stored in S parts of R = `rows` rows.

    On a mesh each device has some features of every row. It looks up those that all tokens of its group need, and an
    all-to-all returns them to the tokens' devices: the table is not moved, and neither is its gradient.
    """

    def here(table_SRH: jax.Array, row_BTN: jax.Array) -> jax.Array:
        part_BTN, row_BTN = jnp.divmod(row_BTN, rows)
        return table_SRH[part_BTN, row_BTN].astype(dtype)

    placement = active_placement()
    if placement is None or not placement.ngram_axes:
        return here(table_SRH, row_BTN)
    group, batch = placement.ngram_axes, PartitionSpec(placement.batch_axes)

    def on_each_device(table_SRH: jax.Array, row_BTN: jax.Array) -> jax.Array:
        found_BTNH = here(table_SRH, lax.all_gather(row_BTN, group, tiled=True))
        own_BTNH: jax.Array = lax.all_to_all(found_BTNH, group, 0, 3, tiled=True)
        return own_BTNH

    # Trap: without check_vma, devices along other axes, which look up the same, would sum the table's gradient.
    mapped = jax.shard_map(
        on_each_device,
        mesh=placement.mesh,
        in_specs=(PartitionSpec(None, None, group), batch),
        out_specs=batch,
    )
    return mapped(table_SRH, row_BTN)
