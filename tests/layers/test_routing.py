from pathlib import Path

import autograd
import autograd.numpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moezoo.core import random
from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference.choice import RoutingContext
from moezoo.core.reference.routing import Routing, average_cutoff, route, score
from moezoo.core.spec import MoESpec, RouterSpec
from tests.support.tolerances import BFLOAT16, EXACT, FLOAT32, FLOAT64, assert_close
from tests.support.twins import D, E, F, K, P, Twin, V, assert_layer_matches, assert_reference_gradient, normal

X_PD, W_DE = normal(0, P, D), 0.5 * normal(1, D, E)
TOKEN_P = np.random.default_rng(4).integers(0, V, P)
Z = 11  # width of the router's MLP
PREVIOUS_PZ = normal(28, P, Z)
PREVIOUS_PE = normal(5, P, E + 2)  # logits of a layer with another number of experts
KEY = random.key(6)
VALUES = {
    "input_scale": 2 + normal(7, D),
    "w_router": W_DE,
    "b_router": normal(8, E),
    "w_residual": 0.3 * normal(9, E + 2, E),
    "expert_scale": 1 + 0.3 * normal(10, E),
    "selection_bias": normal(11, E),
    "w_noise": 0.3 * normal(12, D, E),
    "cutoff": 0.1 * np.abs(normal(14, E)),
    "cutoff_weight": np.array([0.5]),
    "mlp.w_down": 0.5 * normal(20, D, Z),
    "mlp.b_down": normal(21, Z),
    "mlp.state_scale": 1 + 0.3 * normal(22, Z),
    "mlp.norm.scale": 1 + 0.3 * normal(23, Z),
    "mlp.w_first": 0.5 * normal(24, Z, Z),
    "mlp.b_first": normal(25, Z),
    "mlp.w_second": 0.5 * normal(26, Z, Z),
    "mlp.b_second": normal(27, Z),
    "hash_table": np.random.default_rng(13).permuted(np.tile(np.arange(E), (V, 1)), axis=1)[:, :K].astype(float),
}
STATE = {"selection_bias", "cutoff", "cutoff_weight", "hash_table"}
BIAS = {"selection_bias": {}}
# Epsilons are large, so that where they are added or bind is seen.
ROUTERS: dict[str, dict] = {
    "renormalized": {},
    "unnormalized": {"renormalize": "none"},
    "epsilon": {"renormalize_epsilon": 0.5},
    "one expert": {"top_k": 1, "renormalize": "none"},
    "all experts": {"top_k": E},
    "sigmoid": {"score": "sigmoid", "renormalize_epsilon": 1e-20, "scale": 2.5} | BIAS,
    "sqrt softplus": {"score": "sqrt_softplus", "renormalize": "none", "scale": 1.5} | BIAS,
    "softmax with bias": {"renormalize_epsilon": 0.7, "renormalize_floor": True} | BIAS,
    "biased logits": {"score": "sigmoid", "select_on": "logits"} | BIAS,
    "softmax of chosen": {"score": "none", "weight": "softmax_of_chosen", "renormalize": "none", "bias": True},
    "sigmoid of chosen": {"score": "none", "weight": "sigmoid_of_chosen", "renormalize": "none"},
    "p norm": {"top_k": 3, "renormalize": "p_norm", "renormalize_order": 2.5},
    "normalized input": {"input": "normalized", "per_expert_scale": True, "input_epsilon": 1e-4},
    "residual, temperature and cap": {"gating_residual": True, "temperature": 0.7, "softcap": 2.0, "bias": True},
    "product keys": {"top_k": 3, "product_keys": True, "bias": True} | BIAS,
    "mlp": {"mlp": {"hidden_dim": Z, "depth_average": True, "norm": {"epsilon": 0.1}}, "renormalize": "none"} | BIAS,
    "jitter of the input": {"jitter": {"of": "input", "amount": 0.3}},
    "jitter of the logits": {"jitter": {"of": "logits", "amount": 0.3}, "score": "sigmoid"},
    "noise": {"choice": {"kind": "noisy_top_k"}},
    "hash": {"choice": {"kind": "hash"}, "score": "sqrt_softplus"},
    "top p": {"top_k": 4, "choice": {"kind": "top_p", "p": 0.7}},
    "sparsemixer": {"choice": {"kind": "sparsemixer", "jitter": 0.1}, "renormalize": "none", "scale": 1.5},
    "expert choice": {"choice": {"kind": "expert_choice"}, "renormalize": "none"},
}
SPECS = {name: RouterSpec.model_validate({"top_k": K} | fields) for name, fields in ROUTERS.items()}
RENORMALIZED = SPECS["renormalized"]


