"""Facts about the machine and the installation, for a diagnosis and for a bug report."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping

import numpy as np

from moezoo.core.cost.available import available_memory
from moezoo.core.doctor.finding import Finding

_PACKAGES = ("moezoo", "numpy", "jax", "jaxlib", "flax", "mlx", "safetensors", "tokenizers")
_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "XLA_FLAGS", "BACKEND", "JAX_PLATFORMS")
_GIB = 1 << 30


def environment(backend: str, facts: Mapping[str, str]) -> dict[str, str]:
    """Return facts by name: machine, memory, versions, BLAS, variables, and `facts` of the backend."""
    memory = available_memory()
    versions = {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    return {
        "machine": f"{platform.system()} {platform.machine()}, {_cores()} cores, Python {platform.python_version()}",
        "memory": "unknown" if memory is None else f"{memory.bytes / _GIB:.1f} GiB, {memory.limit}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "numpy's BLAS": _blas(),
        **({"variables": ", ".join(f"{name}={value}" for name, value in variables.items())} if variables else {}),
        "backend": backend,
        **facts,
    }


def memory_findings(weight_bytes: int) -> list[Finding]:
    """Return a finding if a model's parameters do not fit into the memory of this machine."""
    memory = available_memory()
    if memory is None or weight_bytes <= memory.bytes:
        return []
    return [
        Finding(
            "warning",
            "memory",
            f"the parameters have {weight_bytes / _GIB:.1f} GiB, and {memory.bytes / _GIB:.1f} GiB are available",
            memory.limit,
            "The model cannot be loaded here as it is.",
            "Quantize it (`moezoo convert --quantize`), or use a machine with more memory.",
        )
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _blas() -> str:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()
