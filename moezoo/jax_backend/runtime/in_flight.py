"""Computations that XLA has not finished when the process exits."""

import contextlib
from typing import Any

import jax

_newest: list[Any] = []


def launched(values: Any) -> None:
    """Remember outputs of the newest step, also if its caller drops all of them."""
    _newest[:] = [values]


def wait() -> None:
    """Wait until XLA computes nothing any more. Errors of computations that nobody waited for are ignored.

    A step reads the parameters of the one before, so that the newest one ends last.
    """
    for array in [*jax.tree.leaves(_newest), *jax.live_arrays()]:
        with contextlib.suppress(Exception):
            jax.block_until_ready(array)
