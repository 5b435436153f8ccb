from pathlib import Path

import numpy as np
import pytest

from moezoo.core.config.validate import validate
from moezoo.core.errors import SpecError
from moezoo.core.parameters.initialize import initial_weights
from moezoo.core.reference.delta_attention import (
    gated_delta_attention,
    gated_delta_rule,
    gated_delta_rule_in_chunks,
    unit,
)
from moezoo.core.reference.transformer import forward
from moezoo.core.spec import (
    GatedDeltaAttentionSpec,
    GatedFeedForwardSpec,
    GroupedQueryAttentionSpec,
    LayerSpec,
    ModelSpec,
    RMSNormSpec,
)
from tests.layers.pieces import assert_pieces_match
from tests.support.tolerances import BFLOAT16, BFLOAT16_GRADIENT, FLOAT32, FLOAT64, assert_close
from tests.support.twins import B, D, F, G, H, M, N, T, Twin, V, assert_layer_matches, assert_reference_gradient, normal

Z, WIDTH = 10, 4
# A head whose output is close to zero has an arbitrarily large gradient after the norm; hence the larger epsilon.
SPEC = GatedDeltaAttentionSpec(
    num_key_heads=M,
    num_value_heads=N,
    key_head_dim=H,
    value_head_dim=Z,
    conv_width=WIDTH,
    norm=RMSNormSpec(epsilon=1e-2),
)
VALUES = {
    "w_query": 0.3 * normal(1, D, M, H),
    "conv_query": normal(2, WIDTH, M, H),
    "w_key": 0.3 * normal(3, D, M, H),
    "conv_key": normal(4, WIDTH, M, H),
    "w_value": 0.3 * normal(5, D, N, Z),
    "conv_value": normal(6, WIDTH, N, Z),
    "w_gate": 0.3 * normal(7, D, N, Z),
    "w_beta": 0.3 * normal(8, D, N),
    "w_decay": 0.3 * normal(9, D, N),
    "decay_bias": normal(10, N),
    "log_decay_rate": normal(11, N) - 2,
    "output_norm.scale": normal(12, Z),
    "w_output": 0.3 * normal(13, N, Z, D),
}
PER_CHANNEL = SPEC.model_copy(
    update={"gate": "sigmoid", "gate_rank": 3, "decay": "channel", "decay_rank": 7, "log_decay_floor": -5.0}
)
VALUES_PER_CHANNEL = VALUES | {
    "w_gate_down": 0.3 * normal(14, D, 3),
    "w_gate": normal(15, 3, N, Z),
    "w_decay_down": 0.3 * normal(16, D, 7),
    "w_decay": normal(17, 7, N, H),
    "decay_bias": normal(18, N, H),
}
X_BTD = normal(0, B, T, D)
SEVERAL_CHUNKS = 70  # 32 is one chunk
ORACLE = Path(__file__).parents[1] / "data" / "gated_delta_oracle.npz"


def layer_of(twin: Twin, spec: GatedDeltaAttentionSpec = SPEC, values=VALUES):
    return twin.module("delta_attention").GatedDeltaAttention(spec, twin.weights(values), 0)


def reference(values, x_BTD, spec: GatedDeltaAttentionSpec = SPEC):
    return gated_delta_attention(spec, values, x_BTD).out_BTD


def rule(twin: Twin, query, key, value, beta, log_decay) -> np.ndarray:
    state_BMGHZ = np.zeros((len(key), M, G, H, value.shape[-1]))
    arrays = [twin.array(array) for array in (query, key, value, beta, log_decay, state_BMGHZ)]
    return twin.numpy(twin.compiled_function(twin.module("delta_attention").gated_delta_rule)(*arrays)[0])


def rule_inputs(length: int, decays: int = 1) -> list[np.ndarray]:
    """Return unit queries and keys, values, beta, and log decays, for decays from about 0.999 to 1e-20.

    `decays`: 1 per head, or H, one per channel.
    """
    query, key = unit(normal(1, B, length, M, H)), unit(normal(2, B, length, M, H))
    value, beta = normal(3, B, length, M, G, Z), 1 / (1 + np.exp(-normal(4, B, length, M, G)))
    return [query, key, value, beta, -np.exp(2 * normal(5, B, length, M, G, decays) - 2)]


