"""The platform that a program is made for, which is not always one that is there. Only here: MLX plans nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

_planned: ContextVar[str | None] = ContextVar("platform", default=None)


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: that of JAX's devices, unless a program is planned for another."""
    return _planned.get() or jax.default_backend()


@contextmanager
def planned_for(name: str) -> Iterator[None]:
    """What is traced inside is written for that platform."""
    token = _planned.set(name)
    try:
        yield
    finally:
        _planned.reset(token)
