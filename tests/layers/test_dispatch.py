import math
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.layer_routing import combine_weights
from moezoo.core.parameters.capacity import capacities, mostly_unused, num_groups, num_rows
from moezoo.core.reference.dispatch import (
    Dispatch,
    combine,
    dispatch,
    num_dropped,
)
from moezoo.core.reference.losses import expert_counts
from moezoo.core.reference.routing import Routing
from moezoo.core.spec import (
    CapacitySpec,
    ExpertChoiceSpec,
    GatedFeedForwardSpec,
    MoESpec,
    RouterSpec,
    TopKChoiceSpec,
    TopPChoiceSpec,
    ZeroComputationSpec,
)
from tests.support.tolerances import BFLOAT16, FLOAT32, FLOAT64, assert_close
from tests.support.twins import B, D, E, F, K, P, Twin, assert_function_matches, assert_reference_gradient, normal

ZERO = ZeroComputationSpec(num_zero=1, num_copy=1, num_constant=1, ffn_share=0.5)
EXPERT_CHOICE = RouterSpec(top_k=K, choice=ExpertChoiceSpec(), renormalize="none")


def moe_of(dispatch=None, zero=None, router=None) -> MoESpec:
    options = {} if dispatch is None else {"dispatch": dispatch}
    router = RouterSpec(top_k=K) if router is None else router
    return MoESpec(
        num_experts=E, router=router, experts=GatedFeedForwardSpec(hidden_dim=F), zero_computation=zero, **options
    )


def routing_of(expert_PK, weight_PK, num_choices=E, valid_PK=None) -> Routing:
    """Return a routing with unused scores; a slot with weight 0 may still be valid."""
    expert_PK = np.asarray(expert_PK)
    valid_PK = np.ones(expert_PK.shape, bool) if valid_PK is None else valid_PK
    score_PE = np.zeros((len(expert_PK), num_choices))
    margin_P = np.full(len(expert_PK), np.inf)
    return Routing(expert_PK, valid_PK, weight_PK, score_PE, score_PE, score_PE, None, None, None, None, None, margin_P)


def drawn(num_choices=E, slots=K, share_used=1.0) -> Routing:
    """Return a routing with different experts per token and different weights; unused slots have weight 0."""
    generator = np.random.default_rng(0)
    expert_PK = generator.permuted(np.tile(np.arange(num_choices), (P, 1)), axis=1)[:, :slots]
    valid_PK = generator.random((P, slots)) < share_used
    weight_PK = np.where(valid_PK, np.abs(normal(1, P, slots)) + 0.1, 0.0)
    return routing_of(expert_PK, weight_PK, num_choices, valid_PK)


def each_expert_takes(count: int) -> Routing:
    """Return an expert-choice routing in training: E slots per token, `count` tokens per expert."""
    generator = np.random.default_rng(0)
    valid_PK = np.stack([generator.permutation(P) < count for _ in range(E)], axis=1)
    weight_PK = np.where(valid_PK, np.abs(normal(1, P, E)) + 0.1, 0.0)
    return routing_of(np.tile(np.arange(E), (P, 1)), weight_PK, E, valid_PK)


CASES: dict[str, tuple[MoESpec, Routing]] = {
    "dropless": (moe_of(), drawn()),
    "tight": (moe_of(CapacitySpec(factor=0.5)), drawn()),
    "loose": (moe_of(CapacitySpec(factor=10.0)), drawn()),
    "by score": (moe_of(CapacitySpec(factor=0.5, priority="score")), drawn()),
    "tight, of sequences": (moe_of(CapacitySpec(factor=0.5, group="sequence")), drawn()),
    "tight, of sequences, by score": (moe_of(CapacitySpec(factor=0.5, priority="score", group="sequence")), drawn()),
    "unused slots": (moe_of(router=RouterSpec(top_k=K, choice=TopPChoiceSpec(p=0.5))), drawn(share_used=0.6)),
    "unused slots, tight": (
        moe_of(CapacitySpec(factor=0.4, priority="score"), router=RouterSpec(top_k=K, choice=TopPChoiceSpec(p=0.5))),
        drawn(share_used=0.6),
    ),
    "without computation": (moe_of(zero=ZERO), drawn(E + 3)),
    "without computation, tight": (moe_of(CapacitySpec(factor=0.6), zero=ZERO), drawn(E + 3)),
    "without computation, tight, of sequences": (
        moe_of(CapacitySpec(factor=0.6, group="sequence"), zero=ZERO),
        drawn(E + 3, share_used=0.8),
    ),
    "expert choice": (moe_of(router=EXPERT_CHOICE), each_expert_takes(math.ceil(P * K / E))),
}


