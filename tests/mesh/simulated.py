"""Run a script of this folder with simulated devices: a process that has started JAX cannot have more of them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.backends_available import require_backend
from tests.support.source_tree import PACKAGE


def run_simulated(script: str, *words: str, devices: int = 8, backend: str = "jax") -> str:
    """Return the output of the script."""
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


def jobs_of(items: list[pytest.Item], path: Path) -> list[str]:
    """Jobs of the selected tests of a file, which they name by a parameter `job` or `jobs`."""
    parameters = [getattr(item, "callspec", None) for item in items if item.path == path]
    named = [each.params for each in parameters if each is not None]
    return list(dict.fromkeys(job for each in named for job in (*each.get("jobs", ()), each.get("job")) if job))


def results(script: str, jobs: list[str], **options: object) -> dict[str, Any]:
    """Return the results of each job, run in one process that imports JAX once: one line of JSON each."""
    lines = run_simulated(script, *jobs, **options).splitlines()[-len(jobs) :] if jobs else []
    return dict(zip(jobs, map(json.loads, lines), strict=True))
