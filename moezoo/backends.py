"""Backends by name: the default, the packages that each needs, and loading one."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform

from moezoo.core.backend import Backend
from moezoo.core.cost.make_plan import Planner
from moezoo.core.distributed.mesh import MeshConfig
from moezoo.core.distributed.process_group import ProcessGroup
from moezoo.core.distributed.startup import STARTUP_S
from moezoo.core.errors import BackendError, nearest
from moezoo.core.extras import missing, missing_message

NAMES = ("jax", "mlx")
PACKAGES = {"jax": ("jax", "flax", "optax"), "mlx": ("mlx",)}
"""Packages that each backend needs; `core.extras` says how to install them."""


def default_backend() -> str:
    """Return the default backend: `$BACKEND` if set, else mlx on Apple silicon and jax elsewhere.

    If only one backend is installed, that one.
    """
    chosen = os.environ.get("BACKEND")
    if chosen:
        return chosen
    usual, other = ("mlx", "jax") if platform.system() == "Darwin" and platform.machine() == "arm64" else ("jax", "mlx")
    return other if missing_packages(usual) and not missing_packages(other) else usual


def missing_packages(name: str) -> list[str]:
    """Return the packages that a backend needs and that are not installed."""
    return missing(*PACKAGES[name])


def versions() -> dict[str, str]:
    """Return the versions of moezoo, Python, NumPy and each backend's packages; "not installed" for a missing one."""
    found = {"moezoo": importlib.metadata.version("moezoo"), "Python": platform.python_version()}
    for package in dict.fromkeys(["numpy", *(package for name in NAMES for package in PACKAGES[name])]):
        installed = importlib.util.find_spec(package) is not None
        found[package] = importlib.metadata.version(package) if installed else "not installed"
    return found


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
    *,
    for_training: bool = True,
) -> Backend:
    """Import a backend and return it.

    Args:
        name: `jax` or `mlx`; None: the default.
        mesh: the devices to use; None: one.
        group: the JAX process group to join; None: a single process, or an MLX group from the environment.
        startup_s: time to wait for the other processes of an MLX group.
        for_training: False where a model is only used: JAX on the CPU then answers sooner for a token, but a training
            step would not take over the memory of the one before. The first backend of a process decides.

    Raises BackendError: an unknown name, missing packages, or a group that cannot be joined. Raises SpecError: a mesh
    that the backend does not support.
    """
    name = name or default_backend()
    if name not in NAMES:
        known = f"expected one of {', '.join(NAMES)}.{_of_device(name)}"
        raise BackendError(f"unknown backend; got {name!r}{nearest(name, NAMES)}; {known}")
    _check_installed(name, _instead_of(name))
    if name == "jax":
        _import_jax()
        from moezoo.jax_backend.backend import JaxBackend

        return JaxBackend(mesh, group, for_training=for_training)
    if group is not None:
        raise BackendError(
            f"process group options are for backend jax only; got {group.options()} with backend mlx. Start MLX "
            "processes with `moezoo launch --nproc N train ...` or mlx.launch."
        )
    from moezoo.mlx_backend.backend import MlxBackend
    from moezoo.mlx_backend.distributed.data_parallel import join

    join(startup_s)
    return MlxBackend(mesh, for_training=for_training)


def load_backends() -> dict[str, Backend]:
    """Import all backends and return them by name. Raises BackendError: packages of one are missing."""
    absent = [package for name in NAMES for package in missing_packages(name)]
    if absent:
        raise BackendError(missing_message("comparing the backends", *absent))
    return {name: load_backend(name) for name in NAMES}


def _instead_of(name: str) -> str:
    other = next(each for each in NAMES if each != name)
    return f"or 'moezoo[{other}]' for --backend {other}" if missing_packages(other) else f"or use --backend {other}"


def _of_device(name: str) -> str:
    """Return how to ask for a device, if that is what was given in place of a backend."""
    match name.lower():
        case "cuda" | "gpu" | "nvidia" | "tpu":
            extra = platform = "tpu" if name.lower() == "tpu" else "cuda"
            return (
                f" For this device use --backend jax, after `pip install 'moezoo[{extra}]'`: JAX then takes it by "
                f"itself, and fails without it if JAX_PLATFORMS={platform} is set."
            )
        case "metal" | "mps" | "apple":
            return " For Apple's GPU use --backend mlx, which takes it by itself."
        case "cpu":
            return " Both run on the CPU; JAX_PLATFORMS=cpu keeps --backend jax from an accelerator."
    return ""


def _import_jax() -> None:
    """Import JAX. Raises BackendError: it cannot read one of its environment variables."""
    try:
        importlib.import_module("jax")
    except ValueError as error:
        raise BackendError(
            f"JAX does not start; got {' '.join(str(error).split())[:300].rstrip('.')}; expected a value "
            "that JAX can read. Correct or unset the environment variable."
        ) from None


def _check_installed(name: str, otherwise: str) -> None:
    if absent := missing_packages(name):
        raise BackendError(missing_message(f"backend {name}", *absent, otherwise=f", {otherwise}"))