def values_of(spec: RouterSpec) -> dict[str, np.ndarray]:
    """What the spec asks for of VALUES."""
    asked = {
        "input_scale": spec.input == "normalized",
        "w_router": True,
        "b_router": spec.bias,
        "w_residual": spec.gating_residual,
        "expert_scale": spec.per_expert_scale,
        "selection_bias": spec.selection_bias is not None,
        "w_noise": spec.choice.kind == "noisy_top_k",
        "cutoff": spec.choice.kind == "expert_choice",
        "cutoff_weight": spec.choice.kind == "expert_choice",
        "hash_table": spec.choice.kind == "hash",
    }
    asked |= {name: spec.mlp is not None for name in VALUES if name.startswith("mlp.")}
    values = {name: value for name, value in VALUES.items() if asked[name]}
    if spec.product_keys:  # two keys for each half of four experts
        values = {name: value[..., :4] for name, value in values.items()}
    return values if spec.mlp is None else values | {"w_router": values["w_router"][:Z]}


def router(twin: Twin, spec: RouterSpec, w_DE=None):
    own = {} if w_DE is None else {"w_router": w_DE}
    return twin.module("routing").Router(spec, twin.weights(values_of(spec) | own))


def context_of(twin: Twin, forced_PK=None, **masks):
    previous = {"previous_PE": PREVIOUS_PE, "previous_PZ": PREVIOUS_PZ}
    given = {"token_P": TOKEN_P, "key": KEY, "forced_PK": forced_PK} | previous | masks
    arrays = {name: twin.array(value) for name, value in given.items() if value is not None}
    return twin.module("choice").RoutingContext(**arrays)


def routed(twin: Twin, spec: RouterSpec, x_PD=X_PD, w_DE=None, forced_PK=None, **masks) -> Routing:
    routing = twin.compiled(router(twin, spec, w_DE))(twin.array(x_PD), context_of(twin, forced_PK, **masks))
    return Routing(*(None if value is None else twin.numpy(value) for value in routing), margin_P=None)


def reference(spec: RouterSpec, values=None, x_PD=X_PD, forced_PK=None, key=KEY, **masks) -> Routing:
    values = {**values_of(spec), **(values or {})}
    return route(spec, values, x_PD, RoutingContext(TOKEN_P, PREVIOUS_PE, PREVIOUS_PZ, forced_PK, key, **masks))


def side_by_side(namespace, routing: Routing):
    """All that has a gradient, [P, ...]."""
    noise = [] if routing.noise_scale_PE is None else [routing.clean_logits_PE, routing.noise_scale_PE]
    state = [] if routing.state_PZ is None else [routing.state_PZ]
    return namespace.concatenate([routing.weight_PK, routing.score_PE, routing.logits_PE, *noise, *state], axis=-1)


@pytest.mark.parametrize("kind", SPECS)
def test_routing_matches_the_reference(twin, kind):
    actual, expected = routed(twin, SPECS[kind]), reference(SPECS[kind])
    np.testing.assert_array_equal(actual.expert_PK, expected.expert_PK)
    for name in set(Routing._fields) - {"expert_PK", "margin_P"}:
        if getattr(expected, name) is None:
            assert getattr(actual, name) is None
        else:
            assert_close(getattr(actual, name), getattr(expected, name), FLOAT32, name)


@pytest.mark.parametrize("kind", SPECS)
def test_gradients_match_the_reference(twin, kind):
    spec = SPECS[kind]
    trained = {name: value for name, value in values_of(spec).items() if name not in STATE}
    assert_layer_matches(
        twin,
        router(twin, spec),
        lambda layer, x: side_by_side(twin._namespace(), layer(x, context_of(twin))),
        lambda values, x: side_by_side(autograd.numpy, reference(spec, values, x)),
        trained,
        X_PD,
    )


def test_gradient_reaches_the_logits_of_the_layer_before(twin):
    spec, on_device = SPECS["residual, temperature and cap"], twin.module("choice").RoutingContext
    assert_layer_matches(
        twin,
        router(twin, spec),
        lambda layer, previous: layer(twin.array(X_PD), on_device(previous_PE=previous)).weight_PK,
        lambda values, previous: route(spec, values, X_PD, RoutingContext(previous_PE=previous)).weight_PK,
        values_of(spec),
        PREVIOUS_PE,
    )


