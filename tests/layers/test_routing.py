import numpy as np
import pytest

from moezoo.core.config import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.routing import Routing, route
from moezoo.core.spec import MoESpec, RouterSpec
from tests.tolerances import BFLOAT16, FLOAT32, FLOAT64, assert_close
from tests.twins import D, E, F, K, P, Twin, assert_layer_matches, assert_reference_gradient, normal

X_PD, W_DE = normal(0, P, D), 0.5 * normal(1, D, E)
SPECS = {
    "renormalized": RouterSpec(top_k=K),
    "unnormalized": RouterSpec(top_k=K, renormalize="none"),
    "epsilon": RouterSpec(top_k=K, renormalize_epsilon=0.5),  # large, to see that it is added
    "one expert": RouterSpec(top_k=1, renormalize="none"),
    "all experts": RouterSpec(top_k=E),
}


def router(twin: Twin, spec: RouterSpec, w_DE=W_DE):
    return twin.module("routing").Router(spec, twin.weights({"w_router": w_DE}))


def routed(twin: Twin, spec: RouterSpec, x_PD=X_PD, w_DE=W_DE, forced_PK=None) -> Routing:
    forced = None if forced_PK is None else twin.array(forced_PK)
    routing = router(twin, spec, w_DE)(twin.array(x_PD), forced)
    return Routing(*(twin.numpy(value) for value in routing))


@pytest.mark.parametrize("kind", SPECS)
def test_choice_matches_the_reference(twin, kind):
    actual, expected = routed(twin, SPECS[kind]), route(SPECS[kind], W_DE, X_PD)
    np.testing.assert_array_equal(actual.expert_PK, expected.expert_PK)
    assert_close(actual.score_PE, expected.score_PE, FLOAT32)
    assert_close(actual.logits_PE, expected.logits_PE, FLOAT32)


@pytest.mark.parametrize("kind", SPECS)
def test_weights_and_gradients_match_the_reference(twin, kind):
    spec = SPECS[kind]
    assert_layer_matches(
        twin,
        router(twin, spec),
        lambda layer, x: layer(x).weight_PK,
        lambda values, x: route(spec, values["w_router"], x).weight_PK,
        {"w_router": W_DE},
        X_PD,
    )


@pytest.mark.parametrize("field", ["score_PE", "logits_PE"])
def test_gradients_of_scores_and_logits_match_the_reference(twin, field):
    assert_layer_matches(
        twin,
        router(twin, SPECS["renormalized"]),
        lambda layer, x: getattr(layer(x), field),
        lambda values, x: getattr(route(SPECS["renormalized"], values["w_router"], x), field),
        {"w_router": W_DE},
        X_PD,
    )


def test_ties_go_to_the_lower_id(twin):
    """Logits 1 3 3 2 3 0 3: experts 1, 2, 4, 6 tie for the first places."""
    logits_E = np.array([1.0, 3.0, 3.0, 2.0, 3.0, 0.0, 3.0])
    x_PD = np.zeros((P, D))
    x_PD[:, 0] = 1.0
    w_DE = np.zeros((D, E))
    w_DE[0] = logits_E
    for top_k, chosen in ((1, [1]), (2, [1, 2]), (3, [1, 2, 4]), (6, [1, 2, 4, 6, 3, 0])):
        expert_PK = routed(twin, RouterSpec(top_k=top_k), x_PD, w_DE).expert_PK
        np.testing.assert_array_equal(expert_PK, np.tile(chosen, (P, 1)))
        np.testing.assert_array_equal(route(RouterSpec(top_k=top_k), w_DE, x_PD).expert_PK, expert_PK)
    all_equal = routed(twin, RouterSpec(top_k=K), np.zeros((P, D)))
    np.testing.assert_array_equal(all_equal.expert_PK, np.tile([0, 1], (P, 1)))


def test_scores_that_underflow_do_not_tie(twin):
    """Logits 0 and -300 .. -200: all scores but the first are 0, and yet the next best expert is the last."""
    x_PD, w_DE = np.zeros((P, D)), np.zeros((D, E))
    x_PD[:, 0] = 1.0
    w_DE[0] = [0.0, -300.0, -280.0, -260.0, -240.0, -220.0, -200.0]
    expert_PK = routed(twin, SPECS["renormalized"], x_PD, w_DE).expert_PK
    np.testing.assert_array_equal(expert_PK, np.tile([0, 6], (P, 1)))


def test_a_constant_added_to_the_logits_changes_nothing(twin):
    """The same column added to every expert adds x . v to all logits of a token."""
    shift_D1 = normal(2, D, 1)
    before, after = (routed(twin, SPECS["unnormalized"], w_DE=w) for w in (W_DE, W_DE + shift_D1))
    np.testing.assert_array_equal(after.expert_PK, before.expert_PK)
    assert_close(after.weight_PK, before.weight_PK, FLOAT32)
    assert np.max(np.abs(after.logits_PE - before.logits_PE)) > 1


