import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import given as drawn
from hypothesis import strategies as st

from moezoo.core import random
from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.choice import Choice, RoutingContext, choose, noisy
from moezoo.core.spec import (
    ExpertChoiceSpec,
    GroupedTopKChoiceSpec,
    HashChoiceSpec,
    MoESpec,
    NoisyTopKChoiceSpec,
    RouterSpec,
    SelectionBiasSpec,
    SparseMixerChoiceSpec,
    TopPChoiceSpec,
)
from moezoo.core.tokens import NOT_REPLAYED
from tests.support.backends_available import require_backend
from tests.support.tolerances import EXACT, FLOAT32, FLOAT64, assert_close
from tests.support.twins import F, K, P, Twin, assert_function_matches, assert_reference_gradient, normal

E = 8  # not the 7 of other tests: groups divide it
LOGITS_PE = normal(0, P, E)
KEY = random.fold_in(random.key(3), 17, 2)
TABLE_PK = np.stack([np.random.default_rng(p).permutation(E)[:K] for p in range(P)])
CUTOFF_E = np.linspace(0.02, 0.3, E).astype(np.float32).astype(np.float64)


def router(choice=None, **fields) -> RouterSpec:
    fields = {"top_k": K, "renormalize": "none"} | fields
    return RouterSpec(**fields) if choice is None else RouterSpec(choice=choice, **fields)


SPECS = {
    "top_k": router(),
    "one": router(top_k=1),
    "all": router(top_k=E),
    "noisy_top_k": router(NoisyTopKChoiceSpec()),
    "grouped max": router(GroupedTopKChoiceSpec(num_groups=4, keep=2)),
    "grouped top2": router(GroupedTopKChoiceSpec(num_groups=2, keep=1, group_value="top2"), top_k=3),
    "top_p": router(TopPChoiceSpec(p=0.6), top_k=5),
    "top_p of two": router(TopPChoiceSpec(p=0.6), top_k=2),
    "hash": router(HashChoiceSpec()),
    "sparsemixer": router(SparseMixerChoiceSpec(jitter=0.4)),
    "sparsemixer of one": router(SparseMixerChoiceSpec(jitter=0.4), top_k=1),
    "expert_choice": router(ExpertChoiceSpec()),
    "expert_choice of all": router(ExpertChoiceSpec(), top_k=E),
    "expert_choice by sigmoid": router(ExpertChoiceSpec(), score="sigmoid"),
    "biased": router(score="sigmoid", selection_bias=SelectionBiasSpec()),
}
WITH_OWN_WEIGHTS = ["sparsemixer", "sparsemixer of one"]
INTEGERS = ("expert_PK", "valid_PK")


def softmax(logits_PE):
    unnormalized = np.exp(logits_PE - logits_PE.max(axis=-1, keepdims=True))
    return unnormalized / unnormalized.sum(axis=-1, keepdims=True)


