import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.losses import loss_and_gradients
from moezoo.core.reference.normalization import rms_norm
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import (
    BlockFactorsSpec,
    CapacitySpec,
    DepthScaledResidualSpec,
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    NoAttentionSpec,
    RouterSpec,
    RouterZLossSpec,
    SharedExpertsSpec,
    SwitchBalanceLossSpec,
    UntiedHeadSpec,
)
from tests.support.tolerances import (
    FLOAT32,
    FLOAT32_GRADIENT,
    FLOAT64,
    assert_all_close,
    assert_close,
)
from tests.support.twins import B, D, E, F, H, K, M, N, P, T, V, normal

ATTENTION = GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H)
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
        LayerSpec(attention=ATTENTION, moe=MOE),
    ),
    head=UntiedHeadSpec(bias=True),
)
TOKENS_BT = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
TARGET_BT = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)


def weights_of(spec: ModelSpec) -> dict[str, np.ndarray]:
    """Ten times the usual initial weights, and biases and scales that are not 0 and 1, so that every term counts."""
    weights = {name: 10 * value for name, value in initial_weights(spec, seed=0).items()}
    for number, (name, value) in enumerate(weights.items()):
        if name.endswith((".scale", ".b_query", ".b_key", ".b_value", ".b_output", ".b_head")):
            weights[name] = (0.5 + 0.2 * normal(number, *value.shape)).astype(np.float32)
    return weights


def in_float64(weights) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float64) for name, value in weights.items()}


def test_dropped_token_passes_through_the_residual_unchanged(twin):
    """One expert serves ceil(0.3 * 15 / 1) = 5 of 15 tokens; the other ten leave the layer as they entered its MoE."""
    moe = MoESpec(
        num_experts=1,
        router=RouterSpec(top_k=1),
        experts=GatedFeedForwardSpec(hidden_dim=F),
        dispatch=CapacitySpec(factor=0.3),
    )
    spec = ModelSpec(vocab_size=V, embed_dim=D, layers=(LayerSpec(attention=ATTENTION, moe=moe),))
    model = twin.backend().build(spec, weights_of(spec))
    output = model.forward(TOKENS_BT, record=True)
    seen = output.intermediates
    before = seen["embedding"] + seen["layers.0.attention"]
    moved = np.max(np.abs(seen["layers.0"] - before), axis=-1).reshape(P)
    assert np.all(moved[:5] > 1e-3)
    np.testing.assert_array_equal(seen["layers.0.moe"].reshape(P, D)[5:], 0)
    assert_close(seen["layers.0"].reshape(P, D)[5:], before.reshape(P, D)[5:], FLOAT32)
    np.testing.assert_array_equal(output.routing[0].weight.reshape(P), [1.0] * 5 + [0.0] * 10)
    scores = model.score(TOKENS_BT, TARGET_BT)
    assert scores.dropped == [10]
    np.testing.assert_array_equal(scores.load[0], [P])


def test_the_mixture_of_a_shortcut_joins_at_the_end_of_the_next_layer(twin):
    """Two shortcuts in a row; the second layer's mixture joins behind the third, which has a mixture of its own."""
    both = LayerSpec(attention=ATTENTION, feed_forward=GatedFeedForwardSpec(hidden_dim=F), moe=MOE, shortcut=True)
    spec = SPEC.model_copy(update={"layers": (both, both, LayerSpec(attention=ATTENTION, moe=MOE))})
    weights = weights_of(spec)
    model = twin.backend().build(spec, weights)
    output = model.forward(TOKENS_BT, record=True)
    logits, routings, _ = forward(spec, in_float64(weights), TOKENS_BT)
    assert_close(output.logits, logits, FLOAT32)
    assert [each.layer for each in output.routing] == [0, 1, 2]
    for ours, expected in zip(output.routing, routings, strict=True):
        np.testing.assert_array_equal(ours.expert.reshape(P, K), expected.expert_PK)
    seen = output.intermediates
    x = seen["embedding"]
    for index, blocks in enumerate(
        (
            ("layers.0.attention", "layers.0.feed_forward"),
            ("layers.1.attention", "layers.1.feed_forward", "layers.0.moe"),
            ("layers.2.attention", "layers.2.moe", "layers.1.moe"),
        )
    ):
        x = x + sum(seen[block] for block in blocks)
        assert_close(seen[f"layers.{index}"], x, FLOAT32)
    _, cache = model.prefill(TOKENS_BT[:, :-1], T)
    assert_close(model.decode(TOKENS_BT[:, -1], cache)[0], logits[:, -1], FLOAT32)


def test_what_leaves_a_layer_is_scaled_by_a_number_that_is_not_trained(twin):
    layer = LayerSpec(attention=ATTENTION, feed_forward=GatedFeedForwardSpec(hidden_dim=F), output_scale=True)
    spec = SPEC.model_copy(update={"layers": (layer, layer)})
    assert initial_weights(spec, seed=0)["layers.1.output_scale"] == [1.0]
    weights = weights_of(spec) | {f"layers.{i}.output_scale": np.array([0.3 + i], np.float32) for i in range(2)}
    model = twin.backend().build(spec, weights)
    output = model.forward(TOKENS_BT, record=True)
    assert_close(output.logits, forward(spec, in_float64(weights), TOKENS_BT)[0], FLOAT32)
    seen = output.intermediates
    for index, before in ((0, "embedding"), (1, "layers.0")):
        stream = seen[before] + seen[f"layers.{index}.attention"] + seen[f"layers.{index}.feed_forward"]
        assert_close(seen[f"layers.{index}"], (0.3 + index) * stream, FLOAT32)
    _, gradients = loss_and_gradients(spec, in_float64(weights), TOKENS_BT, TARGET_BT)
    assert_all_close(model.loss_and_gradients(TOKENS_BT, TARGET_BT)[1], gradients, FLOAT32_GRADIENT)
    assert not [name for name in gradients if "output_scale" in name]


