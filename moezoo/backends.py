"""Backends by name: the default, the packages that each needs, and loading one."""

import importlib.util
import os
import platform

from moezoo.core.backend import Backend
from moezoo.core.cost.make_plan import Planner
from moezoo.core.distributed.mesh import MeshConfig
from moezoo.core.distributed.process_group import ProcessGroup
from moezoo.core.distributed.startup import STARTUP_S
from moezoo.core.errors import BackendError, nearest

NAMES = ("jax", "mlx")
_PACKAGES = {"jax": ("jax", "flax", "optax"), "mlx": ("mlx",)}


def default_backend() -> str:
    """Return the default backend: `$BACKEND` if set, else mlx on Apple silicon and jax elsewhere."""
    chosen = os.environ.get("BACKEND")
    if chosen:
        return chosen
    return "mlx" if platform.system() == "Darwin" and platform.machine() == "arm64" else "jax"


def missing_packages(name: str) -> list[str]:
    """Return the packages that a backend needs and that are not installed."""
    return [package for package in _PACKAGES[name] if importlib.util.find_spec(package) is None]


def load_planner() -> Planner:
    """Return the planner, which compiles training steps for simulated devices (JAX only).

    Raises BackendError: not installed.
    """
    _check_installed("jax", "or plan by formula alone with --formula")
    from moezoo.jax_backend.planning import ahead_of_time

    return ahead_of_time


def load_backend(
    name: str | None = None,
    mesh: MeshConfig | None = None,
    group: ProcessGroup | None = None,
    startup_s: float = STARTUP_S,
) -> Backend:
    """Import a backend and return it.

    Args:
        name: `jax` or `mlx`; None: the default.
        mesh: the devices to use; None: one.
        group: the JAX process group to join; None: a single process, or an MLX group from the environment.
        startup_s: time to wait for the other processes of an MLX group.

    Raises BackendError: an unknown name, missing packages, or a group that cannot be joined. Raises SpecError: a mesh
    that the backend does not support.
    """
    name = name or default_backend()
    if name not in NAMES:
        raise BackendError(f"unknown backend; got {name!r}{nearest(name, NAMES)}; expected one of {', '.join(NAMES)}.")
    _check_installed(name, "or choose another one with --backend")
    if name == "jax":
        from moezoo.jax_backend.backend import JaxBackend

        return JaxBackend(mesh, group)
    if group is not None:
        raise BackendError(
            f"process group options are for backend jax only; got {group.options()} with backend mlx. Start MLX "
            "processes with `moezoo launch --nproc N train ...` or mlx.launch."
        )
    from moezoo.mlx_backend.backend import MlxBackend
    from moezoo.mlx_backend.distributed.data_parallel import join

    join(startup_s)
    return MlxBackend(mesh)


def _check_installed(name: str, otherwise: str) -> None:
    missing = missing_packages(name)
    if missing:
        raise BackendError(
            f"backend {name} is not installed; missing {', '.join(missing)}. "
            f"Run `pip install {' '.join(missing)}`, {otherwise}."
        )