def values(spec: RouterSpec, logits_PE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, scores and selection values as a router would make them."""
    score_PE = 1 / (1 + np.exp(-logits_PE)) if spec.score == "sigmoid" else softmax(logits_PE)
    score_PE = score_PE.astype(np.float32).astype(np.float64)
    selection_PE = logits_PE if spec.selection_basis == "logits" else score_PE
    if spec.selection_bias is not None:
        selection_PE = selection_PE + normal(5, E)
    return logits_PE, score_PE, selection_PE


def arguments(spec: RouterSpec, inference=False, noise=False, forced_PK=None) -> dict:
    given = {"inference": inference}
    if isinstance(spec.choice, HashChoiceSpec):
        given["table_PK"] = TABLE_PK
    if isinstance(spec.choice, ExpertChoiceSpec) and inference:
        given["cutoff_E"] = CUTOFF_E
    if noise:
        given["key"] = KEY
    if forced_PK is not None:
        given["forced_PK"] = forced_PK
    return given


def on_device(twin: Twin, arrays: dict) -> dict:
    namespace = twin._namespace()
    return {
        name: namespace.array(value, dtype=namespace.uint32) if name == "key" else twin.array(value)
        for name, value in arrays.items()
    }


def split(context_of, given: dict) -> tuple[Any, dict]:
    """The routing context among arguments of a choice, and the others."""
    context = {name: given[name] for name in ("forced_PK", "key", "inference") if name in given}
    return context_of(**context), {name: value for name, value in given.items() if name not in context}


def twins_choose(twin: Twin, spec: RouterSpec, *values, **given):
    context, arrays = split(twin.module("choice").RoutingContext, given)
    return twin.module("choice").choose(spec, *values, context, **arrays)


def references_choose(spec: RouterSpec, *values, **given) -> Choice:
    context, arrays = split(RoutingContext, given)
    return choose(spec, *values, context, **arrays)


def chosen(twin: Twin, spec: RouterSpec, logits_PE=LOGITS_PE, *, inference=False, **arrays) -> Choice:
    """What a backend chooses, in NumPy; compiled where that is how it is used."""

    def call(values, arrays):
        return twins_choose(twin, spec, *values, **arrays, inference=inference)

    if twin.name == "jax":
        import jax

        call = jax.jit(call)
    made = call([twin.array(value) for value in values(spec, logits_PE)], on_device(twin, arrays))
    made = [None if value is None else twin.numpy(value) for value in made]
    return Choice(made[0], made[1].astype(bool), *made[2:], margin_P=None)


def reference(spec: RouterSpec, logits_PE=LOGITS_PE, **given) -> Choice:
    return references_choose(spec, *values(spec, logits_PE), **given)


def assert_same(actual: Choice, expected: Choice) -> None:
    for name in INTEGERS:
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name), err_msg=name)
    for name, tolerance in (("weight_PK", FLOAT32), ("cutoff_E", EXACT)):
        one, other = getattr(actual, name), getattr(expected, name)
        assert (one is None) == (other is None)
        if other is not None:
            assert_close(one, other, tolerance, name)


# --- the twins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPECS)
def test_choice_matches_the_reference_in_training_and_at_inference(twin, kind):
    spec = SPECS[kind]
    for given in (arguments(spec, noise=True), arguments(spec, inference=True, noise=True)):
        expected = reference(spec, **given)
        assert expected.expert_PK.shape == expected.valid_PK.shape == (P, slots(spec))
        assert np.min(expected.margin_P) > 1e-5
        assert_same(chosen(twin, spec, **given), expected)


@pytest.mark.parametrize("kind", SPECS)
def test_forced_experts_are_taken_and_a_slot_of_minus_one_is_unused(twin, kind):
    spec = SPECS[kind]
    forced_PK = np.random.default_rng(3).permuted(np.tile(np.arange(E), (P, 1)), axis=1)[:, : slots(spec)]
    forced_PK[::2, -1] = -1
    given = arguments(spec, noise=True, forced_PK=forced_PK)
    actual, expected = chosen(twin, spec, **given), reference(spec, **given)
    assert_same(actual, expected)
    np.testing.assert_array_equal(actual.expert_PK, np.maximum(forced_PK, 0))
    np.testing.assert_array_equal(actual.valid_PK, forced_PK >= 0)
    if isinstance(spec.choice, ExpertChoiceSpec):
        np.testing.assert_array_equal(expected.cutoff_E, reference(spec).cutoff_E)


@pytest.mark.parametrize("kind", ["top_k", "grouped max", "top_p", "hash", "sparsemixer", "expert_choice"])
def test_tokens_that_are_not_replayed_choose_freely_beside_forced_ones(twin, kind):
    spec, free_P = SPECS[kind], np.arange(P) % 3 == 1
    forced_PK = np.where(free_P[:, None], NOT_REPLAYED, np.tile(np.arange(E)[: slots(spec)], (P, 1)))
    given = arguments(spec, noise=True)
    actual, alone = chosen(twin, spec, **given, forced_PK=forced_PK), reference(spec, **given)
    assert_same(actual, reference(spec, **given, forced_PK=forced_PK))
    for name in INTEGERS:
        np.testing.assert_array_equal(getattr(actual, name)[free_P], getattr(alone, name)[free_P], err_msg=name)
    np.testing.assert_array_equal(actual.expert_PK[~free_P], forced_PK[~free_P])


@pytest.mark.parametrize("kind", ["grouped max", "grouped top2"])
def test_a_group_is_ranked_by_the_experts_that_are_left_in_it(twin, kind):
    spec = SPECS[kind]
    logits_PE, score_PE, selection_PE = values(spec, LOGITS_PE)
    size = E // spec.choice.num_groups
    left = selection_PE.copy()
    left[:, 1:size] = -np.inf  # of the first group one expert is left, and it is the best of all
    left[:, 0] = 2 * selection_PE.max()
    left[::2, -size:] = -np.inf
    given = [twin.array(each) for each in (logits_PE, score_PE, left)]
    made = twins_choose(twin, spec, *given)
    expected = references_choose(spec, logits_PE, score_PE, left)
    np.testing.assert_array_equal(twin.numpy(made.expert_PK)[expected.valid_PK], expected.expert_PK[expected.valid_PK])
    np.testing.assert_array_equal(twin.numpy(made.valid_PK), expected.valid_PK)
    np.testing.assert_array_equal(expected.expert_PK[:, 0], 0)
    assert np.all(expected.expert_PK[::2][expected.valid_PK[::2]] < E - size)


def slots(spec: RouterSpec) -> int:
    return MoESpec(num_experts=E, router=spec, experts={"hidden_dim": F}).num_slots


@pytest.mark.parametrize("kind", WITH_OWN_WEIGHTS)
@pytest.mark.parametrize("noise", [False, True])
def test_gradients_of_the_weights_that_a_choice_makes_match_the_reference(twin, kind, noise):
    spec, given = SPECS[kind], arguments(SPECS[kind], noise=noise)
    _, score_PE, selection_PE = values(spec, LOGITS_PE)
    del given["inference"]
    ready = on_device(twin, given)
    scores = twin.array(score_PE), twin.array(selection_PE)
    assert_function_matches(
        twin,
        lambda logits: twins_choose(twin, spec, logits, *scores, **ready).weight_PK,
        lambda logits: references_choose(spec, logits, score_PE, selection_PE, **given).weight_PK,
        LOGITS_PE,
    )


def test_noise_of_noisy_top_k_matches_the_reference_with_its_gradients(twin):
    scale_PE, key = np.abs(normal(1, P, E)), on_device(twin, {"key": KEY})["key"]
    twins_noisy = twin.module("choice").noisy
    assert_function_matches(
        twin,
        lambda logits, scale: twins_noisy(logits, scale, key),
        lambda logits, scale: noisy(logits, scale, KEY),
        LOGITS_PE,
        scale_PE,
    )


def test_gradients_pass_a_choice_inside_a_larger_function(twin):
    """Scores of the chosen, whoever chose: indices have no gradient and raise no error."""
    spec = SPECS["expert_choice"]

    def backend_weights(logits):
        score = twin._namespace().exp(logits)
        choice = twin.module("choice").choose(spec, logits, score, score)
        taken = twin._namespace().take_along_axis(score, choice.expert_PK, axis=-1)
        return twin._namespace().where(choice.valid_PK, taken, 0.0)

    def reference_weights(logits):
        import autograd.numpy as anp

        score = anp.exp(logits)
        choice = choose(spec, logits, score, score)
        return anp.where(choice.valid_PK, score[np.arange(P)[:, None], choice.expert_PK], 0.0)

    assert_function_matches(twin, backend_weights, reference_weights, LOGITS_PE)


def test_ties_go_to_the_lower_id_the_lower_group_and_the_earlier_token(twin):
    equal_PE = np.zeros((P, E))
    for kind, experts in {
        "top_k": [0, 1],
        "grouped max": [0, 1],
        "grouped top2": [0, 1, 2],
        "sparsemixer": [0, 1],
    }.items():
        for result in (chosen(twin, SPECS[kind], equal_PE), reference(SPECS[kind], equal_PE)):
            np.testing.assert_array_equal(result.expert_PK, np.tile(experts, (P, 1)))
    spec = SPECS["expert_choice"]  # each of 8 experts takes ceil(15 * 2 / 8) = 4 of 15 equal tokens
    for result in (chosen(twin, spec, equal_PE), reference(spec, equal_PE)):
        np.testing.assert_array_equal(result.valid_PK, np.tile(np.arange(P)[:, None] < 4, (1, E)))
        np.testing.assert_array_equal(result.expert_PK, np.tile(np.arange(E), (P, 1)))
    nearly_PE = np.zeros((P, E))
    nearly_PE[:, 4:6] = 1.0  # groups 0, 1, 3 tie for the second place behind group 2
    four = router(SPECS["grouped max"].choice, top_k=4)
    np.testing.assert_array_equal(chosen(twin, four, nearly_PE).expert_PK, np.tile([4, 5, 0, 1], (P, 1)))


def test_groups_of_negative_values_are_out_all_the_same(twin):
    """Masked by minus infinity: zero would be above every value of the kept groups."""
    spec = router(GroupedTopKChoiceSpec(num_groups=4, keep=1), select_on="logits")
    logits_PE = LOGITS_PE - 100
    expert_PK = chosen(twin, spec, logits_PE).expert_PK
    assert np.all(expert_PK // 2 == (np.argmax(logits_PE, axis=-1) // 2)[:, None])


def test_experts_of_other_groups_may_count_as_zero(twin):
    """They are chosen before negative values of the kept group, the first ones first, but not if they are excluded."""
    groups = GroupedTopKChoiceSpec(num_groups=2, keep=1, group_value="top2", others="zero")
    spec = router(groups, top_k=5, score="sigmoid", selection_bias=SelectionBiasSpec())
    row = np.array([[0.5, -0.2, 0.4, -0.9, -0.1, 0.3, -0.3, -0.4], [-0.1, -9, -0.3, -0.2, -9, -9, -9, -9]])
    selection_PE = np.array([row[0], row[0], row[1]])
    selection_PE[1, 5] = -np.inf
    expected = [[0, 2, 4, 5, 6], [0, 2, 4, 6, 7], [4, 5, 6, 7, 0]]
    given = (np.zeros((3, E)), np.full((3, E), 0.5), selection_PE)
    np.testing.assert_array_equal(choose(spec, *given).expert_PK, expected)
    np.testing.assert_array_equal(
        twin.numpy(twin.module("choice").choose(spec, *map(twin.array, given)).expert_PK), expected
    )
    assert router(GroupedTopKChoiceSpec(num_groups=4, keep=2, others="zero")).selection_basis == "score"


# --- what each kind is, written out ----------------------------------------------------------------------------------


def test_groups_are_those_of_a_loop():
    for kind, best in (("grouped max", 1), ("grouped top2", 2)):
        spec = SPECS[kind]
        value_PE = values(spec, LOGITS_PE)[2]
        for p in range(P):
            size = E // spec.choice.num_groups
            groups = [list(range(start, start + size)) for start in range(0, E, size)]
            worth = [sum(sorted(value_PE[p, group])[-best:]) for group in groups]
            kept = sorted(range(len(groups)), key=lambda group: -worth[group])[: spec.choice.keep]
            open_ = [expert for group in kept for expert in groups[group]]
            expected = sorted(open_, key=lambda expert: -value_PE[p, expert])[: spec.top_k]
            assert list(reference(spec).expert_PK[p]) == expected


def test_nucleus_includes_the_expert_that_reaches_p_and_no_more():
    logits_PE = np.log(np.array([[0.5, 0.3, 0.1, 0.06, 0.04], [0.25, 0.2, 0.2, 0.18, 0.17]]))
    for p, counts in ((0.4, [1, 2]), (0.6, [2, 3]), (0.85, [3, 3])):  # the last is bounded by top_k
        spec = router(TopPChoiceSpec(p=p), top_k=3)
        assert list(reference(spec, logits_PE).valid_PK.sum(axis=-1)) == counts
        assert np.all(np.diff(reference(spec, logits_PE).valid_PK.astype(int), axis=-1) <= 0)


def test_each_expert_takes_its_highest_tokens_and_its_cutoff_takes_them_again():
    spec = SPECS["expert_choice"]
    score_PE, most = values(spec, LOGITS_PE)[1], math.ceil(P * K / E)
    trained = reference(spec)
    for expert in range(E):
        takers = {p for p in range(P) if expert in trained.expert_PK[p][trained.valid_PK[p]]}
        assert takers == set(np.argsort(-score_PE[:, expert])[:most])
        assert trained.cutoff_E[expert] == min(score_PE[p, expert] for p in takers)
    again = reference(spec, inference=True, cutoff_E=trained.cutoff_E)
    np.testing.assert_array_equal(again.valid_PK, trained.valid_PK)
    np.testing.assert_array_equal(again.expert_PK, trained.expert_PK)


def test_expert_choice_looks_at_other_tokens_in_training_and_at_none_at_inference():
    spec, moved_PE = SPECS["expert_choice"], LOGITS_PE.copy()
    moved_PE[P // 2 :] = normal(9, P - P // 2, E) + np.array([9.0, 0, 0, 0, 0, 0, 0, 0])
    first = slice(0, P // 2)

    def taken(logits_PE, **given):
        return reference(spec, logits_PE, **given).valid_PK[first].sum(axis=-1)

    assert np.any(taken(LOGITS_PE) != taken(moved_PE))
    given = arguments(spec, inference=True)
    np.testing.assert_array_equal(taken(LOGITS_PE, **given), taken(moved_PE, **given))


def test_sparsemixer_is_the_released_rule_written_token_by_token():
    spec, jitter = SPECS["sparsemixer"], SPECS["sparsemixer"].choice.jitter
    noise = [random.gumbel(random.fold_in(KEY, random.ROUTER_SAMPLE, 2 * slot), (P, E)) for slot in range(2)]
    draw = [random.uniform(random.fold_in(KEY, random.ROUTER_SAMPLE, 2 * slot + 1), (P,)) for slot in range(2)]
    actual, quiet, divided = reference(spec, key=KEY), reference(spec), 0
    for p, logits in enumerate(LOGITS_PE):
        for result, loud in ((actual, True), (quiet, False)):
            taken = []
            for slot in range(2):
                best = max(value for expert, value in enumerate(logits) if expert not in taken)
                near = {
                    expert: value
                    for expert, value in enumerate(logits)
                    if expert not in taken and (best - value) / max(abs(value), best) <= 2 * jitter
                }
                total = sum(math.exp(value) for value in near.values())
                drawn = max(near, key=lambda expert: near[expert] + (noise[slot][p, expert] if loud else 0))
                weight = math.exp(near[drawn]) / total
                if loud and near[drawn] < best and draw[slot][p] >= 0.25:
                    weight, divided = weight / 3, divided + 1
                assert result.expert_PK[p, slot] == drawn
                assert result.weight_PK[p, slot] == pytest.approx(weight, rel=1e-12)
                taken.append(drawn)
    assert divided > 3


def test_gradient_of_a_sparsemixer_weight_is_that_of_the_undivided_one():
    """The Jacobian of a softmax over the near experts, `gate_drawn (1[drawn = e] - gate_e)`, whatever divides it."""
    import autograd

    spec = SPECS["sparsemixer of one"]
    score_PE = softmax(LOGITS_PE)
    expert_PK = reference(spec, key=KEY).expert_PK
    gradient_PE = autograd.grad(lambda x: choose(spec, x, score_PE, x, RoutingContext(key=KEY)).weight_PK.sum())(
        LOGITS_PE
    )
    best_P1 = LOGITS_PE.max(axis=-1, keepdims=True)
    near_PE = best_P1 - LOGITS_PE <= 0.8 * np.maximum(np.abs(LOGITS_PE), best_P1)
    gate_PE = softmax(np.where(near_PE, LOGITS_PE, -np.inf))
    expected_PE = np.take_along_axis(gate_PE, expert_PK, -1) * ((np.arange(E) == expert_PK) - gate_PE)
    assert_close(gradient_PE, expected_PE, FLOAT64)


def test_a_narrow_sparsemixer_at_inference_is_the_best_expert_with_all_of_the_weight():
    spec = router(SparseMixerChoiceSpec(jitter=1e-6))
    choice = reference(spec, inference=True)
    np.testing.assert_array_equal(choice.expert_PK, reference(SPECS["top_k"]).expert_PK)
    np.testing.assert_array_equal(choice.weight_PK, np.ones((P, K)))


def test_reference_gradient_agrees_with_finite_differences():
    spec, score_PE = SPECS["sparsemixer"], softmax(LOGITS_PE)
    assert_reference_gradient(lambda x: choose(spec, x, score_PE, LOGITS_PE).weight_PK, LOGITS_PE)
    assert_reference_gradient(lambda x, scale: noisy(x, scale, KEY), LOGITS_PE, np.abs(normal(1, P, E)))


@pytest.mark.parametrize("kind", sorted(set(SPECS) - {"all", "hash"}))
@pytest.mark.parametrize("inference", [False, True])
def test_no_choice_moves_when_logits_move_by_less_than_the_margin(kind, inference):
    """By a twentieth of the smallest: a score moves by up to twice as much, and so does what it is held against."""
    spec = SPECS[kind]
    given = arguments(spec, inference=inference, noise=True)
    before = reference(spec, **given)
    step = min(np.min(before.margin_P), 1) / 20
    after = reference(spec, LOGITS_PE + np.random.default_rng(0).uniform(-step, step, LOGITS_PE.shape), **given)
    np.testing.assert_array_equal(sets(after), sets(before))


def test_the_margin_is_infinite_where_nothing_can_fall_otherwise():
    for kind in ("all", "hash", "expert_choice of all"):
        assert np.all(np.isinf(reference(SPECS[kind], **arguments(SPECS[kind])).margin_P))


LITTLE = 1e-9
NEAR_TIES = {  # a token's logits, and what hangs on LITTLE
    "top_k": [3, 2, 2 + LITTLE, 0, 0, 0, 0, 0],  # the second expert
    "grouped max": [3, 0, 2, 2, 2 + LITTLE, 0, 0, 0],  # the second group
    "grouped top2": [1, 1, 0, -9, 1, 1 + LITTLE, -9, -9],  # the sum of two
    "top_p": np.log([0.3, 0.3 + LITTLE, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]),  # whether two are enough for 0.6
    "top_p of two": np.log([0.3, 0.2, 0.2 - LITTLE, 0.1, 0.05, 0.05, 0.05, 0.05]),  # who is the second
    "sparsemixer": [9, 5, 5 + LITTLE, 0, 0, 0, 0, 0],  # the best of the rest
    "sparsemixer of one": [10, 2 + LITTLE, 0, 0, 0, 0, 0, 0],  # whether the second is near: 10 - 2 = 0.8 * 10
}


@pytest.mark.parametrize("kind", NEAR_TIES)
def test_the_margin_is_small_where_a_choice_hangs_on_little(kind):
    margin_P = reference(SPECS[kind], np.array([NEAR_TIES[kind], np.arange(8) ** 1.5])).margin_P
    assert margin_P[0] < 1e-7  # scores here are rounded to float32
    assert margin_P[1] > 1e-3


def test_the_margin_of_expert_choice_is_small_for_two_tokens_at_the_border():
    """The fourth and fifth highest of 15 tokens; each expert takes four. And at inference for one at the cutoff."""
    logits_PE = np.tile(np.log(1.0 + np.arange(P))[:, None] / 9, (1, E))
    logits_PE[:, 1::2] = 0
    logits_PE[-5, 0] = logits_PE[-4, 0] - LITTLE
    spec = router(ExpertChoiceSpec(), select_on="logits")
    near_P = reference(spec, logits_PE + 1e-3 * LOGITS_PE[:, ::-1] * (np.arange(E) > 0)).margin_P
    assert list(np.flatnonzero(near_P < 1e-8)) == [P - 5, P - 4]
    margin_P = reference(spec, inference=True, cutoff_E=np.where(np.arange(E) == 3, LOGITS_PE[7] + LITTLE, 9)).margin_P
    assert list(np.flatnonzero(margin_P < 1e-8)) == [7]


# --- properties, of the reference and of MLX -------------------------------------------------------------------------

# Multiples of 1/64 within 4 of zero: exact in float32, sums too. JAX would compile for every drawn choice.
LOGITS = st.lists(st.integers(-256, 256), min_size=P * E, max_size=P * E, unique=True).map(
    lambda numbers: np.array(numbers, np.float64).reshape(P, E) / 64
)
WITHOUT_IDS = [  # a group, a row of a table and a bias belong to an id
    kind for kind in SPECS if kind not in ("grouped max", "grouped top2", "hash", "biased")
]
OF_SOFTMAX = [  # and a sparsemixer measures nearness against the size of the logits
    kind for kind in SPECS if SPECS[kind].score == "softmax" and kind not in WITH_OWN_WEIGHTS
]
FEW = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def both(spec: RouterSpec, logits_PE, **given) -> list[Choice]:
    require_backend("mlx")
    return [reference(spec, logits_PE, **given), chosen(Twin("mlx"), spec, logits_PE, **given)]


def sets(choice: Choice) -> np.ndarray:
    """[P, E] bool: who is chosen."""
    taken_PE = np.zeros((P, E), bool)
    np.logical_or.at(taken_PE, (np.arange(P)[:, None], choice.expert_PK), choice.valid_PK)
    return taken_PE


@FEW
@drawn(logits_PE=LOGITS, kind=st.sampled_from(sorted(SPECS)), inference=st.booleans())
def test_every_slot_names_an_expert_and_no_token_has_one_twice(logits_PE, kind, inference):
    spec = SPECS[kind]
    for choice in both(spec, logits_PE, **arguments(spec, inference=inference, noise=True)):
        assert np.all((choice.expert_PK >= 0) & (choice.expert_PK < E))
        assert np.all(np.diff(np.sort(choice.expert_PK, axis=-1), axis=-1) > 0)
        assert np.all(choice.valid_PK[:, 0] | isinstance(spec.choice, ExpertChoiceSpec))
        assert np.all(np.diff(choice.valid_PK.astype(int), axis=-1) <= 0)


@FEW
@drawn(logits_PE=LOGITS, top_k=st.integers(1, E))
def test_no_expert_takes_more_tokens_than_its_share(logits_PE, top_k):
    spec = router(ExpertChoiceSpec(), top_k=top_k)
    for choice in both(spec, logits_PE):
        assert np.all(sets(choice).sum(axis=0) == math.ceil(P * top_k / E))


@FEW
@drawn(logits_PE=LOGITS, kind=st.sampled_from(WITHOUT_IDS), order=st.permutations(range(E)).map(np.array))
def test_experts_in_another_order_are_chosen_all_the_same(logits_PE, kind, order):
    before, after = both(SPECS[kind], logits_PE), both(SPECS[kind], logits_PE[:, order])
    assume(np.min(before[0].margin_P) > 1e-5)  # softmax sums in another order
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(sets(other), sets(one)[:, order])


@FEW
@drawn(logits_PE=LOGITS, kind=st.sampled_from(OF_SOFTMAX), constant=st.integers(-64, 64))
def test_a_constant_added_to_softmax_logits_changes_no_choice(logits_PE, kind, constant):
    given, shift_P1 = arguments(SPECS[kind]), constant * (1 + np.arange(P)[:, None] % 3)
    before = both(SPECS[kind], logits_PE, **given)
    assume(np.min(before[0].margin_P) > 1e-5)
    for one, other in zip(before, both(SPECS[kind], logits_PE + shift_P1, **given), strict=True):
        for name in INTEGERS:
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"choice": {"kind": "grouped_top_k", "num_groups": 3, "keep": 1}}, "num_groups is 3, which does not divide"),
        ({"choice": {"kind": "top_p", "p": 0.5}, "score": "none"}, "top_p, which sums scores, but score is none"),
        ({"choice": {"kind": "expert_choice"}}, "renormalize requires a fixed number of experts per token"),
        ({"choice": {"kind": "sparsemixer"}}, "sparsemixer, which computes its own weights for one or two experts"),
        ({"choice": {"kind": "hash"}, "selection_bias": {}}, "hash does not use a selection value"),
    ],
)
def test_a_combination_that_cannot_be_is_refused(fields, message):
    raw = {"num_experts": E, "router": {"top_k": K, **fields}, "experts": {"hidden_dim": F}}
    with pytest.raises(SpecError, match=message):
        validate(MoESpec, raw, "config")


def test_the_twins_tuple_is_the_references_less_the_margin(twin):
    assert twin.module("choice").Choice._fields == Choice._fields[:-1]
