"""Platform for which a program is traced; in a plan, it may be absent. JAX only: MLX has no ahead-of-time plans."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

from moezoo.core.errors import BackendError

_planned: ContextVar[str | None] = ContextVar("platform", default=None)


_ASKED_BY = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES")


def start_devices() -> None:
    """Have JAX find its devices. Raises BackendError: a platform that environment variables ask for is not there."""
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # an AssertionError for cuda without its plugin
        asked = [f"{name}={os.environ[name]}" for name in _ASKED_BY if os.environ.get(name)]
        cause = " ".join(str(error).split())[:300].rstrip(".")
        raise BackendError(
            f"JAX has no device to run on; got {' '.join(asked) or 'no request for a platform'}"
            f"{f' ({cause})' if cause else ''}; expected a platform that is installed. For an NVIDIA GPU run "
            "`pip install 'moezoo[cuda]'`; for the CPU set JAX_PLATFORMS=cpu; for what there is, unset these variables."
        ) from None


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
