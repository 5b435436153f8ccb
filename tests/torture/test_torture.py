"""A slice of the torture (`make torture`): files in the gate, processes for a release.

The gate stops and kills groups of MLX processes in tests/core/distributed/test_launch.py, and stops runs of one process
in tests/core/training.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moezoo.core.files import PACKAGE
from tests.support.backends_available import require_backend

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("only", "attempts"),
    [
        pytest.param("flip", 8, id="flipped bits"),
        pytest.param("mutation", 8, id="mutations"),
        pytest.param("replaced", 5, id="replaced files"),
        pytest.param("mlx", 1, id="mlx processes", marks=pytest.mark.release),
        pytest.param("jax", 1, id="jax processes", marks=pytest.mark.release),
        pytest.param("mesh", 1, id="mesh processes", marks=pytest.mark.release),
    ],
)
def test_nothing_is_lost_or_silently_wrong(tmp_path: Path, only: str, attempts: int) -> None:
    if only in ("mlx", "jax", "mesh"):
        require_backend("mlx" if only == "mlx" else "jax")
    words = ["--no-sharded", "--only", only, "--attempts", str(attempts), "--seed", "1", "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.torture", *words],
        cwd=PACKAGE.parent,
        env=os.environ | {"PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