def on_device(twin: Twin, routing: Routing):
    own = twin.module("routing").Routing
    return own(*(None if value is None else twin.array(value) for value in routing[: len(own._fields)]))


@cache
def compiled_dispatch(twin: Twin, spec: MoESpec, *options: tuple[str, int | bool]) -> Callable[..., Dispatch]:
    return twin.compiled_function(partial(twin.module("dispatch").dispatch, spec, **dict(options)))


def dispatched(twin: Twin, spec: MoESpec, routing: Routing, **options) -> Dispatch:
    function = compiled_dispatch(twin, spec, *options.items())
    result = function(on_device(twin, routing))
    return Dispatch(*(twin.numpy(value) for value in result))._replace(kept_PK=np.array(result.kept_PK))


def reference_on_device(twin: Twin, rows: Dispatch):
    return twin.module("dispatch").Dispatch(*(twin.array(value) for value in rows))


def assert_well_formed(rows: Dispatch, spec: MoESpec, routing: Routing) -> None:
    """Check invariants: each kept slot of a feed-forward expert is one used row; no index is out of range."""
    used = int(rows.size_E.sum())
    token_R, expert_R, weight_R = rows.token_R[:used], rows.expert_R[:used], rows.weight_R[:used]
    np.testing.assert_array_equal(rows.size_E, np.bincount(expert_R, minlength=spec.num_experts))
    pairs = list(zip(expert_R.tolist(), token_R.tolist(), strict=True))
    slots = np.argwhere(rows.kept_PK & (routing.expert_PK < spec.num_experts))
    assert pairs == sorted((int(routing.expert_PK[p, k]), int(p)) for p, k in slots)
    assert np.all(routing.valid_PK[rows.kept_PK])
    weights = {(int(routing.expert_PK[p, k]), int(p)): routing.weight_PK[p, k] for p, k in slots}
    assert_close(weight_R, [weights[pair] for pair in pairs], FLOAT32)
    np.testing.assert_array_equal(rows.weight_R[used:], 0)
    if len(rows.token_R):
        assert 0 <= rows.token_R.min() <= rows.token_R.max() < len(routing.expert_PK)
        assert 0 <= rows.expert_R.min() <= rows.expert_R.max() < spec.num_experts


@pytest.mark.parametrize("kind", CASES)
def test_used_rows_and_kept_slots_match_the_reference(twin, kind):
    spec, routing = CASES[kind]
    expected = dispatch(spec, routing, num_sequences=B)
    actual = dispatched(twin, spec, routing, num_sequences=B)
    assert_well_formed(expected, spec, routing)
    assert_well_formed(actual, spec, routing)
    np.testing.assert_array_equal(actual.size_E, expected.size_E)
    np.testing.assert_array_equal(actual.kept_PK, expected.kept_PK)
    used = int(expected.size_E.sum())
    for field in ("token_R", "expert_R"):
        np.testing.assert_array_equal(getattr(actual, field)[:used], getattr(expected, field)[:used], err_msg=field)


@pytest.mark.parametrize("kind", CASES)
def test_gradient_of_combining_by_the_weights_matches_the_reference(twin, kind):
    spec, routing = CASES[kind]
    held = on_device(twin, routing)
    y_D = twin.array(normal(2, D))

    def out(weight_PK):
        rows = twin.module("dispatch").dispatch(spec, held._replace(weight_PK=weight_PK), num_sequences=B)
        return twin.module("dispatch").combine(rows, rows.expert_R[:, None] * y_D, P)

    def expected(weight_PK):
        rows = dispatch(spec, routing._replace(weight_PK=weight_PK), num_sequences=B)
        return combine(rows, rows.expert_R[:, None] * normal(2, D), P)

    assert_function_matches(twin, out, expected, routing.weight_PK)


