import numpy as np
import pytest

from moezoo.core.errors import CheckpointError, DataError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.losses import loss_and_gradients, loss_terms
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import (
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    NoPositionSpec,
    PrecisionSpec,
    RMSNormSpec,
    RouterSpec,
    RouterZLossSpec,
    SharedExpertsSpec,
    SwitchBalanceLossSpec,
    TiedHeadSpec,
    UntiedHeadSpec,
)
from moezoo.core.tokens import IGNORED, NOT_REPLAYED, ExpertMasks
from tests.support.tolerances import (
    BFLOAT16,
    BFLOAT16_GRADIENT,
    BFLOAT16_LOSS,
    EXACT,
    FINITE_DIFFERENCE,
    FLOAT32,
    FLOAT32_GRADIENT,
    assert_all_close,
    assert_close,
)
from tests.support.twins import B, D, E, F, H, K, M, N, P, T, V, normal

ATTENTION = GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H)
RICH_ATTENTION = GroupedQueryAttentionSpec(
    num_heads=N,
    num_kv_heads=M,
    head_dim=H,
    position=NoPositionSpec(),
    qk_norm=RMSNormSpec(),
    qkv_bias=True,
    output_bias=True,
)
MOE = MoESpec(
    num_experts=E,
    router=RouterSpec(top_k=K),
    experts=GatedFeedForwardSpec(hidden_dim=F),
    shared=SharedExpertsSpec(hidden_dim=9),
    losses=(SwitchBalanceLossSpec(coefficient=0.01), RouterZLossSpec(coefficient=0.001)),
)
SPEC = ModelSpec(
    vocab_size=V,
    embed_dim=D,
    layers=(
        LayerSpec(attention=ATTENTION, feed_forward=GatedFeedForwardSpec(hidden_dim=F)),
        LayerSpec(attention=RICH_ATTENTION, moe=MOE),
    ),
    head=UntiedHeadSpec(bias=True),
)
TIED = SPEC.model_copy(update={"head": TiedHeadSpec(bias=True)})
TOKENS_BT = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
TARGET_BT = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)


