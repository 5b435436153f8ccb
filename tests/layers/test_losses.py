import math

import numpy as np
import pytest

from moezoo.core.config import validate
from moezoo.core.errors import SpecError
from moezoo.core.reference import losses as reference
from moezoo.core.reference.routing import Routing, route
from moezoo.core.spec import (
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    RouterSpec,
    RouterZLossSpec,
    SwitchBalanceLossSpec,
)
from tests.tolerances import FLOAT32, FLOAT64, assert_close
from tests.twins import B, D, E, K, P, T, V, assert_function_matches, assert_reference_gradient, normal

LOGITS_BTV = 3 * normal(0, B, T, V)
TARGET_BT = np.random.default_rng(1).integers(0, V, (B, T))
BALANCE, Z = SwitchBalanceLossSpec(coefficient=0.01), RouterZLossSpec(coefficient=0.001)


def on_device(twin, routing: Routing):
    return twin.module("routing").Routing(*(twin.array(value) for value in routing))


def a_routing(seed: int = 0) -> Routing:
    return route(RouterSpec(top_k=K), 0.5 * normal(seed + 1, D, E), normal(seed, P, D))


def collapsed(chosen: list[int], num_experts: int, num_tokens: int = 12) -> Routing:
    """All tokens go to the chosen experts, with all of the score."""
    score_E = np.zeros(num_experts)
    score_E[chosen] = 1 / len(chosen)
    score_PE = np.tile(score_E, (num_tokens, 1))
    return Routing(np.tile(chosen, (num_tokens, 1)), np.full((num_tokens, len(chosen)), 1.0), score_PE, score_PE)


def model_of(*layer_losses) -> ModelSpec:
    """One MoE layer for each tuple of losses."""
    attention = GroupedQueryAttentionSpec(num_heads=1, num_kv_heads=1, head_dim=2)
    layers = [
        LayerSpec(
            attention=attention,
            moe=MoESpec(
                num_experts=8, router=RouterSpec(top_k=2), experts=GatedFeedForwardSpec(hidden_dim=3), losses=of_layer
            ),
        )
        for of_layer in layer_losses
    ]
    return ModelSpec(vocab_size=V, embed_dim=D, layers=tuple(layers))


def test_token_losses_and_their_gradient_match_the_reference(twin):
    target_BT = twin.array(TARGET_BT)
    assert_function_matches(
        twin,
        lambda logits: twin.module("losses").token_losses(logits, target_BT),
        lambda logits: reference.token_losses(logits, TARGET_BT),
        LOGITS_BTV,
    )


def test_token_losses_are_negative_log_probabilities():
    probability = np.exp(LOGITS_BTV) / np.exp(LOGITS_BTV).sum(axis=-1, keepdims=True)
    expected = [[-math.log(probability[b, t, TARGET_BT[b, t]]) for t in range(T)] for b in range(B)]
    assert_close(reference.token_losses(LOGITS_BTV, TARGET_BT), expected, FLOAT64)


def test_equal_logits_cost_log_of_the_vocabulary(twin):
    value = twin.module("losses").token_losses(twin.array(np.full((B, T, V), 5.0)), twin.array(TARGET_BT))
    assert_close(twin.numpy(value), np.full((B, T), math.log(V)), FLOAT32)


def test_a_constant_added_to_the_logits_changes_no_token_loss(twin):
    token_losses, target_BT = twin.module("losses").token_losses, twin.array(TARGET_BT)
    before = twin.numpy(token_losses(twin.array(LOGITS_BTV), target_BT))
    assert_close(twin.numpy(token_losses(twin.array(LOGITS_BTV + 8), target_BT)), before, FLOAT32)


def test_logits_of_ten_thousand_give_a_finite_loss(twin):
    value = twin.module("losses").token_losses(twin.array(1e4 * LOGITS_BTV), twin.array(TARGET_BT))
    assert_close(twin.numpy(value), reference.token_losses(1e4 * LOGITS_BTV, TARGET_BT), FLOAT32)


@pytest.mark.parametrize(("name", "field"), [("switch_balance", "score_PE"), ("router_z", "logits_PE")])
def test_auxiliary_losses_and_their_gradients_match_the_reference(twin, name, field):
    routing = a_routing()
    others = on_device(twin, routing)
    assert_function_matches(
        twin,
        lambda value_PE: getattr(twin.module("losses"), name)(others._replace(**{field: value_PE})),
        lambda value_PE: getattr(reference, name)(routing._replace(**{field: value_PE})),
        getattr(routing, field),
    )


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balanced_routing_scores_one_for_every_k(twin, top_k):
    tokens = 7
    expert_PK = (np.arange(tokens)[:, None] + np.arange(top_k)) % E
    score_PE = np.full((tokens, E), 1 / E)
    routing = Routing(expert_PK, np.full((tokens, top_k), 1 / top_k), score_PE, np.zeros((tokens, E)))
    assert_close(reference.switch_balance(routing), 1.0, FLOAT64)
    value = twin.module("losses").switch_balance(on_device(twin, routing))
    assert_close(twin.numpy(value), 1.0, FLOAT32)


