"""`exchange: ragged`, which the CPU has not: its offsets by a stand-in for JAX's operation, and what a TPU gets."""

import json

from tests.mesh.simulated import run_simulated
from tests.support.tolerances import FLOAT32, FLOAT32_GRADIENT


def test_it_computes_what_the_padded_exchange_does() -> None:
    apart = json.loads(run_simulated("ragged.py", "equal").splitlines()[-1])
    assert apart["losses"] <= FLOAT32.relative
    assert apart["gradients"] <= FLOAT32_GRADIENT.relative


def test_a_step_for_tpus_has_it_there_and_back_forward_and_backward_in_each_layer() -> None:
    assert json.loads(run_simulated("ragged.py", "lowered").splitlines()[-1]) == {"ragged_all_to_all": 2 * 2 * 2}
