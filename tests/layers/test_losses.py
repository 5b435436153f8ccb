import math
from pathlib import Path

import autograd.numpy as anp
import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.parameters import parameter_table
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference import losses as reference
from moezoo.core.reference.routing import Routing
from moezoo.core.spec import (
    CommunicationBalanceLossSpec,
    DeviceBalanceLossSpec,
    ExpertBalanceLossSpec,
    GatedFeedForwardSpec,
    GlobalBalanceLossSpec,
    GroupedQueryAttentionSpec,
    HeterogeneousBalanceLossSpec,
    ImportanceLossSpec,
    LayerSpec,
    LoadLossSpec,
    ModelSpec,
    MoESpec,
    NoisyTopKChoiceSpec,
    PooledBalanceLossSpec,
    RouterSpec,
    RouterZLossSpec,
    SelectionBiasSpec,
    SequenceBalanceLossSpec,
    SwitchBalanceLossSpec,
    ZeroComputationSpec,
)
from moezoo.core.tokens import IGNORED
from tests.support.backends_available import require_backend
from tests.support.tolerances import FLOAT32, FLOAT64, assert_close
from tests.support.twins import B, D, K, P, T, Twin, V, assert_function_matches, assert_reference_gradient, normal

LOGITS_BTV = 3 * normal(0, B, T, V)
TARGET_BT = np.random.default_rng(1).integers(0, V, (B, T))

# Six choices, four of them with a feed-forward, in three groups of two.
CHOICES, FFN, DEVICES = 6, 4, 3
SWITCH = SwitchBalanceLossSpec(coefficient=0.01)
Z = RouterZLossSpec(coefficient=0.001)
EXPERT = ExpertBalanceLossSpec(coefficient=0.02)
DEVICE = DeviceBalanceLossSpec(coefficient=0.03, num_devices=DEVICES)
COMMUNICATION = CommunicationBalanceLossSpec(coefficient=0.04, num_devices=DEVICES, max_devices=2)
SEQUENCE = SequenceBalanceLossSpec(coefficient=0.05)
GLOBAL = GlobalBalanceLossSpec(coefficient=0.06)
IMPORTANCE = ImportanceLossSpec(coefficient=0.07)
LOAD = LoadLossSpec(coefficient=0.08)
HETEROGENEOUS = HeterogeneousBalanceLossSpec(coefficient=0.09)
POOLED = PooledBalanceLossSpec(coefficient=0.1)
EVERY = (SWITCH, Z, EXPERT, DEVICE, COMMUNICATION, SEQUENCE, GLOBAL, IMPORTANCE, LOAD, HETEROGENEOUS, POOLED)

# For each loss, the fields of a Routing that have a gradient.
FIELDS = {
    "router_z": ("logits_PE",),
    "pooled_balance": ("logits_PE",),
    "importance": ("weight_PK",),
    "load": ("logits_PE", "clean_logits_PE", "noise_scale_PE"),
}


def kind_of(loss) -> str:
    return loss.kind


def a_moe(top_k: int = K, score: str = "softmax", losses=()) -> MoESpec:
    return MoESpec(
        num_experts=FFN,
        zero_computation=ZeroComputationSpec(num_zero=1, num_copy=1, ffn_share=0.75),
        router=RouterSpec(
            top_k=top_k,
            score=score,
            choice=NoisyTopKChoiceSpec(),
            weight="softmax_of_chosen" if score == "none" else "score",
        ),
        experts=GatedFeedForwardSpec(hidden_dim=3),
        losses=losses,
    )


