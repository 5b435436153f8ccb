"""`exchange: ragged`, which XLA has not on the CPU: offsets with a stand-in for its operation, and the TPU program."""

import json

import pytest

from tests.mesh.simulated import run_simulated
from tests.support.tolerances import FLOAT32, FLOAT32_GRADIENT


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    return json.loads(run_simulated("ragged.py").splitlines()[-1])


def test_ragged_exchange_matches_one_device(found) -> None:
    apart = found["apart"]
    assert apart["losses"] <= FLOAT32.relative
    assert apart["gradients"] <= FLOAT32_GRADIENT.relative


def test_step_for_tpus_has_it_in_dispatch_and_combine_forward_and_backward(found) -> None:
    assert found["lowered"] == {"ragged_all_to_all": 2 * 2 * 2}
