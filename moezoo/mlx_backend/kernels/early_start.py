"""Start of computations before their graph is complete."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import mlx.core as mx

from moezoo.mlx_backend.kernels.x86 import is_x86_cpu

_WHOLE = ContextVar("whole graph", default=False)


def start_early(x: mx.array) -> None:
    """On an x86 CPU, start computing x, so that Python builds the rest of a token's graph meanwhile.

    MLX itself starts when the graph is complete, and then does not return before most of it is computed.
    """
    if is_x86_cpu() and not _WHOLE.get():
        mx.async_eval(x)


@contextlib.contextmanager
def whole_graph() -> Iterator[None]:
    """Start nothing early: for graphs that are looked at."""
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)