def routing_of(logits_PE, top_k: int = K, *, noise_PE=None, noise_scale_PE=None, score: str = "softmax") -> Routing:
    """Return a differentiable top-k routing of these logits, written out."""
    noisy_PE = logits_PE if noise_PE is None else logits_PE + noise_PE * noise_scale_PE
    exp_PE = anp.exp(noisy_PE - anp.max(noisy_PE, axis=-1, keepdims=True))
    softmax_PE = exp_PE / anp.sum(exp_PE, axis=-1, keepdims=True)
    score_PE = {"softmax": softmax_PE, "sigmoid": 1 / (1 + anp.exp(-noisy_PE)), "none": noisy_PE}[score]
    expert_PK = anp.argsort(-noisy_PE, axis=-1, kind="stable")[:, :top_k]
    weight_PK = softmax_PE[np.arange(len(expert_PK))[:, None], expert_PK]
    valid_PK = np.ones(expert_PK.shape, bool)
    clean_PE = None if noise_PE is None else logits_PE
    return Routing(
        expert_PK,
        valid_PK,
        weight_PK,
        score_PE,
        noisy_PE,
        noisy_PE,
        clean_PE,
        noise_scale_PE,
        None,
        None,
        None,
        np.ones(P),
    )


def a_routing(seed: int = 5, score: str = "softmax") -> Routing:
    """Return a random routing with noise, and with an unused slot."""
    noise_scale_PE = 0.1 + np.abs(normal(seed + 2, P, CHOICES))
    routing = routing_of(
        normal(seed, P, CHOICES), noise_PE=normal(seed + 1, P, CHOICES), noise_scale_PE=noise_scale_PE, score=score
    )
    routing.valid_PK[3, -1], routing.weight_PK[3, -1] = False, 0.0
    return routing


def sent_to(experts, num_choices: int = CHOICES, strength: float = 40.0) -> Routing:
    """Route each token to these experts, with all of its probability (logits 0, and `strength` where chosen)."""
    experts = np.asarray(experts)
    logits_PE = np.zeros((len(experts), num_choices))
    np.put_along_axis(logits_PE, experts, strength, axis=1)
    return routing_of(logits_PE, experts.shape[1])


def on_device(twin, routing: Routing):
    fields = routing._asdict()
    del fields["margin_P"]
    fields = {name: None if value is None else twin.array(value) for name, value in fields.items()}
    return twin.module("routing").Routing(**fields)


def model_of(*layer_losses, num_experts: int = 8) -> ModelSpec:
    """Return a model with one MoE layer for each tuple of losses."""
    attention = GroupedQueryAttentionSpec(num_heads=1, num_kv_heads=1, head_dim=2)
    layers = [
        LayerSpec(
            attention=attention,
            moe=MoESpec(
                num_experts=num_experts,
                router=RouterSpec(top_k=2),
                experts=GatedFeedForwardSpec(hidden_dim=3),
                losses=of_layer,
            ),
        )
        for of_layer in layer_losses
    ]
    return ModelSpec(vocab_size=V, embed_dim=D, layers=tuple(layers))


def twins_terms(twin, spec, routings, **options):
    return twin.module("losses").loss_terms(
        spec, twin.array(LOGITS_BTV), twin.array(TARGET_BT), [on_device(twin, each) for each in routings], **options
    )


def test_token_losses_and_their_gradient_match_the_reference(twin):
    target_BT = twin.array(TARGET_BT)
    assert_function_matches(
        twin,
        lambda logits: twin.module("losses").token_losses(logits, target_BT),
        lambda logits: reference.token_losses(logits, TARGET_BT),
        LOGITS_BTV,
    )


@pytest.mark.parametrize("positions", [1, 3, T, 1000])
def test_token_losses_are_the_same_over_few_positions_at_once(monkeypatch, positions):
    """JAX: chunks that divide the length, that leave a rest, and that exceed it."""
    require_backend("jax")
    twin = Twin("jax")
    monkeypatch.setattr(twin.module("losses"), "PART", positions * B * V)
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


def test_a_masked_target_has_no_loss_and_no_gradient(twin):
    target_BT = np.where(np.arange(T) % 2 == 1, TARGET_BT, IGNORED)
    target_BT[0] = IGNORED
    for name in ("token_losses", "cross_entropy"):
        assert_function_matches(
            twin,
            lambda logits, name=name: getattr(twin.module("losses"), name)(logits, twin.array(target_BT)),
            lambda logits, name=name: getattr(reference, name)(logits, target_BT),
            LOGITS_BTV,
        )
    of_token = reference.token_losses(LOGITS_BTV, target_BT)
    assert not of_token[target_BT == IGNORED].any()
    counted = reference.token_losses(LOGITS_BTV, TARGET_BT)[target_BT != IGNORED]
    assert_close(reference.cross_entropy(LOGITS_BTV, target_BT), counted.mean(), FLOAT64)


