import math

import numpy as np
import pytest

from moezoo.core.config import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.dispatch import Dispatch, capacity, combine, dispatch, num_dropped
from moezoo.core.reference.losses import expert_counts
from moezoo.core.reference.routing import Routing
from moezoo.core.spec import CapacitySpec, DroplessSpec, MoESpec
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT64, assert_close
from tests.twins import D, E, K, P, Twin, assert_function_matches, assert_reference_gradient, normal

R = P * K
EXPERT_PK = np.random.default_rng(0).permuted(np.tile(np.arange(E), (P, 1)), axis=1)[:, :K]
WEIGHT_PK = np.abs(normal(1, P, K)) + 0.1
Y_RD = normal(2, R, D)
SPECS = {"dropless": DroplessSpec(), "tight": CapacitySpec(factor=0.5), "loose": CapacitySpec(factor=10.0)}


def routing_of(expert_PK, weight_PK) -> Routing:
    """A routing whose scores nobody asks for."""
    return Routing(expert_PK, weight_PK, np.zeros((len(expert_PK), E)), np.zeros((len(expert_PK), E)))


def dispatched(twin: Twin, spec, expert_PK=EXPERT_PK, weight_PK=WEIGHT_PK, num_experts=E) -> Dispatch:
    routing = twin.module("routing").Routing(*(twin.array(value) for value in routing_of(expert_PK, weight_PK)))
    result = twin.module("dispatch").dispatch(spec, routing, num_experts)
    return Dispatch(*(twin.numpy(value) for value in result))


@pytest.mark.parametrize("kind", SPECS)
def test_every_field_matches_the_reference(twin, kind):
    actual = dispatched(twin, SPECS[kind])
    expected = dispatch(SPECS[kind], routing_of(EXPERT_PK, WEIGHT_PK), E)
    for field in ("token_R", "expert_R", "size_E"):
        np.testing.assert_array_equal(getattr(actual, field), getattr(expected, field), err_msg=field)
    assert_close(actual.weight_R, expected.weight_R, FLOAT32)


@pytest.mark.parametrize("kind", SPECS)
def test_gradient_of_the_weights_matches_the_reference(twin, kind):
    expert_PK, score_PE = twin.array(EXPERT_PK), twin.array(np.zeros((P, E)))

    def weights(weight_PK):
        routing = twin.module("routing").Routing(expert_PK, weight_PK, score_PE, score_PE)
        return twin.module("dispatch").dispatch(SPECS[kind], routing, E).weight_R

    assert_function_matches(
        twin,
        weights,
        lambda weight_PK: dispatch(SPECS[kind], routing_of(EXPERT_PK, weight_PK), E).weight_R,
        WEIGHT_PK,
    )


@pytest.mark.parametrize("kind", SPECS)
def test_each_chosen_pair_appears_once_sorted_by_expert_then_token(twin, kind):
    rows = dispatched(twin, SPECS[kind])
    pairs = list(zip(rows.expert_R.tolist(), rows.token_R.tolist(), strict=True))
    assert pairs == sorted((int(expert), p) for p in range(P) for expert in EXPERT_PK[p])
    np.testing.assert_array_equal(rows.size_E, [np.sum(expert == EXPERT_PK) for expert in range(E)])


def test_capacity_rounds_up():
    spec = CapacitySpec(factor=1.25)
    assert capacity(spec, num_tokens=16, top_k=2, num_experts=8) == 5
    assert capacity(spec, num_tokens=15, top_k=2, num_experts=7) == math.ceil(5.357)
    assert capacity(CapacitySpec(factor=0.01), num_tokens=1, top_k=1, num_experts=7) == 1


def test_capacity_takes_the_factor_as_it_is_written():
    """1.1 * 100 / 5 is 22; in float64 it is a little more, and would be rounded up to 23."""
    assert math.ceil(1.1 * 100 / 5) == 23
    assert capacity(CapacitySpec(factor=1.1), num_tokens=100, top_k=1, num_experts=5) == 22


@pytest.mark.parametrize("kind", SPECS)
def test_drops_are_counted_whatever_the_weights_are(twin, kind):
    """A score may underflow to weight 0; that token is served all the same."""
    reference = dispatch(SPECS[kind], routing_of(EXPERT_PK, np.zeros((P, K))), E)
    limit = {"dropless": R, "tight": math.ceil(0.5 * P * K / E), "loose": R}[kind]
    expected = sum(max(0, int(size) - limit) for size in reference.size_E)
    assert (expected > 0) == (kind == "tight")
    assert num_dropped(SPECS[kind], reference, P) == expected
    rows = twin.module("dispatch").Dispatch(*(twin.array(value) for value in reference))
    assert int(twin.numpy(twin.module("dispatch").num_dropped(SPECS[kind], rows, P))) == expected