def caches(twin: Twin, batch: int):
    return twin.module("kv_cache").empty_recurrent_cache(SPEC, batch, twin.array(np.zeros(1)).dtype)


def test_value_and_gradients_match_the_reference(twin):
    assert_layer_matches(twin, layer_of(twin), lambda layer, x: layer(x).out_BTD, reference, VALUES, X_BTD)


def test_sequences_of_several_chunks_match_the_reference(twin):
    x_BTD = normal(0, 2, SEVERAL_CHUNKS, D)
    assert_layer_matches(twin, layer_of(twin), lambda layer, x: layer(x).out_BTD, reference, VALUES, x_BTD)


def test_decays_per_channel_match_the_reference_over_several_chunks(twin):
    assert_layer_matches(
        twin,
        layer_of(twin, PER_CHANNEL, VALUES_PER_CHANNEL),
        lambda layer, x: layer(x).out_BTD,
        lambda values, x: reference(values, x, PER_CHANNEL),
        VALUES_PER_CHANNEL,
        normal(0, 2, SEVERAL_CHUNKS, D),
    )


def test_bfloat16_is_near_float32(twin):
    assert_layer_matches(
        twin,
        layer_of(twin),
        lambda layer, x: layer(x).out_BTD,
        reference,
        VALUES,
        X_BTD,
        dtype="bfloat16",
        tolerance=BFLOAT16,
        gradient_tolerance=BFLOAT16_GRADIENT,
    )


@pytest.mark.parametrize("decays", [1, H])
@pytest.mark.parametrize("chunk", [1, 3, 8, 64])
def test_chunks_and_recurrence_are_the_same_function(chunk, decays):
    arrays = rule_inputs(11, decays)
    assert_close(gated_delta_rule_in_chunks(*arrays, chunk), gated_delta_rule(*arrays), FLOAT64)


def test_repeated_keys_with_beta_of_one_stay_accurate(twin):
    """The worst case of the triangular system: each of 70 tokens overwrites the value of the token before it."""
    query, key, value, _, _ = rule_inputs(SEVERAL_CHUNKS)
    key[:] = key[:, :1]
    ones, zeros = np.ones(value.shape[:-1]), np.zeros((*value.shape[:-1], 1))
    expected = gated_delta_rule(query, key, value, ones, zeros)
    assert_close(rule(twin, query, key, value, ones, zeros), expected, FLOAT32)


@pytest.mark.parametrize("decays", [1, H])
def test_a_slow_decay_after_a_reset_stays_accurate(twin, decays):
    """Differences of sums from the start of a chunk would lose four of seven digits after the -1000."""
    query, key, value, beta, log_decay = rule_inputs(SEVERAL_CHUNKS, decays)
    resets = np.arange(SEVERAL_CHUNKS)[:, None, None, None] % 16 == 3
    log_decay = np.where(resets, -1000.0, 0.01 * np.tanh(log_decay))
    expected = gated_delta_rule(query, key, value, beta, log_decay)
    assert_close(rule(twin, query, key, value, beta, log_decay), expected, FLOAT32)


def test_reading_a_rewritten_key_returns_its_new_value(twin):
    """Other, orthogonal keys keep their values."""
    key = np.broadcast_to(np.eye(H)[[0, 1, 0, 2, 3]][None, :, None], (B, T, M, H))
    query = np.broadcast_to(np.eye(H)[[0, 0, 0, 1, 5]][None, :, None], (B, T, M, H))
    value = normal(3, B, T, M, G, Z)
    ones, zeros = np.ones((B, T, M, G)), np.zeros((B, T, M, G, 1))
    read = rule(twin, query, key, value, ones, zeros)
    assert_close(read[:, :4], value[:, [0, 0, 2, 1]], FLOAT32)
    assert_close(read[:, 4], np.zeros((B, M, G, Z)), FLOAT32)