def test_logits_of_ten_thousand_give_a_finite_loss(twin):
    value = twin.module("losses").token_losses(twin.array(1e4 * LOGITS_BTV), twin.array(TARGET_BT))
    assert_close(twin.numpy(value), reference.token_losses(1e4 * LOGITS_BTV, TARGET_BT), FLOAT32)


# --- value and gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "score"),
    [*((loss, "softmax") for loss in EVERY), (SEQUENCE, "sigmoid"), (SWITCH, "none")],
    ids=lambda value: getattr(value, "kind", value),
)
def test_auxiliary_losses_and_their_gradients_match_the_reference(twin, loss, score):
    moe, routing = a_moe(score=score), a_routing(score=score)
    others = on_device(twin, routing)
    fields = FIELDS.get(loss.kind, ("logits_PE",) if score == "none" else ("score_PE",))

    def of(module, routing, values):
        return module.auxiliary_loss(loss, moe, routing._replace(**dict(zip(fields, values, strict=True))), (B, T))

    assert_function_matches(
        twin,
        lambda *values: of(twin.module("losses"), others, values),
        lambda *values: of(reference, routing, values),
        *(getattr(routing, field) for field in fields),
    )


@pytest.mark.parametrize("loss", EVERY, ids=kind_of)
def test_reference_gradient_agrees_with_finite_differences(loss):
    """Through score and weight to the logits; for the load loss through the noise scale as well."""
    moe, noise_PE = a_moe(), normal(1, P, CHOICES)
    scale_PE = 0.1 + np.abs(normal(2, P, CHOICES))

    def of_logits(logits_PE):
        return reference.auxiliary_loss(loss, moe, routing_of(logits_PE), (B, T))

    def with_noise(logits_PE, scale_PE):
        routing = routing_of(logits_PE, noise_PE=noise_PE, noise_scale_PE=scale_PE)
        return reference.auxiliary_loss(loss, moe, routing, (B, T))

    if loss is not LOAD:  # without noise the load is a count
        assert_reference_gradient(of_logits, normal(5, P, CHOICES))
    assert_reference_gradient(with_noise, normal(5, P, CHOICES), scale_PE)


def test_reference_gradient_of_token_losses_agrees_with_finite_differences():
    assert_reference_gradient(lambda logits: reference.token_losses(logits, TARGET_BT), LOGITS_BTV)
    ignored_BT = np.where(np.arange(T) == 2, IGNORED, TARGET_BT)
    assert_reference_gradient(lambda logits: reference.cross_entropy(logits, ignored_BT), LOGITS_BTV)


# --- known answers ---------------------------------------------------------------------------------------------------

TOKENS = np.arange(4 * B * CHOICES)[:, None]  # four times each expert in each of B sequences
EVEN = (TOKENS + np.array([0, 2])) % CHOICES  # two groups each
ON_ONE = np.tile([[0]], (len(TOKENS), 1))
ON_LAST = np.tile([[CHOICES - 1]], (len(TOKENS), 1))
ON_TWO = np.tile([[0, 1]], (len(TOKENS), 1))  # of one group
ON_TWO_DEVICES = np.tile([[0, 2]], (len(TOKENS), 1))
THREE_TO_FOUR = np.tile(np.repeat(np.arange(6), [3, 3, 3, 3, 4, 4])[:, None], (B, 1))  # a share of 3/4 for the first 4


