import numpy as np
import pytest

from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import (
    CapacitySpec,
    DispatchSpec,
    DroplessSpec,
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    MoESpec,
    NoPositionSpec,
    PrecisionSpec,
    RMSNormSpec,
    RouterSpec,
    TemperatureTuningSpec,
)
from tests.support.tolerances import BFLOAT16, FLOAT32, assert_close
from tests.support.twins import B, D, E, F, H, K, M, N, V, normal


def model_of(dispatch: DispatchSpec) -> ModelSpec:
    """Return a plain causal layer, and one with most attention features."""
    return ModelSpec(
        vocab_size=V,
        embed_dim=D,
        layers=(
            LayerSpec(
                attention=GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H, qk_norm=RMSNormSpec()),
                feed_forward=GatedFeedForwardSpec(hidden_dim=F),
            ),
            LayerSpec(
                attention=GroupedQueryAttentionSpec(
                    num_heads=N,
                    num_kv_heads=M,
                    head_dim=H,
                    position=NoPositionSpec(),
                    window=7,
                    sinks=True,
                    gate="headwise",
                    temperature_tuning=TemperatureTuningSpec(floor_length=4),
                    value_residual=True,
                ),
                moe=MoESpec(
                    num_experts=E,
                    router=RouterSpec(top_k=K),
                    experts=GatedFeedForwardSpec(hidden_dim=F),
                    dispatch=dispatch,
                ),
            ),
        ),
    )


# A capacity, which generation ignores: the text of a sequence may not depend on other sequences.
SPEC, DROPLESS = model_of(CapacitySpec(factor=0.4)), model_of(DroplessSpec())
WEIGHTS = {name: 5 * value for name, value in initial_weights(SPEC, seed=0).items()}
LENGTH = 20
TOKENS = np.random.default_rng(0).integers(0, V, (B, LENGTH)).astype(np.int32)


@pytest.fixture(scope="module")
def model(twin):
    return twin.backend().build(SPEC, WEIGHTS)


@pytest.fixture(scope="module")
def uncached():
    """Return logits [B, T, V] of the dropless reference."""
    return forward(DROPLESS, {name: value.astype(np.float64) for name, value in WEIGHTS.items()}, TOKENS)[0]


# 16 fills JAX's first bucket of the prompt, 17 needs the next one.
@pytest.mark.parametrize("prompt", [1, 5, 16, 17])
def test_prefill_and_decode_equal_the_uncached_forward(model, uncached, prompt):
    logits, cache = model.prefill(TOKENS[:, :prompt], LENGTH)
    assert_close(logits, uncached[:, prompt - 1], FLOAT32, f"after {prompt} tokens")
    for t in range(prompt, LENGTH):
        logits, cache = model.decode(TOKENS[:, t], cache)
        assert_close(logits, uncached[:, t], FLOAT32, f"after {t + 1} tokens")


def test_decoding_one_sequence_gives_what_it_gives_in_a_batch(model, uncached):
    """With a capacity, other sequences would fill the experts."""
    logits, cache = model.prefill(TOKENS[1:2, :5], LENGTH)
    for t in range(5, 8):
        logits, cache = model.decode(TOKENS[1:2, t], cache)
    assert_close(logits, uncached[1:2, 7], FLOAT32)


def test_capacity_would_have_changed_the_uncached_logits(uncached):
    """Otherwise the tests above could not fail."""
    limited = forward(SPEC, {name: value.astype(np.float64) for name, value in WEIGHTS.items()}, TOKENS)[0]
    assert np.max(np.abs(limited - uncached)) > 0.1 * np.max(np.abs(uncached))


def test_two_caches_do_not_disturb_each_other(model, uncached):
    _, first = model.prefill(TOKENS[:1, :5], LENGTH)
    _, second = model.prefill(TOKENS[1:2, :5], LENGTH)
    logits_of_second, _ = model.decode(TOKENS[1:2, 5], second)
    logits_of_first, _ = model.decode(TOKENS[:1, 5], first)
    assert_close(logits_of_first, uncached[:1, 5], FLOAT32)
    assert_close(logits_of_second, uncached[1:2, 5], FLOAT32)


def test_bfloat16_cache_is_near_float32(twin, uncached):
    """Dense layer only: in an MoE layer, rounding may choose another expert."""
    spec = ModelSpec(vocab_size=V, embed_dim=D, layers=SPEC.layers[:1], precision=PrecisionSpec(compute="bfloat16"))
    weights = {name: value / 2 for name, value in WEIGHTS.items() if not name.startswith("layers.1")}
    in_float64 = {name: value.astype(np.float64) for name, value in weights.items()}
    expected = forward(spec, in_float64, TOKENS)[0]
    model = twin.backend().build(spec, weights)
    logits, cache = model.prefill(TOKENS[:, :5], LENGTH)
    assert "bfloat16" in str(cache.layers[0].key_BSMH.dtype)
    assert_close(logits, expected[:, 4], BFLOAT16)
    logits, _ = model.decode(TOKENS[:, 5], cache)
    assert_close(logits, expected[:, 5], BFLOAT16)


def test_an_extended_cache_holds_both_parts_in_order(twin):
    cache = twin.module("kv_cache").empty_cache(SPEC, B, 8)[0]
    keys, values = normal(1, B, 5, M, H), normal(2, B, 5, M, H)
    for part in (slice(0, 3), slice(3, 5)):
        cache, _ = cache.extend(twin.array(keys[:, part]), twin.array(values[:, part]))
    assert int(cache.length) == 5
    padding = np.zeros((B, 3, M, H))
    np.testing.assert_array_equal(twin.numpy(cache.key_BSMH), np.concatenate([keys, padding], axis=1))
    np.testing.assert_array_equal(twin.numpy(cache.value_BSMH), np.concatenate([values, padding], axis=1))


def test_layers_that_share_keys_generate_as_the_uncached_forward(twin):
    heads = GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H)
    kinds = (heads, heads.model_copy(update={"window": 4}))
    kinds += tuple(kinds[place].model_copy(update={"keys_of_layer": place}) for place in (1, 0))
    feed_forward = GatedFeedForwardSpec(hidden_dim=F)
    layers = tuple(LayerSpec(attention=kind, feed_forward=feed_forward) for kind in kinds)
    spec = ModelSpec(vocab_size=V, embed_dim=D, layers=layers)
    weights = {name: 5 * value for name, value in initial_weights(spec, seed=0).items()}
    assert not any("layers.2.attention.w_key" in name for name in weights)
    expected = forward(spec, {name: value.astype(np.float64) for name, value in weights.items()}, TOKENS)[0]
    model = twin.backend().build(spec, weights)
    assert_close(model.forward(TOKENS).logits, expected, FLOAT32)
    logits, cache = model.prefill(TOKENS[:, :9], LENGTH)
    assert [hasattr(part, "key_BSMH") for part in cache.layers] == [True, True, False, False]
    for t in range(9, 14):
        assert_close(logits, expected[:, t - 1], FLOAT32, f"after {t} tokens")
        logits, cache = model.decode(TOKENS[:, t], cache)


def test_an_empty_cache_has_a_row_for_each_layer(twin):
    caches = twin.module("kv_cache").empty_cache(SPEC, B, 8)
    assert [cache.key_BSMH.shape for cache in caches] == [(B, 8, M, H), (B, 7, M, H)]
    assert [int(cache.length) for cache in caches] == [0, 0]