def test_later_tokens_are_invisible_to_earlier_ones(twin):
    layer = twin.compiled(layer_of(twin))
    changed = X_BTD.copy()
    changed[:, 3:] = normal(21, B, T - 3, D)
    before, after = (twin.numpy(layer(twin.array(x)).out_BTD) for x in (X_BTD, changed))
    assert_close(after[:, :3], before[:, :3], FLOAT32)
    assert np.max(np.abs(after[:, 3:] - before[:, 3:])) > 1e-2


def test_cached_parts_equal_the_uncached_pass(twin):
    """A part shorter than the convolution, tokens one at a time, several chunks that start from a state."""
    parts = (2, 1, 1, 1, 40)
    x_BTD = normal(0, B, sum(parts), D)
    layer, cache, out = twin.compiled(layer_of(twin)), caches(twin, B), []
    for start, part in zip(np.cumsum((0, *parts)), parts, strict=False):
        attended = layer(twin.array(x_BTD[:, start : start + part]), cache)
        cache = attended.cache
        out.append(twin.numpy(attended.out_BTD))
    assert int(cache.length) == sum(parts)
    assert_close(np.concatenate(out, axis=1), reference(VALUES, x_BTD), FLOAT32)


def test_padding_does_not_change_the_cache(twin):
    """The cache equals that of each row alone."""
    x_BTD, first = normal(0, B, 7, D), (2, 0, 4)
    layer = layer_of(twin)
    cache = assert_pieces_match(twin, layer, caches(twin, B), lambda x: reference(VALUES, x), (3, 1, 3), first, x_BTD)
    layer = twin.compiled(layer)
    for row, start in enumerate(first):
        alone = layer(twin.array(x_BTD[row : row + 1, start:]), caches(twin, 1)).cache
        for name in ("state_BMGHZ", "query_BSMH", "key_BSMH", "value_BSNZ"):
            actual, plain = (twin.numpy(getattr(each, name)) for each in (cache, alone))
            assert_close(actual[row : row + 1], plain, FLOAT32, name)


def test_generation_equals_the_uncached_pass(twin):
    """JAX pads the prompt from five to sixteen tokens; a full-attention layer follows the linear one."""
    full = GroupedQueryAttentionSpec(num_heads=N, num_kv_heads=M, head_dim=H)
    layers = tuple(LayerSpec(attention=each, feed_forward=GatedFeedForwardSpec(hidden_dim=F)) for each in (SPEC, full))
    spec = ModelSpec(vocab_size=V, embed_dim=D, layers=layers)
    weights = {name: value if "decay" in name else 5 * value for name, value in initial_weights(spec, seed=0).items()}
    tokens = np.random.default_rng(0).integers(0, V, (B, 8)).astype(np.int32)
    expected = forward(spec, {name: value.astype(np.float64) for name, value in weights.items()}, tokens).logits_BTV
    model = twin.backend().build(spec, weights)
    logits, cache = model.prefill(tokens[:, :5], 8)
    assert_close(logits, expected[:, 4], FLOAT32)
    for t in range(5, 8):
        logits, cache = model.decode(tokens[:, t], cache)
        assert_close(logits, expected[:, t], FLOAT32, f"after {t + 1} tokens")


def test_decays_start_as_in_the_authors_code():
    """Steps of 0.001 to 0.1 times rates of 1 to 16: a state decays over one to a thousand tokens."""
    attention = GatedDeltaAttentionSpec(num_key_heads=1, num_value_heads=500, key_head_dim=1, value_head_dim=1)
    layer = LayerSpec(attention=attention, feed_forward=GatedFeedForwardSpec(hidden_dim=1))
    weights = initial_weights(ModelSpec(vocab_size=V, embed_dim=1, layers=(layer,)), seed=0)
    step = np.log1p(np.exp(weights["layers.0.attention.decay_bias"]))
    rate = np.exp(weights["layers.0.attention.log_decay_rate"])
    filters = weights["layers.0.attention.conv_value"]
    for value, least, mean, most in (
        (np.log10(step), -3.0, -2.0, -1.0),
        (rate, 1.0, 8.5, 16.0),
        (filters, -0.5, 0.0, 0.5),
    ):
        span = most - least
        assert least - 1e-5 <= np.min(value) <= least + 0.02 * span
        assert most - 0.02 * span <= np.max(value) <= most + 1e-5
        assert abs(np.mean(value) - mean) < 0.05 * span