@pytest.mark.parametrize(
    ("loss", "experts", "expected"),
    [
        (SWITCH, EVEN, 1.0),
        (SWITCH, EVEN[:, :1], 1.0),
        (SWITCH, ON_ONE, 6.0),
        (SWITCH, ON_TWO, 6 / 2),
        (EXPERT, EVEN, 1.0),
        (EXPERT, ON_TWO, 6 / 2),
        (GLOBAL, EVEN, 1.0),
        (GLOBAL, ON_TWO, 6 / 2),
        (SEQUENCE, EVEN, 1.0),
        (SEQUENCE, ON_TWO, 6 / 2),
        (DEVICE, EVEN, 1.0),
        (DEVICE, ON_TWO, 3 / 1),
        (DEVICE, ON_TWO_DEVICES, 3 / 2),
        (COMMUNICATION, EVEN, 1.0),
        (COMMUNICATION, EVEN[:, :1], 1 / 2),  # balanced, and sent to one group of the two allowed
        (COMMUNICATION, ON_TWO_DEVICES, 3 / 2),
        (COMMUNICATION, ON_TWO, 3 / 2),  # sent once, to one group
        (IMPORTANCE, EVEN, 0.0),
        (IMPORTANCE, ON_ONE, 6 - 1),
        (IMPORTANCE, ON_TWO, 6 / 2 - 1),
        (LOAD, EVEN, 0.0),
        (LOAD, ON_ONE, 6 - 1),
        (LOAD, ON_TWO, 6 / 2 - 1),
        (HETEROGENEOUS, THREE_TO_FOUR, 1.0),
        (HETEROGENEOUS, ON_ONE, 4 + 2 / 0.75),
        (HETEROGENEOUS, ON_LAST, 4 * 0.75 + 2),
        (POOLED, EVEN, 2.0),
        (POOLED, EVEN[:, :1], 1.0),
        (POOLED, ON_TWO, 6.0),
        (POOLED, ON_ONE, 6.0),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_balanced_and_collapsed_routing_have_their_known_values(twin, loss, experts, expected):
    routing, shape = sent_to(experts), (B, len(experts) // B)
    moe = a_moe(experts.shape[1])
    value = reference.auxiliary_loss(loss, moe, routing, shape)
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-12)
    value = twin.module("losses").auxiliary_loss(loss, moe, on_device(twin, routing), shape)
    np.testing.assert_allclose(twin.numpy(value), expected, rtol=FLOAT32.relative, atol=FLOAT32.relative)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balanced_routing_scores_one_for_every_k(top_k):
    routing = sent_to((np.arange(7)[:, None] + np.arange(top_k)) % 7, 7)
    assert_close(reference.switch_balance(reference.expert_counts(routing), routing.score_PE), 1.0, FLOAT64)


def test_z_loss_of_equal_logits_is_the_squared_log_of_their_number(twin):
    zeros = routing_of(np.zeros((P, CHOICES)))
    value = twin.module("losses").router_z(on_device(twin, zeros))
    assert_close(twin.numpy(value), math.log(CHOICES) ** 2, FLOAT32)


def test_layers_collapsed_onto_different_experts_look_balanced_only_if_pooled(twin):
    """The numbers in Hugging Face's normalization, for logits of 8 and 0: 7.99 for each layer, 2.000 pooled."""
    routings = [sent_to(np.tile([2 * layer, 2 * layer + 1], (P, 1)), 8, strength=8.0) for layer in range(4)]
    terms = twins_terms(twin, model_of(*[(POOLED, SWITCH)] * 4), routings)
    for layer in range(4):
        assert round(float(terms[f"layers.{layer}.pooled_balance"]), 2) == 7.99
        assert round(float(terms[f"layers.{layer}.switch_balance"]), 2) == 4.00
    assert round(float(terms["pooled_balance"]), 5) == 2.0
    assert_close(twin.numpy(terms["pooled_balance_weighted"]), 0.1 * 2.0, FLOAT32)
    assert_close(twin.numpy(terms["switch_balance_weighted"]), 4 * 0.01 * 7.99196 / 2, FLOAT32)


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3_moe", "olmoe", "gpt_oss", "ernie4_5_moe", "minimax_m2", "granitemoe"]
)
def test_pooled_balance_is_what_transformers_computes(twin, family):
    """`aux_loss` of tiny models of seven families, with softmax and sigmoid routers, made by transformers 5.23."""
    with np.load(Path(__file__).parents[1] / "data" / "pooled_balance.npz") as data:
        layers, expected = data[f"{family}.router_logits"], data[f"{family}.aux_loss"]
    assert_close(reference.pooled_balance(list(layers.astype(np.float64)), 2), expected, FLOAT32)
    value = twin.module("losses").pooled_balance([twin.array(logits_PE) for logits_PE in layers], 2)
    assert_close(twin.numpy(value), expected, FLOAT32)


# --- what each loss detects ------------------------------------------------------------------------------------------


def table_of_what_each_sees() -> list[list[str]]:
    """Rows of the table in writings/losses.md, with its header."""
    page = (Path(__file__).parents[2] / "writings" / "losses.md").read_text(encoding="utf-8")
    lines = page[page.index("| what the routers do |") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [rows[0], *rows[2:]]


SITUATIONS = {  # the experts of a token, by layer, micro-batch, sequence and position
    "all experts are used evenly": lambda layer, micro, sequence, token: (token, (token + 2) % 8),
    "two experts take all": lambda layer, micro, sequence, token: (0, 4),
    "two experts a sequence, each its own two": lambda layer, micro, sequence, token: (sequence, sequence + 4),
    "two experts a micro-batch, each its own two": lambda layer, micro, sequence, token: (micro, micro + 4),
    "two experts a layer, each its own two": lambda layer, micro, sequence, token: (layer, layer + 4),
    "one expert a device takes all of the device's": lambda layer, micro, sequence, token: (
        2 * (token % 4),
        2 * ((token + 1) % 4),
    ),
}


@pytest.mark.parametrize("row", table_of_what_each_sees()[1:], ids=lambda row: row[0])
def test_the_page_on_losses_says_what_each_detects(row):
    layers, micros, sequences, length = 4, 4, 4, 8
    device = {"coefficient": 1.0, "num_devices": 4}
    losses = [
        SWITCH,
        SEQUENCE,
        GLOBAL,
        DeviceBalanceLossSpec(**device),
        CommunicationBalanceLossSpec(**device, max_devices=2),
        POOLED,
    ]
    assert table_of_what_each_sees()[0][1:] == [loss.kind for loss in losses]
    spec = model_of(*[tuple(losses)] * layers)
    tokens_BT = np.zeros((sequences, length), int)
    step = [
        [
            sent_to([SITUATIONS[row[0]](layer, micro, *place) for place in np.ndindex(tokens_BT.shape)], 8)
            for layer in range(layers)
        ]
        for micro in range(micros)
    ]
    loads = [sum(reference.expert_counts(micro[layer]) for micro in step) for layer in range(layers)]
    logits_BTV = np.zeros((sequences, length, V))
    terms = [reference.loss_terms(spec, logits_BTV, tokens_BT, micro, global_load=loads) for micro in step]
    values = [np.mean([of_micro[loss.kind] for of_micro in terms]) for loss in losses]
    np.testing.assert_allclose(values, [float(cell) for cell in row[1:]], rtol=1e-12)


def test_only_sequence_balance_detects_sequences_that_collapse_onto_different_experts(twin):
    routing = sent_to(np.repeat([[0, 1], [2, 3], [4, 5]], 4, axis=0))
    others, moe = on_device(twin, routing), a_moe()
    auxiliary_loss = twin.module("losses").auxiliary_loss
    assert_close(twin.numpy(auxiliary_loss(SWITCH, moe, others, (3, 4))), 1.0, FLOAT32)
    assert_close(twin.numpy(auxiliary_loss(SEQUENCE, moe, others, (3, 4))), 3.0, FLOAT32)


def test_sequence_balance_counts_the_highest_scores_not_the_biased_choices(twin):
    routing = sent_to(ON_TWO)
    biased = routing._replace(expert_PK=EVEN)
    moe, shape = a_moe(), (B, len(TOKENS) // B)
    value = twin.module("losses").auxiliary_loss(SEQUENCE, moe, on_device(twin, biased), shape)
    assert_close(twin.numpy(value), 3.0, FLOAT32)


def test_device_balance_ignores_imbalance_within_a_device():
    routing = sent_to(np.tile([[0], [2], [4]], (5, 1)))
    moe = a_moe(1)
    assert_close(reference.auxiliary_loss(DEVICE, moe, routing, (3, 5)), 1.0, FLOAT64)
    assert_close(reference.auxiliary_loss(EXPERT, moe, routing, (3, 5)), 2.0, FLOAT64)


def test_global_balance_of_parts_is_exactly_the_balance_of_the_whole(twin):
    """With the counts of the whole step. With its own counts, each part would have to be balanced by itself."""
    module, moe = twin.module("losses"), a_moe()
    whole, half = routing_of(normal(0, 12, CHOICES)), [routing_of(part) for part in np.split(normal(0, 12, CHOICES), 2)]
    load_E = twin.module("dispatch").expert_counts(on_device(twin, whole))
    parts = [
        twin.numpy(module.auxiliary_loss(GLOBAL, moe, on_device(twin, each), (2, 3), load_E=load_E)) for each in half
    ]
    expected = reference.auxiliary_loss(SWITCH, moe, whole, (4, 3))
    assert_close(np.mean(parts), expected, FLOAT32)
    alone = [reference.auxiliary_loss(GLOBAL, moe, each, (2, 3)) for each in half]
    assert abs(np.mean(alone) - expected) > 0.01


def test_load_with_little_noise_is_the_count(twin):
    logits_PE = normal(0, P, CHOICES)
    little = routing_of(logits_PE, noise_PE=np.zeros((P, CHOICES)), noise_scale_PE=np.full((P, CHOICES), 1e-6))
    load = twin.module("losses").load
    expected = reference.squared_variation(reference.expert_counts(little))
    assert_close(twin.numpy(load(on_device(twin, little), K)), expected, FLOAT32)
    assert_close(twin.numpy(load(on_device(twin, routing_of(logits_PE)), K)), expected, FLOAT32)


def test_unused_slots_are_not_counted(twin):
    routing = a_routing()
    load_E = twin.numpy(twin.module("dispatch").expert_counts(on_device(twin, routing)))
    np.testing.assert_array_equal(load_E, reference.expert_counts(routing))
    assert load_E.sum() == P * K - 1


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "none"])
def test_probabilities_of_a_token_sum_to_one(twin, score):
    value = twin.module("losses").probabilities(a_moe(score=score).router, on_device(twin, a_routing(score=score)))
    assert_close(np.sum(twin.numpy(value), axis=-1), np.ones(P), FLOAT32)


# --- terms -----------------------------------------------------------------------------------------------------------


def test_loss_terms_match_the_reference_where_layers_have_different_losses(twin):
    spec = model_of((SWITCH, Z), (POOLED, GLOBAL), (Z,), (SwitchBalanceLossSpec(coefficient=0.5), POOLED))
    routings = [routing_of(normal(i, P, 8)) for i in range(4)]
    load = [np.arange(8) + layer for layer in range(4)]
    index = [(1, 0.3, 2.5), (2, 0.1, 4.0)]
    expected = reference.loss_terms(spec, LOGITS_BTV, TARGET_BT, routings, index_losses=index, global_load=load)
    actual = twins_terms(twin, spec, routings, index_losses=index, global_load=[twin.array(load_E) for load_E in load])
    assert list(actual) == list(expected)
    for name, value in expected.items():
        actual_value = actual[name] if isinstance(actual[name], float) else twin.numpy(actual[name])
        assert_close(actual_value, value, FLOAT32, name)


def test_loss_is_the_sum_and_a_term_the_mean_over_layers_that_have_it():
    spec = model_of((SWITCH, Z), (), (Z,), (SwitchBalanceLossSpec(coefficient=0.5),))
    routings = [routing_of(normal(i, P, 8)) for i in range(4)]
    terms = reference.loss_terms(spec, LOGITS_BTV, TARGET_BT, routings, index_losses=[(2, 0.3, 2.5), (3, 0.1, 4.0)])
    balance = [reference.switch_balance(reference.expert_counts(routings[i]), routings[i].score_PE) for i in (0, 3)]
    z = [reference.router_z(routings[i]) for i in (0, 2)]
    expected = {
        "switch_balance": np.mean(balance),
        "switch_balance_weighted": 0.01 * balance[0] + 0.5 * balance[1],
        "layers.0.switch_balance": balance[0],
        "layers.3.switch_balance": balance[1],
        "router_z": np.mean(z),
        "router_z_weighted": 0.001 * (z[0] + z[1]),
        "layers.0.router_z": z[0],
        "layers.2.router_z": z[1],
        "index": 3.25,
        "index_weighted": 0.3 * 2.5 + 0.1 * 4.0,
        "layers.2.index": 2.5,
        "layers.3.index": 4.0,
    }
    assert list(terms) == ["loss", "cross_entropy", *expected]
    for name, value in expected.items():
        assert_close(terms[name], value, FLOAT64, name)
    weighted = sum(value for name, value in terms.items() if name.endswith("_weighted"))
    assert_close(terms["loss"], terms["cross_entropy"] + weighted, FLOAT64)


def test_only_trained_parameters_have_gradients():
    spec = model_of((SWITCH,))
    moe = spec.layers[0].moe
    router = moe.router.model_copy(update={"selection_bias": SelectionBiasSpec()})
    layer = spec.layers[0].model_copy(update={"moe": moe.model_copy(update={"router": router})})
    spec = spec.model_copy(update={"layers": (layer,)})
    weights = {name: value.astype(np.float64) for name, value in initial_weights(spec, 0).items()}
    terms, gradients = reference.loss_and_gradients(spec, weights, TARGET_BT, TARGET_BT)
    assert set(gradients) == {row.name for row in parameter_table(spec) if row.trained}
    assert "layers.0.moe.router.selection_bias" in weights.keys() - gradients.keys()
    assert math.isfinite(terms["loss"])


# --- errors ----------------------------------------------------------------------------------------------------------


def raw_moe(*losses, **router):
    router = {"top_k": K, **router}
    return {"num_experts": CHOICES, "router": router, "experts": {"hidden_dim": 4}, "losses": list(losses)}


def test_a_loss_named_twice_is_refused():
    with pytest.raises(SpecError, match=r"losses has a duplicate: router_z, router_z \(config\). Use each loss once"):
        validate(MoESpec, raw_moe(*[{"kind": "router_z", "coefficient": 0.1}] * 2), "config")


def test_an_unknown_loss_is_refused_with_the_nearest_known_one():
    with pytest.raises(SpecError, match=r"losses\[0\].kind is 'switch_balanced'; did you mean switch_balance\?"):
        validate(MoESpec, raw_moe({"kind": "switch_balanced", "coefficient": 0.1}), "config")


def test_a_load_that_cannot_differ_is_refused():
    raw = raw_moe({"kind": "load", "coefficient": 0.1}, top_k=CHOICES, choice={"kind": "noisy_top_k"})
    with pytest.raises(SpecError, match=r"losses\[0\] is load, but with top_k 6 every expert gets every token"):
        validate(MoESpec, raw, "config")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"losses": [{"kind": "pooled_balance", "coefficient": 0.2}]},
            "coefficient of pooled_balance is 0.2 here and 0.1",
        ),
        ({"num_experts": 7}, "experts is 7 here and 6"),
        ({"router": {"top_k": 1}}, "top_k is 1 here and 2"),
    ],
)
def test_layers_that_cannot_be_pooled_are_refused(change, problem):
    moe = raw_moe({"kind": "pooled_balance", "coefficient": 0.1})
    attention = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 2}
    layers = [{"attention": attention, "moe": moe}, {"attention": attention, "moe": moe | change}]
    with pytest.raises(SpecError, match=rf"layers\[1\].moe.losses has pooled_balance.*{problem} in layers\[0\]"):
        validate(ModelSpec, {"vocab_size": V, "embed_dim": D, "layers": layers}, "config")