def test_gradient_reaches_the_state_of_the_layer_before(twin):
    spec, on_device = RouterSpec(top_k=K, mlp=SPECS["mlp"].mlp), twin.module("choice").RoutingContext
    assert_layer_matches(
        twin,
        router(twin, spec),
        lambda layer, previous: layer(twin.array(X_PD), on_device(previous_PZ=previous)).logits_PE,
        lambda values, previous: route(spec, values, X_PD, RoutingContext(previous_PZ=previous)).logits_PE,
        values_of(spec),
        PREVIOUS_PZ,
    )


def test_a_state_holds_that_of_all_layers_before(twin):
    """With no input, the third layer's state is the first layer's, times both scales."""
    spec, zeros = SPECS["mlp"], np.zeros((P, D))
    values = values_of(spec) | {"mlp.b_down": np.zeros(Z)}
    layer = twin.compiled(twin.module("routing").Router(spec, twin.weights(values)))
    state = twin.array(PREVIOUS_PZ)
    for _ in range(2):
        state = layer(twin.array(zeros), twin.module("choice").RoutingContext(previous_PZ=state)).state_PZ
    assert_close(twin.numpy(state), PREVIOUS_PZ * VALUES["mlp.state_scale"] ** 2, FLOAT32)


def test_the_first_mixture_has_no_gating_residual(twin):
    first = twin.weights({"w_router": W_DE, "b_router": VALUES["b_router"]})
    spec = SPECS["residual, temperature and cap"]
    routing = twin.module("routing").Router(spec, first)(twin.array(X_PD))
    without = {"w_router": W_DE, "b_router": VALUES["b_router"]}
    assert_close(twin.numpy(routing.logits_PE), route(spec, without, X_PD).logits_PE, FLOAT32)