def test_state_of_a_bfloat16_layer_is_float32(twin):
    x_BTD = twin.array(X_BTD, "bfloat16")
    cache = twin.compiled(layer_of(twin))(
        x_BTD, twin.module("kv_cache").empty_recurrent_cache(SPEC, B, x_BTD.dtype)
    ).cache
    assert "float32" in str(cache.state_BMGHZ.dtype)
    assert all("bfloat16" in str(array.dtype) for array in (cache.query_BSMH, cache.key_BSMH, cache.value_BSNZ))


def test_matches_a_published_implementation(twin):
    """Layer 0 of a tiny random Qwen3-Next, as transformers 5.23 computes it in float32 (48 tokens).

    The file holds the layer's tensors by their released names, its normed input `x`, and its output `out`.
    """
    oracle = np.load(ORACLE)
    key_heads, value_heads, head_dim, value_dim = 2, 4, 16, 12
    spec = GatedDeltaAttentionSpec(
        num_key_heads=key_heads, num_value_heads=value_heads, key_head_dim=head_dim, value_head_dim=value_dim
    )
    values = from_released(spec, oracle)
    expected = oracle["out"][None]
    assert_close(gated_delta_attention(spec, values, oracle["x"][None].astype(np.float64)).out_BTD, expected, FLOAT32)
    found = twin.compiled(layer_of(twin, spec, values))(twin.array(oracle["x"][None])).out_BTD
    assert_close(twin.numpy(found), expected, FLOAT32)


def from_released(spec: GatedDeltaAttentionSpec, released) -> dict[str, np.ndarray]:
    """Convert Qwen3-Next's parameters to ours: its projections group rows by key head, each with G value heads."""
    m, h, z = spec.num_key_heads, spec.key_head_dim, spec.value_head_dim
    group = spec.num_value_heads // m
    embed_dim = released["out_proj.weight"].shape[0]
    mixed_DMX = released["in_proj_qkvz.weight"].T.reshape(embed_dim, m, -1)
    query, key, value, gate = np.split(mixed_DMX, np.cumsum([h, h, group * z]), axis=-1)
    beta, decay = np.split(released["in_proj_ba.weight"].T.reshape(embed_dim, m, -1), 2, axis=-1)
    filters = np.split(released["conv1d.weight"][:, 0].T, np.cumsum([m * h, m * h]), axis=1)
    values = {
        "w_query": query,
        "conv_query": filters[0].reshape(-1, m, h),
        "w_key": key,
        "conv_key": filters[1].reshape(-1, m, h),
        "w_value": value.reshape(embed_dim, -1, z),
        "conv_value": filters[2].reshape(-1, m * group, z),
        "w_gate": gate.reshape(embed_dim, -1, z),
        "w_beta": beta.reshape(embed_dim, -1),
        "w_decay": decay.reshape(embed_dim, -1),
        "decay_bias": released["dt_bias"],
        "log_decay_rate": released["A_log"],
        "output_norm.scale": released["norm.weight"],
        "w_output": released["out_proj.weight"].T.reshape(-1, z, embed_dim),
    }
    return {name: value.astype(np.float64) for name, value in values.items()}


def test_reference_gradient_agrees_with_finite_differences():
    names = ("conv_key", "decay_bias", "log_decay_rate", "w_beta")
    assert_reference_gradient(
        lambda x, *some: reference(VALUES | dict(zip(names, some, strict=True)), x),
        X_BTD[:1, :4],
        *(VALUES[name] for name in names),
    )


def test_value_heads_that_key_heads_do_not_divide_are_refused():
    sizes = {"num_key_heads": 3, "num_value_heads": 8, "key_head_dim": 6, "value_head_dim": 6}
    with pytest.raises(SpecError, match=r"num_value_heads is 8, which is not divisible by num_key_heads = 3.*Use a"):
        validate(GatedDeltaAttentionSpec, sizes, "config")
