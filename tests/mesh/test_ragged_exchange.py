"""`exchange: ragged`, which the CPU has not: its offsets by a stand-in for JAX's operation, and what a TPU gets."""

import json

import pytest

from tests.mesh.simulated import run_simulated
from tests.support.tolerances import FLOAT32, FLOAT32_GRADIENT


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return json.loads(run_simulated("ragged.py").splitlines()[-1])


def test_it_computes_what_the_padded_exchange_does(found) -> None:
    apart = found["apart"]
    assert apart["losses"] <= FLOAT32.relative
    assert apart["gradients"] <= FLOAT32_GRADIENT.relative


def test_a_step_for_tpus_has_it_there_and_back_forward_and_backward_in_each_layer(found) -> None:
    assert found["lowered"] == {"ragged_all_to_all": 2 * 2 * 2}
