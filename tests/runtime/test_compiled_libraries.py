"""Damaged libraries in MLX's own cache of compiled code are removed, so that MLX compiles them again."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.backends_available import require_backend

# A chain of operations that MLX compiles, and the check of the libraries before and after.
CHAIN = """
import time
from moezoo.mlx_backend.runtime import compiled_libraries
compiled_libraries._SETTLED_S = -1.0
compiled_libraries.check_compiled_libraries()
import mlx.core as mx
print(mx.compile(lambda x: mx.exp(x) * 2 + mx.abs(x))(mx.zeros(3)).tolist())
"""


@pytest.fixture
def run(tmp_path: Path) -> Callable[[], str]:
    require_backend("mlx")
    from moezoo.mlx_backend.kernels.x86.optimizer import can_fuse

    if not can_fuse():
        pytest.skip("MLX compiles nothing here")

    def start() -> str:
        words = [sys.executable, "-c", CHAIN]
        done = subprocess.run(
            words, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[2.0, 2.0, 2.0]"
        return done.stderr

    return start


def test_a_flipped_bit_and_a_cut_are_named_and_compiled_again(run: Callable[[], str], tmp_path: Path) -> None:
    assert run() == ""
    [library] = tmp_path.rglob("lib*.so")
    sound = library.read_bytes()
    damaged = bytearray(sound)
    damaged[len(damaged) // 2] ^= 1
    for content in (bytes(damaged), sound[: len(sound) // 2]):
        library.write_bytes(content)
        os.utime(library, (0, 0))
        assert "is damaged and is compiled again" in run()
        assert len(library.read_bytes()) == len(sound)