def test_a_depth_scaled_stream_is_the_sum_of_its_terms_over_the_root_of_their_number(twin):
    layer = LayerSpec(attention=ATTENTION, moe=MOE, repeat=2)
    spec = SPEC.model_copy(update={"layers": (layer,), "residual": DepthScaledResidualSpec()})
    weights = weights_of(spec)
    model = twin.backend().build(spec, weights)
    output = model.forward(TOKENS_BT, record=True)
    assert_close(output.logits, forward(spec, in_float64(weights), TOKENS_BT)[0], FLOAT32)
    seen, terms = output.intermediates, [output.intermediates["embedding"]]
    for index in range(2):
        terms += [seen[f"layers.{index}.attention"], seen[f"layers.{index}.moe"]]
        assert_close(seen[f"layers.{index}"], sum(terms) / np.sqrt(len(terms)), FLOAT32)
    _, gradients = loss_and_gradients(spec, in_float64(weights), TOKENS_BT, TARGET_BT)
    assert_all_close(model.loss_and_gradients(TOKENS_BT, TARGET_BT)[1], gradients, FLOAT32_GRADIENT)
    _, cache = model.prefill(TOKENS_BT[:, :-1], T)
    assert_close(model.decode(TOKENS_BT[:, -1], cache)[0], output.logits[:, -1], FLOAT32)


def test_a_norm_of_the_stream_itself_and_factors():
    """The backends' own is the combination delta_attention, in tests/parity."""
    factors = BlockFactorsSpec(stream=1.5, block=0.75), BlockFactorsSpec(stream=2.0)
    layer = LayerSpec(
        attention=ATTENTION,
        moe=MOE,
        norm_placement="stream",
        attention_factors=factors[0],
        feed_forward_factors=factors[1],
    )
    spec = SPEC.model_copy(update={"layers": (layer,)})
    weights, seen = in_float64(weights_of(spec)), {}
    forward(spec, weights, TOKENS_BT, record=seen)
    normed = rms_norm(seen["embedding"], weights["layers.0.attention_norm.scale"], 1e-6)
    middle = 1.5 * normed + 0.75 * seen["layers.0.attention"]
    normed = rms_norm(middle, weights["layers.0.feed_forward_norm.scale"], 1e-6)
    assert_close(seen["layers.0"], 2 * normed + seen["layers.0.moe"], FLOAT64)


def test_a_layer_with_two_feed_forwards_is_refused():
    layer = {
        "attention": {"num_heads": 8, "num_kv_heads": 2, "head_dim": 6},
        "feed_forward": {"hidden_dim": 4},
        "moe": {"num_experts": 2, "router": {"top_k": 1}, "experts": {"hidden_dim": 4}},
    }
    with pytest.raises(SpecError, match=r"layers\[0\] has both feed_forward and moe \(config\). Set exactly one"):
        validate(ModelSpec, {"embed_dim": 8, "layers": [layer]}, "config")


def test_layers_of_one_block_add_only_this_block(twin):
    """With two norms in place of four, the same numbers as one layer of both blocks; decoding counts their tokens."""
    alone = (
        LayerSpec(attention=ATTENTION, mixer_only=True),
        LayerSpec(attention=NoAttentionSpec(), feed_forward=GatedFeedForwardSpec(hidden_dim=F)),
        LayerSpec(attention=NoAttentionSpec(), moe=MOE),
    )
    spec = SPEC.model_copy(update={"layers": alone})
    weights = weights_of(spec)
    assert [name for name in weights if "norm" in name and "layers" in name] == [
        "layers.0.attention_norm.scale",
        "layers.1.feed_forward_norm.scale",
        "layers.2.feed_forward_norm.scale",
    ]
    model = twin.backend().build(spec, weights)
    output = model.forward(TOKENS_BT, record=True)
    seen, x = output.intermediates, output.intermediates["embedding"]
    for index, block in enumerate(("attention", "feed_forward", "moe")):
        x = x + seen[f"layers.{index}.{block}"]
        assert_close(seen[f"layers.{index}"], x, FLOAT32)
    both = SPEC.model_copy(update={"layers": (alone[1].model_copy(update={"attention": ATTENTION}), alone[2])})
    renamed = {
        name.replace("layers.1.", "layers.0.").replace("layers.2.", "layers.1."): weights[name] for name in weights
    }
    assert_close(output.logits, forward(both, in_float64(renamed), TOKENS_BT).logits_BTV, FLOAT32)
    _, cache = model.prefill(TOKENS_BT[:, :-1], T)
    assert_close(model.decode(TOKENS_BT[:, -1], cache)[0], output.logits[:, -1], FLOAT32)