@pytest.mark.parametrize("chosen", [[4], [0, 6], [1, 2, 5]])
def test_collapse_on_k_of_e_experts_scores_e_over_k(twin, chosen):
    routing = collapsed(chosen, E)
    assert_close(reference.switch_balance(routing), E / len(chosen), FLOAT64)
    value = twin.module("losses").switch_balance(on_device(twin, routing))
    assert_close(twin.numpy(value), E / len(chosen), FLOAT32)


def test_z_loss_of_equal_logits_is_the_squared_log_of_their_number(twin):
    zeros = a_routing()._replace(logits_PE=np.zeros((P, E)))
    value = twin.module("losses").router_z(on_device(twin, zeros))
    assert_close(twin.numpy(value), math.log(E) ** 2, FLOAT32)


def test_layers_that_collapse_each_on_other_experts_are_not_called_balanced(twin):
    """Trap: pooled, four layers on experts 01, 23, 45 and 67 of 8 look balanced. Per layer each scores 4."""
    routings = [collapsed([2 * layer, 2 * layer + 1], 8) for layer in range(4)]
    spec = model_of(*[(BALANCE,)] * 4)
    terms = twin.module("losses").loss_terms(
        spec, twin.array(LOGITS_BTV), twin.array(TARGET_BT), [on_device(twin, routing) for routing in routings]
    )
    assert_close(twin.numpy(terms["switch_balance"]), 4.0, FLOAT32)
    assert_close(twin.numpy(terms["switch_balance_weighted"]), 4 * 0.01 * 4.0, FLOAT32)


def test_loss_terms_match_the_reference_where_layers_have_different_losses(twin):
    spec = model_of((BALANCE, Z), (), (Z,), (SwitchBalanceLossSpec(coefficient=0.5),))
    routings = [route(RouterSpec(top_k=2), 0.5 * normal(i + 1, D, 8), normal(i, P, D)) for i in range(4)]
    expected = reference.loss_terms(spec, LOGITS_BTV, TARGET_BT, routings)
    actual = twin.module("losses").loss_terms(
        spec, twin.array(LOGITS_BTV), twin.array(TARGET_BT), [on_device(twin, routing) for routing in routings]
    )
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert_close(twin.numpy(actual[name]), value, FLOAT32, name)


def test_loss_is_the_sum_and_a_term_the_mean_over_layers_that_have_it():
    spec = model_of((BALANCE, Z), (), (Z,), (SwitchBalanceLossSpec(coefficient=0.5),))
    routings = [route(RouterSpec(top_k=2), 0.5 * normal(i + 1, D, 8), normal(i, P, D)) for i in range(4)]
    terms = reference.loss_terms(spec, LOGITS_BTV, TARGET_BT, routings)
    balance = [reference.switch_balance(routings[i]) for i in (0, 3)]
    z = [reference.router_z(routings[i]) for i in (0, 2)]
    assert_close(terms["switch_balance"], np.mean(balance), FLOAT64)
    assert_close(terms["router_z"], np.mean(z), FLOAT64)
    assert_close(terms["switch_balance_weighted"], 0.01 * balance[0] + 0.5 * balance[1], FLOAT64)
    assert_close(terms["router_z_weighted"], 0.001 * (z[0] + z[1]), FLOAT64)
    total = terms["cross_entropy"] + terms["switch_balance_weighted"] + terms["router_z_weighted"]
    assert_close(terms["loss"], total, FLOAT64)


@pytest.mark.parametrize("name", ["switch_balance", "router_z"])
def test_reference_gradient_agrees_with_finite_differences(name):
    x_PD = normal(0, P, D)
    assert_reference_gradient(
        lambda w: getattr(reference, name)(route(RouterSpec(top_k=K), w, x_PD)), 0.5 * normal(1, D, E)
    )
    assert_reference_gradient(lambda logits: reference.token_losses(logits, TARGET_BT), LOGITS_BTV)


def test_a_loss_named_twice_is_refused():
    raw = {
        "num_experts": E,
        "router": {"top_k": K},
        "experts": {"hidden_dim": 4},
        "losses": [{"kind": "router_z", "coefficient": 0.1}] * 2,
    }
    with pytest.raises(
        SpecError, match=r"losses names a loss twice: router_z, router_z \(config\). Use each loss once"
    ):
        validate(MoESpec, raw, "config")


def test_an_unknown_loss_is_refused_with_the_nearest_known_one():
    raw = {
        "num_experts": E,
        "router": {"top_k": K},
        "experts": {"hidden_dim": 4},
        "losses": [{"kind": "switch_balanced", "coefficient": 0.1}],
    }
    with pytest.raises(SpecError, match=r"losses\[0\].kind is 'switch_balanced'; did you mean switch_balance\?"):
        validate(MoESpec, raw, "config")