def test_capacity_serves_the_earliest_tokens(twin):
    """All 15 tokens ask for expert 4: C = ceil(1.0 * 15 / 7) = 3 of them are served."""
    rows = dispatched(twin, CapacitySpec(factor=1.0), np.full((P, 1), 4), np.ones((P, 1)))
    np.testing.assert_array_equal(rows.token_R, np.arange(P))
    np.testing.assert_array_equal(rows.weight_R, [1.0] * 3 + [0.0] * (P - 3))
    np.testing.assert_array_equal(rows.size_E, [0, 0, 0, 0, P, 0, 0])


@pytest.mark.parametrize("factor", [0.3, 0.7, 1.0, 1.5])
def test_no_expert_serves_more_than_its_capacity(twin, factor):
    spec = CapacitySpec(factor=factor)
    rows = dispatched(twin, spec)
    served = np.bincount(rows.expert_R[rows.weight_R != 0], minlength=E)
    limit = math.ceil(factor * P * K / E)
    np.testing.assert_array_equal(served, np.minimum(rows.size_E, limit))


def test_indices_are_always_in_range(twin):
    """Trap: a gather past the end clamps on JAX and is not checked on MLX."""
    rows = dispatched(twin, CapacitySpec(factor=0.01), np.full((P, 1), E - 1), np.ones((P, 1)))
    assert rows.token_R.min() >= 0
    assert rows.token_R.max() < P
    assert rows.expert_R.max() < E


def test_expert_counts_match_the_reference(twin):
    counts = twin.module("dispatch").expert_counts(twin.array(EXPERT_PK), E)
    np.testing.assert_array_equal(twin.numpy(counts), expert_counts(EXPERT_PK, E))
    assert int(twin.numpy(counts).sum()) == P * K


@pytest.mark.parametrize("kind", SPECS)
def test_combine_is_the_weighted_sum_written_out(twin, kind):
    reference = dispatch(SPECS[kind], routing_of(EXPERT_PK, WEIGHT_PK), E)
    expected = np.zeros((P, D))
    for r in range(R):
        expected[reference.token_R[r]] += reference.weight_R[r] * Y_RD[r]
    assert_close(combine(reference, Y_RD, P), expected, FLOAT64)
    rows = twin.module("dispatch").Dispatch(*(twin.array(value) for value in reference))
    out = twin.module("dispatch").combine(rows, twin.array(Y_RD), P)
    assert_close(twin.numpy(out), expected, FLOAT32)


def test_gradients_of_combine_match_the_reference(twin):
    reference = dispatch(SPECS["tight"], routing_of(EXPERT_PK, WEIGHT_PK), E)
    token_R, expert_R, size_E = (twin.array(v) for v in (reference.token_R, reference.expert_R, reference.size_E))

    def on_device(weight_R, y_RD):
        rows = twin.module("dispatch").Dispatch(token_R, expert_R, weight_R, size_E)
        return twin.module("dispatch").combine(rows, y_RD, P)

    assert_function_matches(
        twin,
        on_device,
        lambda weight_R, y_RD: combine(reference._replace(weight_R=weight_R), y_RD, P),
        reference.weight_R,
        Y_RD,
    )


def test_combine_adds_bfloat16_rows_in_float32(twin):
    """256 rows of 1 with weight 1 for one token: bfloat16 would stop at 256 and lose each 1/2 that follows."""
    values = np.concatenate([np.ones(256), np.full(256, 0.5)])[:, None]
    rows = twin.module("dispatch").Dispatch(
        twin.array(np.zeros(512, int)), twin.array(np.zeros(512, int)), twin.array(np.ones(512)), twin.array([512])
    )
    out = twin.module("dispatch").combine(rows, twin.array(values, "bfloat16"), 1)
    assert "bfloat16" in str(out.dtype)
    assert twin.numpy(out).item() == 384


def test_combine_of_bfloat16_is_near_float32(twin):
    reference = dispatch(SPECS["dropless"], routing_of(EXPERT_PK, WEIGHT_PK), E)
    rows = twin.module("dispatch").Dispatch(*(twin.array(value) for value in reference))
    out = twin.module("dispatch").combine(rows, twin.array(Y_RD, "bfloat16"), P)
    assert_close(twin.numpy(out), combine(reference, Y_RD, P), BFLOAT16)


def test_reference_gradient_agrees_with_finite_differences():
    def out(weight_PK, y_RD):
        return combine(dispatch(SPECS["tight"], routing_of(EXPERT_PK, weight_PK), E), y_RD, P)

    assert_reference_gradient(out, WEIGHT_PK, Y_RD)


def test_capacity_factor_of_zero_is_refused():
    raw = {
        "num_experts": E,
        "router": {"top_k": K},
        "experts": {"hidden_dim": 28},
        "dispatch": {"kind": "capacity", "factor": 0},
    }
    with pytest.raises(SpecError, match=r"dispatch.factor is 0; input should be greater than 0 \(config\)"):
        validate(MoESpec, raw, "config")
