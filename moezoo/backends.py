"""The one place that knows which backends exist."""

import importlib.util
import os
import platform

from moezoo.core.backend import Backend
from moezoo.core.cost.make_plan import Planner
from moezoo.core.distributed.mesh import MeshConfig
from moezoo.core.distributed.process_group import ProcessGroup
from moezoo.core.errors import BackendError, nearest

NAMES = ("jax", "mlx")
_PACKAGES = {"jax": ("jax", "flax", "optax"), "mlx": ("mlx",)}


def default_backend() -> str:
    """`$BACKEND` if set, else mlx on Apple silicon and jax elsewhere."""
    chosen = os.environ.get("BACKEND")
    if chosen:
        return chosen
    return "mlx" if platform.system() == "Darwin" and platform.machine() == "arm64" else "jax"


def missing_packages(name: str) -> list[str]:
    """Packages that the backend needs and that are not installed."""
    return [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]


def load_planner() -> Planner:
    """Return the module that compiles training steps for simulated devices, which only JAX can.

    Raises BackendError: not installed.
    """
    _check_installed("jax", "or plan by formula alone with --formula")
    from moezoo.jax_backend.planning import ahead_of_time

    return ahead_of_time


def load_backend(name: str | None = None, mesh: MeshConfig | None = None, group: ProcessGroup | None = None) -> Backend:
    """Import a backend (the default one for None), for the devices of a mesh, and join a group of processes.

    Raises BackendError: unknown name, not installed, or a group that cannot be joined. Raises SpecError: a mesh that it
    cannot have.
    """
    name = name or default_backend()
    if name not in NAMES:
        raise BackendError(f"no such backend; got {name!r}{nearest(name, NAMES)}; expected one of {', '.join(NAMES)}.")
    _check_installed(name, "or choose another one with --backend")
    if name == "jax":
        from moezoo.jax_backend.backend import JaxBackend

        return JaxBackend(mesh, group)
    if group is not None:
        raise BackendError(
            f"only JAX processes have a coordinator; got {group.in_words()} with backend mlx. Start MLX's with "
            "`moezoo launch --nproc N train ...` or mlx.launch."
        )
    from moezoo.mlx_backend.backend import MlxBackend

    return MlxBackend(mesh)


def _check_installed(name: str, otherwise: str) -> None:
    missing = missing_packages(name)
    if missing:
        raise BackendError(
            f"backend {name} is not installed; missing {', '.join(missing)}. "
            f"Run `pip install {' '.join(missing)}`, {otherwise}."
        )
