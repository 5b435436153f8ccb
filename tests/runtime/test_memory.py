"""Memory of a JAX step is that of the step before: page faults, and the header of a run, each in its own process."""

import platform
import subprocess
import sys

import pytest

from tests.support.backends_available import require_backend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only its malloc returns what a step frees"),
]

# A step has 72 MiB of temporary arrays, which malloc maps whatever its dynamic threshold. The median leaves out steps
# in which a thread of JAX has its first product, and a new buffer for it.
_STEPS = """
import resource
import numpy as np
from moezoo.backends import load_backend
from moezoo.core.config.run_config import load_config
from moezoo.core.parameters.initialize import initial_weights

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

changes = ["model.vocab_size=4096", "model.layers.0.repeat=1", "data.tokenizer={kind: ids, vocab_size: 4096}"]
config = load_config("configs/tiny/dense.yaml", [*changes, "data.sources=[{kind: tokens, path: unread}]"])
backend = load_backend("jax")
model = backend.build(config.model, initial_weights(config.model, 0))
model.start_training(config.optimizer)
windows = np.zeros((1, 32, 65), np.int32)
for _ in range(2):
    model.train_step(windows, 1e-3).fetch()
counts = [faults()]
for _ in range(9):
    model.train_step(windows, 1e-3).fetch()
    counts.append(faults())
print(backend.facts()["freed memory"], np.median(np.diff(counts)), sep="; ")
"""


def _output(program: str) -> str:
    require_backend("jax")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_steps_after_the_second_have_no_page_faults():
    how, faults = _output(_STEPS).split("; ")
    assert how == "kept in the main thread (mallopt)"
    assert float(faults) < 200  # temporary arrays have 18,000 pages


def test_header_says_that_jax_had_started_before():
    program = 'from moezoo.backends import load_backend\nprint(load_backend("jax").facts()["freed memory"])'
    assert _output(f"import jax\njax.devices()\n{program}").startswith("returned to the system: JAX had started")
