"""A JAX process exits while XLA still computes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.backends_available import require_backend

ROOT = Path(__file__).parents[2]

LEFT_RUNNING = """
import jax, jax.numpy as jnp
from moezoo.jax_backend.kernels import openblas
from moezoo.jax_backend.runtime.in_flight import launched

def products(x):
    for _ in range(40):  # fewer operations would run before the call returns
        x = openblas.grouped_rows(sizes, x, w) + 1
    return x

found = openblas.load()
if found:
    x, w, sizes = jnp.ones((2048, 512)), jnp.zeros((2, 512, 512)), jnp.array([1000, 1048])
    run = jax.jit(products)
    run(x).block_until_ready()
    y = run(x)
    assert not y.is_ready()
    launched(y)
    del y
print(found)
"""


@pytest.mark.slow
def test_process_ends_while_xla_calls_openblas():
    """XLA's client is destroyed with the interpreter's lock held, for which a handler would wait forever."""
    require_backend("jax")
    done = subprocess.run(
        [sys.executable, "-c", LEFT_RUNNING],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("OpenBLAS 0.") or sys.platform != "linux"