@st.composite
def mixtures(draw, few_shapes: bool = False) -> tuple[MoESpec, Routing, int]:
    """Draw a small MoE layer with any dispatch, any valid routing of its router, and a number of sequences."""
    num_experts, length = (4, 3) if few_shapes else (draw(st.integers(1, 6)), draw(st.integers(1, 4)))
    num_sequences = 2 if few_shapes else draw(st.integers(1, 3))
    tokens = num_sequences * length
    num_zero = draw(st.sampled_from([0, 2]) if few_shapes else st.integers(0, 3))
    top_k = 2 if few_shapes else draw(st.integers(1, num_experts + num_zero))
    factor = st.just(0.5) if few_shapes else st.floats(0.01, 4.0)
    priority, group = st.sampled_from(["position", "score"]), st.sampled_from(["batch", "sequence"])
    capacity = st.builds(CapacitySpec, factor=factor, priority=priority, group=group)
    options = draw(st.fixed_dictionaries({}, optional={"dispatch": capacity}))
    share = 0.75 if few_shapes else draw(st.floats(0.1, 1.0))
    zero = ZeroComputationSpec(num_copy=num_zero, ffn_share=share) if num_zero else None
    num_choices = num_experts + num_zero
    spec = MoESpec(
        num_experts=num_experts,
        router=RouterSpec(top_k=top_k, choice=TopPChoiceSpec(p=0.5) if top_k > 1 else TopKChoiceSpec()),
        experts=GatedFeedForwardSpec(hidden_dim=4),
        zero_computation=zero,
        **options,
    )
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # Tokens may choose the same expert, as with a router that is not balanced.
    liking_E = generator.gumbel(size=num_choices) * draw(st.sampled_from([0.0, 1.0, 10.0]))
    expert_PK = np.argsort(liking_E + generator.gumbel(size=(tokens, num_choices)), axis=-1)[:, :top_k]
    valid_PK = generator.random((tokens, top_k)) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    weight_PK = np.where(valid_PK, generator.random((tokens, top_k)).astype(np.float32), 0.0).astype(np.float64)
    return spec, routing_of(expert_PK, weight_PK, num_choices, valid_PK), num_sequences


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(mixtures())
def test_no_expert_exceeds_its_capacity_or_drops_below_it(case):
    spec, routing, num_sequences = case
    tokens, groups = len(routing.expert_PK), num_groups(spec, num_sequences)
    rows = dispatch(spec, routing, num_sequences=num_sequences)
    assert_well_formed(rows, spec, routing)
    assert len(rows.token_R) == num_rows(spec, tokens, num_sequences=num_sequences)
    most, kept = capacities(spec, tokens // groups), 0
    for group in np.split(np.arange(tokens), groups):
        asked = routing.expert_PK[group][routing.valid_PK[group]]
        kept_E = np.bincount(routing.expert_PK[group][rows.kept_PK[group]], minlength=spec.num_choices)
        np.testing.assert_array_equal(kept_E, np.minimum(np.bincount(asked, minlength=spec.num_choices), most))
        kept += kept_E.sum()
    assert num_dropped(routing, rows) == expert_counts(routing).sum() - kept


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(mixtures())
def test_permuting_experts_changes_nothing_for_any_token(case):
    """Among feed-forward experts; zero-computation experts keep their kind."""
    spec, routing, num_sequences = case
    order = np.random.default_rng(0).permutation(spec.num_experts)
    order = np.concatenate([order, np.arange(spec.num_experts, spec.num_choices)])
    permuted = dispatch(spec, routing._replace(expert_PK=order[routing.expert_PK]), num_sequences=num_sequences)
    rows = dispatch(spec, routing, num_sequences=num_sequences)
    np.testing.assert_array_equal(permuted.kept_PK, rows.kept_PK)
    np.testing.assert_array_equal(permuted.size_E[order[: spec.num_experts]], rows.size_E)
    value_E = np.random.default_rng(1).random(spec.num_choices)
    y_RD, permuted_RD = value_E[rows.expert_R], value_E[np.argsort(order)][permuted.expert_R]
    tokens = len(routing.expert_PK)
    assert_close(combine(permuted, permuted_RD[:, None], tokens), combine(rows, y_RD[:, None], tokens), FLOAT64)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(mixtures())
def test_a_token_whose_assignments_are_all_dropped_gets_exactly_zero(case):
    spec, routing, num_sequences = case
    rows, tokens = dispatch(spec, routing, num_sequences=num_sequences), len(routing.expert_PK)
    out_PD = combine(rows, 1 + np.random.default_rng(0).random((len(rows.token_R), 3)), tokens)
    served_P = np.any(rows.kept_PK & (routing.expert_PK < spec.num_experts) & (routing.weight_PK > 0), axis=-1)
    np.testing.assert_array_equal(np.any(out_PD != 0, axis=-1), served_P)


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(case=mixtures(few_shapes=True))
def test_any_moe_layer_is_dispatched_as_in_the_reference(twin, case):
    spec, routing, num_sequences = case
    expected = dispatch(spec, routing, num_sequences=num_sequences)
    actual = dispatched(twin, spec, routing, num_sequences=num_sequences)
    assert_well_formed(actual, spec, routing)
    np.testing.assert_array_equal(actual.kept_PK, expected.kept_PK)


def test_capacity_rounds_up():
    spec = moe_of(CapacitySpec(factor=1.25))
    assert capacities(spec, 15) == [math.ceil(1.25 * 15 * K / E)] * E == [6] * E
    assert capacities(moe_of(CapacitySpec(factor=0.01)), 1) == [1] * E
    assert capacities(moe_of(CapacitySpec(factor=100.0)), 15) == [15] * E  # a token chooses an expert once


def test_capacity_uses_the_exact_decimal_factor():
    """1.1 * 100 / 5 is 22; in float64 it is slightly more, and would be rounded up to 23."""
    assert math.ceil(1.1 * 100 / 5) == 23
    spec = moe_of(CapacitySpec(factor=1.1)).model_copy(update={"num_experts": 5, "router": RouterSpec(top_k=1)})
    assert capacities(spec, 100) == [22] * 5


def test_zero_computation_experts_have_capacities_larger_by_their_share():
    """tau = 1/2, E = 7, Z = 3: u = 2 * 65 / 6.5 = 20 per zero-computation expert, 10 per other expert; 130 in all."""
    spec = moe_of(CapacitySpec(factor=1.0), zero=ZERO)
    assert capacities(spec, 65) == [10] * E + [20] * 3
    assert sum(capacities(spec, 65)) == 65 * K
    equal = spec.model_copy(update={"zero_computation": ZERO.model_copy(update={"ffn_share": 1.0})})
    assert capacities(equal, 65) == [13] * (E + 3)
    assert num_rows(spec, 65) == 10 * E


def test_rows_are_bounded_by_the_capacities():
    tokens = 35
    assert num_rows(moe_of(), tokens) == tokens * K
    assert num_rows(moe_of(CapacitySpec(factor=0.5)), tokens) == tokens * K // 2
    assert num_rows(moe_of(CapacitySpec(factor=0.5)), tokens, inference=True) == tokens * K
    assert num_rows(moe_of(CapacitySpec(factor=3.0)), tokens) == tokens * K
    by_sequence = moe_of(CapacitySpec(factor=0.5, group="sequence"))
    assert num_rows(by_sequence, tokens, num_sequences=5) == 5 * E * 1  # ceil(0.5 * 7 * K / E) of 7 tokens
    assert num_rows(by_sequence, tokens, num_sequences=5, inference=True) == tokens * K
    assert num_rows(moe_of(router=EXPERT_CHOICE), tokens) == E * tokens * K // E
    assert num_rows(moe_of(router=EXPERT_CHOICE), tokens, inference=True) == tokens * E


def test_unused_rows_are_expected_for_variable_slots_and_zero_computation_experts():
    assert not mostly_unused(moe_of())
    assert not mostly_unused(moe_of(CapacitySpec(factor=0.5), zero=ZERO))
    assert mostly_unused(moe_of(CapacitySpec(factor=0.5), zero=ZERO), inference=True)
    assert mostly_unused(moe_of(zero=ZERO))
    assert mostly_unused(moe_of(router=RouterSpec(top_k=K, choice=TopPChoiceSpec(p=0.5))))
    assert not mostly_unused(moe_of(router=EXPERT_CHOICE))
    assert mostly_unused(moe_of(router=EXPERT_CHOICE), inference=True)


def test_capacity_keeps_the_earliest_tokens(twin):
    """All 15 tokens choose expert 4: C = ceil(1.4 * 15 / 7) = 3 of them are kept, and no other row is computed."""
    spec = moe_of(CapacitySpec(factor=1.4), router=RouterSpec(top_k=1))
    rows = dispatched(twin, spec, routing_of(np.full((P, 1), 4), np.ones((P, 1))))
    np.testing.assert_array_equal(rows.size_E, [0, 0, 0, 0, 3, 0, 0])
    np.testing.assert_array_equal(rows.token_R[:3], [0, 1, 2])
    np.testing.assert_array_equal(rows.kept_PK[:, 0], [True] * 3 + [False] * (P - 3))


def test_capacity_by_score_keeps_the_highest_weights_and_earlier_tokens_on_ties(twin):
    spec = moe_of(CapacitySpec(factor=1.4, priority="score"), router=RouterSpec(top_k=1))
    weight_PK = np.full((P, 1), 0.25)
    weight_PK[[11, 3]] = [[0.5], [0.75]]
    rows = dispatched(twin, spec, routing_of(np.full((P, 1), 4), weight_PK))
    np.testing.assert_array_equal(np.flatnonzero(rows.kept_PK), [0, 3, 11])
    np.testing.assert_array_equal(rows.token_R[:3], [0, 3, 11])
    np.testing.assert_array_equal(rows.weight_R[:3], [0.25, 0.75, 0.5])


@pytest.mark.parametrize("priority", ["position", "score"])
def test_capacity_of_a_sequence_does_not_depend_on_the_batch(twin, priority):
    """Each of the B sequences alone keeps the assignments that it keeps in the batch."""
    _, routing = CASES["by score"]
    of_sequence = moe_of(CapacitySpec(factor=0.5, priority=priority, group="sequence"))
    of_batch = moe_of(CapacitySpec(factor=0.5, priority=priority))
    rows = dispatched(twin, of_sequence, routing, num_sequences=B)
    alone = [
        dispatched(twin, of_batch, routing_of(routing.expert_PK[part], routing.weight_PK[part])).kept_PK
        for part in np.split(np.arange(P), B)
    ]
    np.testing.assert_array_equal(rows.kept_PK, np.concatenate(alone))
    assert np.any(rows.kept_PK != dispatched(twin, of_batch, routing, num_sequences=B).kept_PK)


@pytest.mark.parametrize("kind", ["without computation, tight", "without computation, tight, of sequences"])
def test_inference_drops_nothing(twin, kind):
    spec, routing = CASES[kind]
    routing = routing._replace(valid_PK=np.ones_like(routing.valid_PK))
    assert num_dropped(routing, dispatch(spec, routing, num_sequences=B)) > 0
    rows = dispatched(twin, spec, routing, num_sequences=B, inference=True)
    assert rows.kept_PK.all()
    assert_well_formed(rows, spec, routing)


@pytest.mark.parametrize("kind", CASES)
def test_drops_are_counted_for_any_weights(twin, kind):
    """A score may underflow to weight 0; that token is kept all the same."""
    spec, routing = CASES[kind]
    routing = routing._replace(weight_PK=np.zeros(routing.weight_PK.shape))
    rows, groups, expected = dispatch(spec, routing, num_sequences=B), num_groups(spec, B), 0
    for group in np.split(np.arange(P), groups):
        part = routing._replace(expert_PK=routing.expert_PK[group], valid_PK=routing.valid_PK[group])
        expected += int(np.maximum(expert_counts(part) - capacities(spec, P // groups), 0).sum())
    assert (expected > 0) == ("tight" in kind or kind == "by score")
    assert num_dropped(routing, rows) == expected
    counted = twin.module("dispatch").num_dropped(on_device(twin, routing), reference_on_device(twin, rows))
    assert int(twin.numpy(counted)) == expected


@pytest.mark.parametrize("kind", ["unused slots", "without computation"])
def test_expert_counts_include_all_valid_slots(twin, kind):
    _, routing = CASES[kind]
    counts = twin.numpy(twin.module("dispatch").expert_counts(on_device(twin, routing)))
    np.testing.assert_array_equal(counts, expert_counts(routing))
    assert counts.sum() == routing.valid_PK.sum()
    assert len(counts) == routing.score_PE.shape[-1]


@pytest.mark.parametrize("kind", ["tight", "unused slots"])
def test_combine_is_the_weighted_sum_written_out(twin, kind):
    spec, routing = CASES[kind]
    rows = dispatch(spec, routing)
    y_RD, expected = normal(2, len(rows.token_R), D), np.zeros((P, D))
    for r in range(int(rows.size_E.sum())):
        expected[rows.token_R[r]] += rows.weight_R[r] * y_RD[r]
    assert_close(combine(rows, y_RD, P), expected, FLOAT64)
    out = twin.module("dispatch").combine(reference_on_device(twin, rows), twin.array(y_RD), P)
    assert_close(twin.numpy(out), expected, FLOAT32)


def test_gradients_of_combine_match_the_reference(twin):
    reference = dispatch(*CASES["dropless"])
    rows = reference_on_device(twin, reference)
    assert_function_matches(
        twin,
        lambda weight_R, y_RD: twin.module("dispatch").combine(rows._replace(weight_R=weight_R), y_RD, P),
        lambda weight_R, y_RD: combine(reference._replace(weight_R=weight_R), y_RD, P),
        reference.weight_R,
        normal(2, len(reference.weight_R), D),
    )


def test_combine_adds_bfloat16_rows_in_float32(twin):
    """256 rows of 1 with weight 1 for one token: bfloat16 would stop at 256 and lose each 1/2 that follows."""
    values = np.concatenate([np.ones(256), np.full(256, 0.5)])[:, None]
    zeros = np.zeros(512, int)
    rows = reference_on_device(twin, Dispatch(zeros, zeros, np.ones(512), np.array([512]), np.ones((1, 512), bool)))
    out = twin.module("dispatch").combine(rows, twin.array(values, "bfloat16"), 1)
    assert "bfloat16" in str(out.dtype)
    assert twin.numpy(out).item() == 384


def test_combine_of_bfloat16_is_near_float32(twin):
    reference = dispatch(*CASES["dropless"])
    y_RD = normal(2, P * K, D)
    out = twin.module("dispatch").combine(reference_on_device(twin, reference), twin.array(y_RD, "bfloat16"), P)
    assert_close(twin.numpy(out), combine(reference, y_RD, P), BFLOAT16)


@pytest.mark.parametrize("kind", ["tight", "by score", "tight, of sequences", "without computation, tight"])
def test_reference_gradient_agrees_with_finite_differences(kind):
    spec, routing = CASES[kind]

    def out(weight_PK, y_RD):
        return combine(dispatch(spec, routing._replace(weight_PK=weight_PK), num_sequences=B), y_RD, P)

    assert_reference_gradient(out, routing.weight_PK, normal(2, num_rows(spec, P, num_sequences=B), D))


def test_layer_routing_sorts_by_weight_then_id_and_puts_unused_slots_last():
    expert_PK, valid_PK = np.array([[6, 2, 4, 1]]), np.array([[True, True, True, False]])
    kept_PK, weight_PK = np.array([[False, True, True, False]]), np.array([[0.5, 0.25, 0.375, 0.0]])
    expert, weight = combine_weights(expert_PK, valid_PK, kept_PK, weight_PK)
    np.testing.assert_array_equal(expert, [[4, 2, 6, -1]])
    np.testing.assert_array_equal(weight, [[0.375, 0.25, 0.0, 0.0]])
    tied = combine_weights(expert_PK, valid_PK, valid_PK, np.array([[0.25, 0.25, 0.25, 0.0]]))
    np.testing.assert_array_equal(tied[0], [[2, 4, 6, -1]])


def test_capacity_factor_of_zero_is_refused():
    raw = {
        "num_experts": E,
        "router": {"top_k": K},
        "experts": {"hidden_dim": 28},
        "dispatch": {"kind": "capacity", "factor": 0},
    }
    with pytest.raises(SpecError, match=r"dispatch.factor is 0; input should be greater than 0 \(config\)"):
        validate(MoESpec, raw, "config")