def test_an_expert_of_product_keys_has_the_sum_of_its_two_keys(twin):
    first, second, bias = normal(40, P, 3), normal(41, P, 3), normal(42, 6)
    keys_PE = np.concatenate([first, second], axis=1)
    values = {"w_router": np.eye(6), "b_router": bias}
    spec = RouterSpec(top_k=K, product_keys=True, bias=True)
    actual = twin.module("routing").Router(spec, twin.weights(values))(twin.array(keys_PE))
    expected = [
        first[:, expert // 3] + bias[expert // 3] + second[:, expert % 3] + bias[3 + expert % 3] for expert in range(9)
    ]
    assert_close(twin.numpy(actual.logits_PE), np.stack(expected, axis=1), FLOAT32)
    assert_close(route(spec, values, keys_PE).logits_PE, np.stack(expected, axis=1), FLOAT64)


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
        expected = reference(RouterSpec(top_k=top_k), {"w_router": w_DE}, x_PD)
        np.testing.assert_array_equal(expected.expert_PK, expert_PK)
    all_equal = routed(twin, RENORMALIZED, np.zeros((P, D)))
    np.testing.assert_array_equal(all_equal.expert_PK, np.tile([0, 1], (P, 1)))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("shift", [-300.0, 0.0, 300.0])
def test_scores_that_underflow_or_saturate_do_not_tie(twin, kind, shift):
    """Logits 0 and -300 .. -200, say: all softmax scores but the first are 0, and yet the last expert is second."""
    x_PD, w_DE = np.zeros((P, D)), np.zeros((D, E))
    x_PD[:, 0] = 1.0
    w_DE[0] = shift + np.array([0.0, -300.0, -280.0, -260.0, -240.0, -220.0, -200.0])
    spec = RouterSpec(top_k=K, score=kind)
    np.testing.assert_array_equal(routed(twin, spec, x_PD, w_DE).expert_PK, np.tile([0, 6], (P, 1)))


def test_a_selection_bias_moves_the_choice_and_not_the_weights(twin):
    plain, biased = SPECS["sigmoid"].model_copy(update={"selection_bias": None}), SPECS["sigmoid"]
    with_bias = routed(twin, biased)
    assert np.any(with_bias.expert_PK != routed(twin, plain).expert_PK)
    assert_close(with_bias.selection_PE, with_bias.score_PE + VALUES["selection_bias"], FLOAT32)
    forced = routed(twin, plain, forced_PK=with_bias.expert_PK)
    assert_close(forced.weight_PK, with_bias.weight_PK, EXACT)


@pytest.mark.parametrize("kind", ["softmax with bias", "top p", "sparsemixer", "expert choice"])
def test_an_excluded_expert_is_not_chosen_and_a_silenced_one_has_weight_zero(twin, kind):
    spec = SPECS[kind]
    excluded_PE = np.random.default_rng(1).permuted(np.tile(np.arange(E) < 2, (P, 1)), axis=1)
    silenced_PE = np.random.default_rng(2).random((P, E)) < 0.5
    excluded, expected = reference(spec, excluded_PE=excluded_PE), reference(spec)
    both = routed(twin, spec, excluded_PE=excluded_PE, silenced_PE=silenced_PE)
    np.testing.assert_array_equal(both.expert_PK, excluded.expert_PK)
    np.testing.assert_array_equal(both.valid_PK, excluded.valid_PK)
    assert not np.any(np.take_along_axis(excluded_PE, both.expert_PK, axis=-1) & (both.valid_PK == 1))
    silenced_PK = np.take_along_axis(silenced_PE, both.expert_PK, axis=-1)
    assert_close(both.weight_PK, np.where(silenced_PK, 0.0, excluded.weight_PK), FLOAT32)
    assert_close(excluded.score_PE, expected.score_PE, EXACT)
    np.testing.assert_array_equal(excluded.selection_PE, np.where(excluded_PE, -np.inf, expected.selection_PE))
    assert np.all(excluded.margin_P >= 0)


def test_softmax_of_chosen_is_renormalized_softmax(twin):
    chosen = routed(twin, RouterSpec(top_k=K, score="none", weight="softmax_of_chosen"))
    renormalized = routed(twin, RENORMALIZED)
    np.testing.assert_array_equal(chosen.expert_PK, renormalized.expert_PK)
    assert_close(chosen.weight_PK, renormalized.weight_PK, FLOAT32)


def test_normalized_input_does_not_depend_on_the_length_of_a_token(twin):
    spec = SPECS["normalized input"]
    assert_close(routed(twin, spec, 1e3 * X_PD).logits_PE, routed(twin, spec, 1e2 * X_PD).logits_PE, FLOAT32)


def test_jitter_stays_within_its_amount_and_needs_a_key(twin):
    plain, spec = RouterSpec(top_k=K, score="sigmoid"), SPECS["jitter of the logits"]
    ratio_PE = routed(twin, spec).logits_PE / routed(twin, plain).logits_PE
    assert 0.69 < ratio_PE.min() < 0.75
    assert 1.25 < ratio_PE.max() < 1.31
    without = router(twin, spec)(twin.array(X_PD))
    assert_close(twin.numpy(without.logits_PE), routed(twin, plain).logits_PE, EXACT)


@pytest.mark.parametrize("kind", ["renormalized", "sigmoid", "softmax of chosen", "p norm"])
def test_an_unused_slot_counts_nowhere(twin, kind):
    """Two of three slots, and a slot with an expert that the token would not take: weights as of the first two."""
    spec = SPECS[kind].model_copy(update={"top_k": K})
    expert_PK = reference(spec).expert_PK
    forced_PK = np.concatenate([expert_PK, np.full((P, 1), -1)], axis=1)
    actual = routed(twin, spec.model_copy(update={"top_k": K + 1}), forced_PK=forced_PK)
    assert_close(actual.weight_PK[:, :K], reference(spec).weight_PK, FLOAT32)
    assert_close(actual.weight_PK[:, K], np.zeros(P), EXACT)
    np.testing.assert_array_equal(actual.valid_PK, np.tile([1, 1, 0], (P, 1)))
    assert np.all(actual.expert_PK >= 0)


def test_forced_experts_are_taken_with_the_routers_own_weights(twin):
    forced_PK = np.random.default_rng(3).permuted(np.tile(np.arange(E), (P, 1)), axis=1)[:, :K]
    actual = routed(twin, RENORMALIZED, forced_PK=forced_PK)
    np.testing.assert_array_equal(actual.expert_PK, forced_PK)
    assert_close(actual.weight_PK, reference(RENORMALIZED, forced_PK=forced_PK).weight_PK, FLOAT32)


@pytest.mark.parametrize("kind", ["renormalized", "sigmoid", "sqrt softplus", "p norm", "normalized input"])
def test_logits_of_ten_thousand_do_not_overflow(twin, kind):
    layer, probe = router(twin, SPECS[kind]), normal(99, P, E)
    x_PD = twin.array(1e4 * X_PD)
    out, _, (of_x,) = twin.value_and_gradients(lambda layer, x: layer(x).score_PE, probe, layer, x_PD)
    assert np.all(np.isfinite(twin.numpy(out)))
    assert np.all(np.isfinite(of_x))
    if SPECS[kind].score == "softmax":
        assert np.all(np.isfinite(routed(twin, SPECS[kind], 1e4 * X_PD).weight_PK))


@pytest.mark.parametrize("kind", ["normalized input", "residual, temperature and cap", "jitter of the input", "noise"])
def test_a_router_in_float32_rounds_nothing_of_a_bfloat16_model(twin, kind):
    x = twin.array(X_PD, "bfloat16")
    routing = twin.compiled(router(twin, SPECS[kind]))(x, context_of(twin))
    exact = reference(SPECS[kind], x_PD=twin.numpy(x))
    assert "float32" in str(routing.weight_PK.dtype)
    assert_close(twin.numpy(routing.logits_PE), exact.logits_PE, FLOAT32)
    in_compute = twin.compiled(router(twin, SPECS[kind].model_copy(update={"dtype": "compute"})))(x, context_of(twin))
    assert "float32" in str(in_compute.weight_PK.dtype)
    assert_close(twin.numpy(in_compute.logits_PE), exact.logits_PE, BFLOAT16)


def test_router_dtype_decides_in_which_dtype_the_product_is_made(twin):
    x = twin.array(X_PD, "bfloat16")
    exact = route(RENORMALIZED, {"w_router": W_DE}, twin.numpy(x))
    in_float32 = router(twin, RouterSpec(top_k=K))(x)
    in_compute = router(twin, RouterSpec(top_k=K, dtype="compute"))(x)
    for name in ("weight_PK", "score_PE", "logits_PE", "selection_PE"):
        assert "float32" in str(getattr(in_float32, name).dtype)
        assert "float32" in str(getattr(in_compute, name).dtype)
    assert_close(twin.numpy(in_float32.logits_PE), exact.logits_PE, FLOAT32)
    assert_close(twin.numpy(in_compute.logits_PE), exact.logits_PE, BFLOAT16)
    rounding = np.max(np.abs(twin.numpy(in_compute.logits_PE) - exact.logits_PE))
    assert rounding > 10 * FLOAT32.relative * np.max(np.abs(exact.logits_PE))


def test_expert_choice_at_inference_goes_by_the_cutoffs_kept_in_training(twin):
    spec = SPECS["expert choice"]
    routing = router(twin, spec)(twin.array(X_PD), twin.module("choice").RoutingContext(inference=True))
    expected = route(spec, values_of(spec), X_PD, RoutingContext(inference=True))
    assert_close(twin.numpy(routing.weight_PK), expected.weight_PK, FLOAT32)
    reached_PE = expected.score_PE >= VALUES["cutoff"] / VALUES["cutoff_weight"]
    np.testing.assert_array_equal(twin.numpy(routing.valid_PK).sum(axis=-1), reached_PE.sum(axis=-1))
    assert 0 < reached_PE.sum() < reached_PE.size


def test_cutoffs_are_averages_without_the_zeros_that_they_started_from(twin):
    """0.99 * 0 + 0.01 * 0.3 after one step of weight 0.01 is 0.3; before the first step it is 0."""
    ours = twin.module("routing").average_cutoff
    for cutoff_E, weight in ((np.full(E, 0.003), 0.01), (np.zeros(E), 0.0)):
        expected = average_cutoff(cutoff_E, np.array([weight]))
        assert_close(expected, np.full(E, 0.3 if weight else 0.0), FLOAT64)
        assert_close(twin.numpy(ours(twin.array(cutoff_E), twin.array([weight]))), expected, FLOAT32)


def test_reference_is_softmax_then_top_k_written_out():
    expected = np.empty((P, K))
    for p in range(P):
        score = np.exp(X_PD[p] @ W_DE)
        chosen = sorted(range(E), key=lambda expert: (-score[expert], expert))[:K]
        expected[p] = [score[expert] / sum(score[other] for other in chosen) for expert in chosen]
    assert_close(reference(RENORMALIZED).weight_PK, expected, FLOAT64)


def test_reference_scores_are_those_of_a_calculator():
    logits_PE = np.array([[0.0, 1.0, -2.0]])
    expected = {
        "softmax": [0.2594964603, 0.7053845127, 0.0351190270],
        "sigmoid": [0.5, 0.7310585786, 0.1192029220],
        "sqrt_softplus": [0.8325546112, 1.1459763032, 0.3562695764],
        "none": [0.0, 1.0, -2.0],
    }
    for kind, values in expected.items():
        spec = RouterSpec(top_k=1, score=kind, weight="sigmoid_of_chosen")
        np.testing.assert_allclose(score(spec, logits_PE), [values], atol=1e-10)


@pytest.mark.parametrize("kind", [kind for kind in SPECS if kind != "sparsemixer"])  # its gradient is an estimate
def test_reference_gradient_agrees_with_finite_differences(kind):
    spec = SPECS[kind]
    names = [name for name in values_of(spec) if name not in STATE]

    def weights(x_PD, *arrays):
        return side_by_side(autograd.numpy, reference(spec, dict(zip(names, arrays, strict=True)), x_PD))

    assert_reference_gradient(weights, X_PD, *(values_of(spec)[name] for name in names))


# --- properties of many routers --------------------------------------------------------------------------------------

ROWS = 4
# Eighths: sums and differences are exact in float32, and no two experts of a token tie.
logits_of = st.lists(
    st.lists(st.integers(-200, 200), min_size=E, max_size=E, unique=True), min_size=ROWS, max_size=ROWS
)
examples = settings(max_examples=25, deadline=None, derandomize=True, database=None)
UNBIASED = [name for name, fields in ROUTERS.items() if not fields.keys() & {"selection_bias", "choice", "jitter"}]
OF_LOGITS = [
    name for name in UNBIASED if SPECS[name].input == "hidden" and not SPECS[name].gating_residual and name != "mlp"
]


def of_logits(twin: Twin, spec: RouterSpec, eighths) -> list[Routing]:
    """The reference's and the backend's routing of these logits, without a bias."""
    logits_PE = np.array(eighths) / 8
    values = {"w_router": np.eye(E), "b_router": np.zeros(E)}
    routing = twin.module("routing").Router(spec, twin.weights(values))(twin.array(logits_PE))
    on_device = Routing(*(None if value is None else twin.numpy(value) for value in routing), margin_P=None)
    return [route(spec, values, logits_PE), on_device]


@examples
@given(kind=st.sampled_from(OF_LOGITS), eighths=logits_of)
def test_weights_add_up_to_what_the_spec_says(twin, kind, eighths):
    spec = SPECS[kind]
    order = {"sum": 1.0, "p_norm": spec.renormalize_order, "none": 1.0}[spec.renormalize]
    for routing in of_logits(twin, spec, eighths):
        assert np.all(routing.weight_PK >= 0)
        norm_P = np.sum(routing.weight_PK**order, axis=-1) ** (1 / order)
        if spec.renormalize == "none" and spec.weight != "softmax_of_chosen":
            assert np.all(norm_P <= spec.top_k * (1 + FLOAT32.relative))
        elif spec.renormalize_epsilon:
            assert np.all(norm_P < 1)
        else:
            assert_close(norm_P, np.ones(ROWS), FLOAT32)


@examples
@given(kind=st.sampled_from(OF_LOGITS), eighths=logits_of, order=st.permutations(range(E)))
def test_renaming_experts_renames_the_choice(twin, kind, eighths, order):
    renamed = np.array(eighths)[:, list(order)]
    for before, after in zip(*(of_logits(twin, SPECS[kind], each) for each in (eighths, renamed)), strict=True):
        np.testing.assert_array_equal(np.array(order)[after.expert_PK], before.expert_PK)
        assert_close(after.weight_PK, before.weight_PK, FLOAT32)


@examples
@given(
    kind=st.sampled_from(["renormalized", "unnormalized", "one expert", "p norm", "softmax of chosen"]),
    eighths=logits_of,
    shift=st.integers(-800, 800),
)
def test_a_constant_added_to_softmax_logits_changes_nothing(twin, kind, eighths, shift):
    moved = np.array(eighths) + shift
    for before, after in zip(*(of_logits(twin, SPECS[kind], each) for each in (eighths, moved)), strict=True):
        np.testing.assert_array_equal(after.expert_PK, before.expert_PK)
        assert_close(after.weight_PK, before.weight_PK, FLOAT32)


# --- released routers ------------------------------------------------------------------------------------------------

# What transformers 5.23 computes in float32 on small random checkpoints of these families, for the 48 tokens of one
# prompt: `logits` [layers, P, E] as the linear map gives them, `expert` [layers, P, K] by ascending id, their `weight`,
# and of each layer the correction `bias` or the per-expert `scale` [layers, E].
RELEASED_ROUTINGS = Path(__file__).parents[1] / "data" / "released_routers.npz"
OF_CHOSEN = {"score": "none", "renormalize": "none"}
GROUPS = {"kind": "grouped_top_k", "num_groups": 2, "keep": 1}
RELEASED: dict[str, dict] = {
    "mixtral": {},
    "qwen2_moe": {"renormalize": "none"},
    "qwen3_moe": {},
    "qwen3_next": {},
    "olmoe": {"renormalize": "none"},
    "deepseek_v2": {"renormalize": "none", "scale": 1.7, "choice": GROUPS},
    "deepseek_v3": {
        "score": "sigmoid",
        "renormalize_epsilon": 1e-20,
        "scale": 2.5,
        "choice": GROUPS | {"group_value": "top2"},
    }
    | BIAS,
    "glm4_moe": {"score": "sigmoid", "renormalize_epsilon": 1e-20, "scale": 2.5} | BIAS,
    "gpt_oss": OF_CHOSEN | {"weight": "softmax_of_chosen"},
    "granitemoe": OF_CHOSEN | {"weight": "softmax_of_chosen"},
    "ernie4_5_moe": {"renormalize_epsilon": 1e-12, "renormalize_floor": True} | BIAS,
    "minimax_m2": {"score": "sigmoid"} | BIAS,
    "phimoe": {"renormalize": "none", "choice": {"kind": "sparsemixer", "jitter": 0.01}},
    "llama4_text": OF_CHOSEN | {"top_k": 1, "weight": "sigmoid_of_chosen", "apply_to": "input"},
    "gemma4_text": {"per_expert_scale": True},
}


def released(family: str, name: str) -> np.ndarray | None:
    with np.load(RELEASED_ROUTINGS) as file:
        return file[f"{family}.{name}"] if f"{family}.{name}" in file.files else None


def by_expert(routing: Routing) -> tuple[np.ndarray, np.ndarray]:
    """Experts and weights by ascending id."""
    order_PK = np.argsort(routing.expert_PK, axis=-1)
    return tuple(np.take_along_axis(x, order_PK, axis=-1) for x in (routing.expert_PK, routing.weight_PK))


@pytest.mark.parametrize("family", RELEASED)
def test_routing_is_that_of_the_released_family(twin, family):
    """Reference and backend, from the family's logits: the identity is the router's matrix."""
    spec = RouterSpec.model_validate({"top_k": 2} | RELEASED[family])
    learned = {"selection_bias": released(family, "bias"), "expert_scale": released(family, "scale")}
    assert (learned["selection_bias"] is None) == (spec.selection_bias is None)
    logits_LPE, expert_LPK, weight_LPK = (released(family, name) for name in ("logits", "expert", "weight"))
    for layer, logits_PE in enumerate(logits_LPE):
        values = {name: value[layer] for name, value in learned.items() if value is not None}
        values["w_router"] = np.eye(logits_PE.shape[-1])
        routing = twin.compiled(twin.module("routing").Router(spec, twin.weights(values)))(twin.array(logits_PE))
        on_device = Routing(*(None if value is None else twin.numpy(value) for value in routing), margin_P=None)
        for ours in (route(spec, values, logits_PE.astype(np.float64)), on_device):
            expert_PK, weight_PK = by_expert(ours)
            np.testing.assert_array_equal(expert_PK, expert_LPK[layer])
            assert_close(weight_PK, weight_LPK[layer], FLOAT32)


def test_every_released_router_in_the_file_is_tested():
    with np.load(RELEASED_ROUTINGS) as file:
        assert {name.split(".")[0] for name in file.files} == set(RELEASED)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_more_choices_than_experts_are_refused():
    raw = {"num_experts": 8, "router": {"top_k": 9}, "experts": {"hidden_dim": F}}
    with pytest.raises(SpecError, match=r"router.top_k is 9, but num_experts is 8 \(config\). Use top_k <= 8."):
        validate(MoESpec, raw, "config")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"renormalize": "none", "renormalize_epsilon": 1e-6},
            r"router.renormalize_epsilon is 1e-06, but renormalize is none \(config\). Remove it",
        ),
        (
            {"renormalize_order": 2},
            r"router.renormalize_order is 2.0, but renormalize is sum \(config\). Remove it, or use .*p_norm",
        ),
        (
            {"renormalize_floor": True},
            r"router.renormalize_floor is true, but renormalize_epsilon, the lower bound, is 0",
        ),
        ({"score": "none"}, r"router.weight is score, but score is none.*Use weight: softmax_of_chosen"),
        (
            {"score": "none", "weight": "sigmoid_of_chosen", "choice": {"kind": "top_p", "p": 0.5}},
            r"router.choice is top_p, which sums scores, but score is none \(config\). Use score: softmax",
        ),
    ],
)
def test_a_combination_that_says_nothing_is_refused(fields, message):
    raw = {"num_experts": E, "router": {"top_k": K} | fields, "experts": {"hidden_dim": F}}
    with pytest.raises(SpecError, match=message):
        validate(MoESpec, raw, "config")