def test_permuting_experts_permutes_the_choice(twin):
    order = np.array([3, 0, 6, 2, 5, 1, 4])
    before, after = (routed(twin, SPECS["renormalized"], w_DE=w) for w in (W_DE, W_DE[:, order]))
    np.testing.assert_array_equal(order[after.expert_PK], before.expert_PK)
    assert_close(after.weight_PK, before.weight_PK, FLOAT32)


def test_renormalized_weights_sum_to_one_and_others_to_less(twin):
    assert_close(routed(twin, SPECS["renormalized"]).weight_PK.sum(axis=-1), np.ones(P), FLOAT32)
    unnormalized = routed(twin, SPECS["unnormalized"])
    assert np.all(unnormalized.weight_PK.sum(axis=-1) < 0.999)
    np.testing.assert_array_equal(
        unnormalized.weight_PK, np.take_along_axis(unnormalized.score_PE, unnormalized.expert_PK, axis=-1)
    )


def test_experts_stand_by_descending_weight(twin):
    weight_PK = routed(twin, SPECS["all experts"]).weight_PK
    assert np.all(np.diff(weight_PK, axis=-1) <= 0)
    assert np.all(np.sort(routed(twin, SPECS["all experts"]).expert_PK, axis=-1) == np.arange(E))


def test_forced_experts_are_taken_with_the_routers_own_weights(twin):
    forced_PK = np.random.default_rng(3).permuted(np.tile(np.arange(E), (P, 1)), axis=1)[:, :K]
    actual = routed(twin, SPECS["renormalized"], forced_PK=forced_PK)
    expected = route(SPECS["renormalized"], W_DE, X_PD, forced_PK)
    np.testing.assert_array_equal(actual.expert_PK, forced_PK)
    assert_close(actual.weight_PK, expected.weight_PK, FLOAT32)


def test_logits_of_ten_thousand_do_not_overflow(twin):
    routing = routed(twin, SPECS["renormalized"], x_PD=1e4 * X_PD)
    assert np.all(np.isfinite(routing.weight_PK))
    assert np.all(np.isfinite(routing.score_PE))


def test_router_dtype_decides_in_which_dtype_the_product_is_made(twin):
    x = twin.array(X_PD, "bfloat16")
    exact = route(SPECS["renormalized"], W_DE, twin.numpy(x))
    in_float32 = router(twin, RouterSpec(top_k=K))(x)
    in_compute = router(twin, RouterSpec(top_k=K, dtype="compute"))(x)
    assert all("float32" in str(value.dtype) for value in (*in_float32[1:], *in_compute[1:]))
    assert_close(twin.numpy(in_float32.logits_PE), exact.logits_PE, FLOAT32)
    assert_close(twin.numpy(in_compute.logits_PE), exact.logits_PE, BFLOAT16)
    rounding = np.max(np.abs(twin.numpy(in_compute.logits_PE) - exact.logits_PE))
    assert rounding > 10 * FLOAT32.relative * np.max(np.abs(exact.logits_PE))


def test_reference_is_softmax_then_top_k_written_out():
    expected = np.empty((P, K))
    for p in range(P):
        score = np.exp(X_PD[p] @ W_DE)
        chosen = sorted(range(E), key=lambda expert: (-score[expert], expert))[:K]
        expected[p] = [score[expert] / sum(score[other] for other in chosen) for expert in chosen]
    assert_close(route(SPECS["renormalized"], W_DE, X_PD).weight_PK, expected, FLOAT64)


def test_reference_gradient_agrees_with_finite_differences():
    assert_reference_gradient(lambda w, x: route(SPECS["renormalized"], w, x).weight_PK, W_DE, X_PD)


def test_more_choices_than_experts_are_refused():
    raw = {"num_experts": 8, "router": {"top_k": 9}, "experts": {"hidden_dim": F}}
    with pytest.raises(SpecError, match=r"router.top_k is 9, but num_experts is 8 \(config\). Use top_k <= 8."):
        validate(MoESpec, raw, "config")


def test_an_epsilon_that_nothing_would_use_is_refused():
    raw = {
        "num_experts": E,
        "router": {"top_k": K, "renormalize": "none", "renormalize_epsilon": 1e-6},
        "experts": {"hidden_dim": F},
    }
    with pytest.raises(SpecError, match=r"router.renormalize_epsilon is 1e-06, but renormalize is none \(config\)"):
        validate(MoESpec, raw, "config")