def weights_of(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Ten times the usual initial weights, and biases and scales that are not 0 and 1, so that every term counts."""
    weights = {name: 10 * value for name, value in initial_weights(spec, seed=0).items()}
    for number, (name, value) in enumerate(weights.items()):
        if name.endswith((".scale", ".b_query", ".b_key", ".b_value", ".b_output", ".b_head")):
            weights[name] = (0.5 + 0.2 * normal(number, *value.shape)).astype(np.float32)
    return weights


WEIGHTS = weights_of(SPEC)


def in_float64(weights) -> dict[str, np.ndarray]:
    return {name: value.astype(np.float64) for name, value in weights.items()}


@pytest.fixture(scope="module")
def model(twin):
    return twin.backend().build(SPEC, WEIGHTS)


@pytest.fixture(scope="module")
def output(model):
    return model.forward(TOKENS_BT, TARGET_BT, record=True)


@pytest.fixture(scope="module")
def recorded_by_reference():
    record = {}
    forward(SPEC, in_float64(WEIGHTS), TOKENS_BT, record=record)
    return record


def test_logits_and_routing_match_the_reference(output):
    logits_BTV, routings, _ = forward(SPEC, in_float64(WEIGHTS), TOKENS_BT)
    assert output.logits.dtype == np.float32
    assert_close(output.logits, logits_BTV, FLOAT32)
    assert [routing.layer for routing in output.routing] == [1]
    np.testing.assert_array_equal(output.routing[0].expert, routings[0].expert_PK.reshape(B, T, K))
    assert_close(output.routing[0].weight, routings[0].weight_PK.reshape(B, T, K), FLOAT32)
    assert_close(output.routing[0].score, routings[0].score_PE.reshape(B, T, E), FLOAT32)


def test_intermediates_have_the_references_names_order_and_values(output, recorded_by_reference):
    assert sorted(output.intermediates) == sorted(recorded_by_reference)
    assert_all_close(output.intermediates, recorded_by_reference, FLOAT32)


def test_losses_and_gradients_match_the_reference(model, output):
    expected_losses, expected_gradients = loss_and_gradients(SPEC, in_float64(WEIGHTS), TOKENS_BT, TARGET_BT)
    losses, gradients = model.loss_and_gradients(TOKENS_BT, TARGET_BT)
    assert_all_close(losses, expected_losses, FLOAT32)
    assert_all_close(output.losses, expected_losses, FLOAT32)
    assert_all_close(gradients, expected_gradients, FLOAT32_GRADIENT)


def test_targets_that_do_not_count_leave_auxiliary_losses_as_they_are(model, output):
    target_BT = np.where(np.arange(T) == T - 1, IGNORED, TARGET_BT).astype(np.int32)
    target_BT[0, 0] = IGNORED
    expected_losses, expected_gradients = loss_and_gradients(SPEC, in_float64(WEIGHTS), TOKENS_BT, target_BT)
    losses, gradients = model.loss_and_gradients(TOKENS_BT, target_BT)
    assert_all_close(losses, expected_losses, FLOAT32)
    assert_all_close(gradients, expected_gradients, FLOAT32_GRADIENT)
    assert losses["switch_balance"] == output.losses["switch_balance"]
    counted = model.score(TOKENS_BT, target_BT).token_losses[target_BT != IGNORED]
    assert_close(counted.mean(), losses["cross_entropy"], FLOAT32)


def test_a_batch_without_a_target_that_counts_is_refused(model):
    nothing = np.full((B, T), IGNORED, np.int32)
    for call in (model.forward, model.loss_and_gradients):
        with pytest.raises(DataError, match="all targets are masked; got 15 targets"):
            call(TOKENS_BT, nothing)
    with pytest.raises(DataError, match="-1 is allowed as a target only; got it as an input token"):
        model.forward(np.where(np.arange(T) == 0, IGNORED, TOKENS_BT), TARGET_BT)


def test_score_returns_routing_if_asked_and_takes_forced_routing(model, output):
    (own,) = model.score(TOKENS_BT, TARGET_BT, routing=True).routing
    for name in ("expert", "weight", "score", "selection", "dropped"):
        assert_close(getattr(own, name), getattr(output.routing[0], name), EXACT, name)
    _, routings, _ = forward(SPEC, in_float64(WEIGHTS), TOKENS_BT)
    assert_close(own.selection, routings[0].selection_PE.reshape(B, T, E), FLOAT32)
    forced = np.where(np.arange(T)[:, None] % 2, NOT_REPLAYED, own.expert[..., ::-1]).astype(np.int32)
    scores = model.score(TOKENS_BT, TARGET_BT, forced=[forced], routing=True)
    assert_close(scores.token_losses, model.score(TOKENS_BT, TARGET_BT).token_losses, FLOAT32)
    other = (own.expert + 1) % E
    moved = model.score(TOKENS_BT, TARGET_BT, forced=[other], routing=True)
    np.testing.assert_array_equal(np.sort(moved.routing[0].expert), np.sort(other))
    expected = model.forward(TOKENS_BT, TARGET_BT, forced=[other]).losses["cross_entropy"]
    assert_close(moved.token_losses.mean(), expected, FLOAT32)
    for wrong, message in (
        ([forced, forced], "is of 2 layers"),
        ([forced[0]], r"is \[5, 2\]"),
        ([forced + E], "has expert"),
    ):
        with pytest.raises(DataError, match=message):
            model.score(TOKENS_BT, TARGET_BT, forced=wrong)


def test_score_is_the_loss_of_each_token_and_counts_each_choice(model, output):
    scores = model.score(TOKENS_BT, TARGET_BT)
    assert scores.token_losses.shape == (B, T)
    assert_close(scores.token_losses.mean(), output.losses["cross_entropy"], FLOAT32)
    counts = np.bincount(output.routing[0].expert.reshape(-1), minlength=E)
    np.testing.assert_array_equal(scores.load[0], counts)
    assert scores.dropped == [0]


def test_forced_experts_are_used_forward_and_backward(model):
    forced = np.random.default_rng(3).permuted(np.tile(np.arange(E), (P, 1)), axis=1)[:, :K].astype(np.int32)
    losses, gradients = model.loss_and_gradients(TOKENS_BT, TARGET_BT, forced=[forced.reshape(B, T, K)])
    expected_losses, expected = loss_and_gradients(SPEC, in_float64(WEIGHTS), TOKENS_BT, TARGET_BT, forced=[forced])
    assert_all_close(losses, expected_losses, FLOAT32)
    assert_all_close(gradients, expected, FLOAT32_GRADIENT)


def test_each_sequence_does_without_its_own_experts(model, output):
    """Bit for bit: silencing an expert is zeroing its weights, and a sequence without a mask is as it was."""
    silenced_BE, excluded_BE = np.zeros((B, E), bool), np.zeros((B, E), bool)
    silenced_BE[1, [2, 5]] = excluded_BE[2, [0, 3, 4]] = True
    masks = [ExpertMasks(silenced_BE, excluded_BE)]
    masked = model.forward(TOKENS_BT, TARGET_BT, record=True, masks=masks)
    expected = forward(SPEC, in_float64(WEIGHTS), TOKENS_BT, masks=masks)
    assert_close(masked.logits, expected.logits_BTV, FLOAT32)
    np.testing.assert_array_equal(masked.logits[0], output.logits[0])
    assert np.isin(output.routing[0].expert[2], [0, 3, 4]).any()
    assert not np.isin(masked.routing[0].expert[2], [0, 3, 4]).any()
    zeroed = {name: WEIGHTS[name].copy() for name in WEIGHTS if ".experts." in name}
    for value in zeroed.values():
        value[[2, 5]] = 0
    model.set_parameters(zeroed)
    without = model.forward(TOKENS_BT, TARGET_BT, record=True)
    model.set_parameters({name: WEIGHTS[name] for name in zeroed})
    assert np.any(without.logits[1] != output.logits[1])
    np.testing.assert_array_equal(masked.logits[1], without.logits[1])


def test_later_tokens_and_other_sequences_are_invisible(model, output):
    changed = TOKENS_BT.copy()
    changed[:, -1] = (changed[:, -1] + 1) % V
    changed[2] = (changed[2] + 1) % V
    logits = model.forward(changed, TARGET_BT, record=True).logits
    assert_close(logits[:2, :-1], output.logits[:2, :-1], FLOAT32)
    assert np.all(np.max(np.abs(logits[:2, -1] - output.logits[:2, -1]), axis=-1) > 1e-2)


def test_permuting_experts_changes_nothing_visible(twin, output):
    order = np.array([3, 0, 6, 2, 5, 1, 4])
    permuted = dict(WEIGHTS)
    for name, value in WEIGHTS.items():
        if "router" in name:
            permuted[name] = value[:, order]
        elif ".experts." in name:
            permuted[name] = value[order]
    other = twin.backend().build(SPEC, permuted).forward(TOKENS_BT, TARGET_BT, record=True)
    assert_close(other.logits, output.logits, FLOAT32)
    np.testing.assert_array_equal(order[other.routing[0].expert], output.routing[0].expert)
    for name, value in output.losses.items():
        assert_close(other.losses[name], value, FLOAT32, name)


def test_gradient_of_a_tied_embedding_has_both_its_uses(twin):
    weights = weights_of(TIED)
    expected_losses, expected = loss_and_gradients(TIED, in_float64(weights), TOKENS_BT, TARGET_BT)
    losses, gradients = twin.backend().build(TIED, weights).loss_and_gradients(TOKENS_BT, TARGET_BT)
    assert_all_close(losses, expected_losses, FLOAT32)
    assert_all_close(gradients, expected, FLOAT32_GRADIENT)
    unused = sorted(set(range(V)) - set(TOKENS_BT.reshape(-1).tolist()))
    assert np.all(np.any(gradients["embedding.weight"][unused] != 0, axis=1))


def test_dropless_model_drops_nothing_even_where_weights_underflow(twin):
    weights = dict(WEIGHTS)
    weights["layers.1.moe.router.w_router"] = 1000 * WEIGHTS["layers.1.moe.router.w_router"]
    model = twin.backend().build(SPEC, weights)
    assert np.any(model.forward(TOKENS_BT, TARGET_BT, record=True).routing[0].weight == 0)
    assert model.score(TOKENS_BT, TARGET_BT).dropped == [0]


def test_bfloat16_model_is_near_float32_forward_and_backward(twin):
    """With the reference's experts forced, so that a rounding does not decide who computes."""
    spec = SPEC.model_copy(update={"precision": PrecisionSpec(compute="bfloat16")})
    weights = {name: value * (0.3 if value.ndim > 1 else 1) for name, value in WEIGHTS.items()}
    _, routings, _ = forward(SPEC, in_float64(weights), TOKENS_BT)
    forced = [routing.expert_PK for routing in routings]
    model = twin.backend().build(spec, weights)
    output = model.forward(TOKENS_BT, forced=[forced[0].reshape(B, T, K).astype(np.int32)])
    assert output.logits.dtype == np.float32
    assert_close(output.logits, forward(SPEC, in_float64(weights), TOKENS_BT, forced=forced)[0], BFLOAT16)
    losses, gradients = model.loss_and_gradients(
        TOKENS_BT, TARGET_BT, forced=[forced[0].reshape(B, T, K).astype(np.int32)]
    )
    expected_losses, expected = loss_and_gradients(SPEC, in_float64(weights), TOKENS_BT, TARGET_BT, forced=forced)
    assert_all_close(losses, expected_losses, BFLOAT16_LOSS)
    assert all(gradient.dtype == np.float32 for gradient in gradients.values())
    assert_all_close(gradients, expected, BFLOAT16_GRADIENT)


def test_reference_gradient_agrees_with_finite_differences():
    """Of every parameter, along one random direction each: a central difference of the whole model's loss."""
    weights = in_float64(WEIGHTS)
    forced = [routing.expert_PK for routing in forward(SPEC, weights, TOKENS_BT)[1]]
    _, gradients = loss_and_gradients(SPEC, weights, TOKENS_BT, TARGET_BT, forced)
    for number, (name, value) in enumerate(weights.items()):
        direction = normal(number, *value.shape)
        ends = []
        for sign in (1, -1):
            moved = weights | {name: value + sign * 1e-5 * direction}
            logits_BTV, routings, _ = forward(SPEC, moved, TOKENS_BT, forced=forced)
            ends.append(loss_terms(SPEC, logits_BTV, TARGET_BT, routings)["loss"])
        expected = np.sum(gradients[name] * direction)
        scale = np.linalg.norm(gradients[name]) * np.linalg.norm(direction)
        difference = abs((ends[0] - ends[1]) / 2e-5 - expected)
        assert difference <= FINITE_DIFFERENCE.relative * scale + 1e-10, name


def test_weights_that_do_not_fit_are_all_named_at_once(twin):
    wrong = dict(WEIGHTS)
    del wrong["final_norm.scale"]
    wrong["layers.0.attention.w_outptu"] = np.zeros(3, np.float32)
    wrong["head.w_head"] = np.zeros((V, D), np.float32)
    with pytest.raises(CheckpointError) as error:
        twin.backend().build(SPEC, wrong)
    lines = [line.strip() for line in str(error.value).splitlines()]
    assert any(line.startswith("- final_norm.scale") for line in lines)
    assert any(line.startswith("+ layers.0.attention.w_outptu") for line in lines)
    assert any(line.startswith("~ head.w_head") for line in lines)