CONSTANT_WEIGHTS: dict[str, dict] = {
    "sum": {},
    "p norm": {"renormalize": "p_norm", "renormalize_order": 2.5},
    "tiny epsilon": {"renormalize_epsilon": 1e-6},
    "floor": {"renormalize_epsilon": 1e-12, "renormalize_floor": True},
    "softmax of chosen": {"score": "none", "weight": "softmax_of_chosen", "renormalize": "none"},
    "sigmoid of chosen": {"score": "none", "weight": "sigmoid_of_chosen"},
    "sigmoid with bias": {"score": "sigmoid"} | BIAS,
    "noise": {"choice": {"kind": "noisy_top_k"}},
    "hash": {"choice": {"kind": "hash"}},
    "groups": {"choice": {"kind": "grouped_top_k", "num_groups": 1, "keep": 1}},
    "little p": {"top_k": 3, "choice": {"kind": "top_p", "p": 0.9 / E}},
    "own scale": {"per_expert_scale": True, "scale": 2.5},
}
LEARNING: dict[str, dict] = {
    "score": {"renormalize": "none"},
    "epsilon": {"renormalize_epsilon": 0.5},
    "two experts": {"top_k": 2},
    "p norm of two": {"top_k": 2, "renormalize": "p_norm", "renormalize_order": 2.5},
    "sigmoid of chosen": {"score": "none", "weight": "sigmoid_of_chosen", "renormalize": "none"},
    "sparsemixer": {"choice": {"kind": "sparsemixer", "jitter": 0.1}, "renormalize": "none"},
    "expert choice": {"choice": {"kind": "expert_choice"}, "renormalize": "none"},
    "little p with bias": {"top_k": 3, "choice": {"kind": "top_p", "p": 0.9 / E}} | BIAS,
}


