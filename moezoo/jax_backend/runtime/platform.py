"""Platform for which a program is traced; in a plan, it may be absent. JAX only: MLX has no ahead-of-time plans."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_planned: ContextVar[str | None] = ContextVar("platform", default=None)


def platform() -> str:
    """Return `cpu`, `gpu` or `tpu`: the platform of JAX's devices, unless inside `planned_for`."""
    return _planned.get() or jax.default_backend()


@contextmanager
def planned_for(name: str) -> Iterator[None]:
    """Trace for the named platform inside the context."""
    token = _planned.set(name)
    try:
        yield
    finally:
        _planned.reset(token)
