"""Runs a script of this folder with simulated devices, of which a process that has begun with JAX cannot have more."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.backends_available import require_backend
from tests.support.source_tree import PACKAGE


def run_simulated(script: str, *words: str, devices: int = 8, backend: str = "jax") -> str:
    """What the script printed."""
    require_backend(backend)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    root = PACKAGE.parent
    result = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *words],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