@pytest.mark.parametrize(
    ("fields", "learns"),
    [pytest.param(fields, False, id=name) for name, fields in CONSTANT_WEIGHTS.items()]
    + [pytest.param(fields, True, id=f"{name} learns") for name, fields in LEARNING.items()],
)
def test_a_router_learns_exactly_if_its_weights_have_a_gradient(fields: dict, learns: bool) -> None:
    moe = MoESpec.model_validate({"num_experts": E, "router": {"top_k": 1} | fields, "experts": {"hidden_dim": F}})
    spec, values = moe.router, values_of(moe.router)
    if "hash_table" in values:
        values["hash_table"] = values["hash_table"][:, :1]
    context = RoutingContext(token_P=TOKEN_P, previous_PE=PREVIOUS_PE, key=KEY)
    chosen_PE = normal(15, P, E)  # stands for what each expert's output does to the loss

    def loss(w_router: np.ndarray) -> float:
        routing = route(spec, values | {"w_router": w_router}, X_PD, context)
        return autograd.numpy.sum(routing.weight_PK * chosen_PE[np.arange(P)[:, None], routing.expert_PK])

    largest = np.abs(autograd.grad(loss)(W_DE)).max()
    assert moe.router_learns == learns
    assert largest > 1e-2 if learns else largest < 1e-4
